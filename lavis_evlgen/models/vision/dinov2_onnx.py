"""A DINOv2 ViT out of an ONNX export: its initialisers are the weights of Hugging Face's Dinov2Model.

The exporter keeps the names of biases and norms, but folds each linear weight into an anonymous, transposed
constant: the name comes back from the bias that is added to the product.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from transformers import Dinov2Config, Dinov2Model

from lavis_evlgen.compat.environment import require
from lavis_evlgen.weights.sources import WeightsError

PREFIX = "backbone."
RENAMED = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
)


def dinov2_from_onnx(path: str) -> Dinov2Model:
    """Dinov2Model (float32) with the weights of the export at `path`; other heads in the file are left out."""
    require("onnx", "quickstart")
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    tensors = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    state = {k.removeprefix(PREFIX): v for k, v in tensors.items() if k.startswith(PREFIX)}
    state |= _linear_weights(graph, tensors)
    state["embeddings.position_embeddings"] = _position_embeddings(tensors, path)
    depth = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("encoder.layer."))
    width, patch = state["embeddings.cls_token"].shape[-1], 14
    grid = round((state["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
        patch_size=patch,
        image_size=grid * patch,
        # read once per forward by SDPA; the default is already right, this only states it
        attn_implementation="sdpa",
    )
    model = Dinov2Model(config)
    known = model.state_dict().keys()
    state = {_as_in(known, name): tensor for name, tensor in state.items()}
    # only used by masked pre-training; absent from exports
    state["embeddings.mask_token"] = torch.zeros(1, width)
    result = model.load_state_dict(state, strict=False)
    if result.missing_keys or result.unexpected_keys:
        raise WeightsError(
            f"vit_model: {path} is not a DINOv2 export: missing {result.missing_keys[:3]}, "
            f"unknown {result.unexpected_keys[:3]}"
        )
    return model.eval()


def _as_in(known: Collection[str], name: str) -> str:
    """The one of the model's names that a weight has: transformers 5 renamed those of the attention."""
    if name in known:
        return name
    for before, now in RENAMED:
        name = name.replace(before, now)
    return name


def _linear_weights(graph, tensors) -> dict[str, torch.Tensor]:
    products = {n.output[0]: n.input[1] for n in graph.node if n.op_type == "MatMul" and n.input[1] in tensors}
    weights = {}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        names = list(node.input)
        bias = next((n for n in names if n.startswith(PREFIX) and n.endswith(".bias")), None)
        product = next((n for n in names if n in products), None)
        if bias and product:
            name = bias.removeprefix(PREFIX).removesuffix("bias") + "weight"
            weights[name] = tensors[products[product]].T.contiguous()
    return weights


def _position_embeddings(tensors, path: str) -> torch.Tensor:
    """(1, 1 + grid², D): the exporter split it into a [CLS] row and the grid."""
    width = tensors[PREFIX + "embeddings.cls_token"].shape[-1]
    loose = [t for k, t in tensors.items() if k.startswith("onnx::") and t.ndim == 3 and t.shape[-1] == width]
    cls = [t for t in loose if t.shape[1] == 1]
    grid = [t for t in loose if t.shape[1] > 1]
    if len(cls) != 1 or len(grid) != 1:
        raise WeightsError(f"vit_model: found no position embeddings in {path}; it is not a DINOv2 export")
    return torch.cat([cls[0], grid[0]], dim=1)
