"""Frozen vision encoders behind one interface: (B, 3, H, W) -> (B, L, D_v), `.width`, `.num_tokens`, `.protected`.

`vit_model` is LAVIS's `eva_clip_g` or `clip_L`, or any Hugging Face vision model (id, folder, or the .onnx file
of a DINOv2 as the quickstart uses).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from lavis.common.dist_utils import download_cached_file
from lavis.models import clip_vit, eva_vit
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import MODEL_MAPPING, AutoConfig, AutoModel

from lavis_evlgen.config.keys import Settings, key
from lavis_evlgen.config.limits import LARGEST
from lavis_evlgen.models.precision import DTYPES, PRECISIONS, check_precision, freeze
from lavis_evlgen.models.vision.dinov2_onnx import dinov2_from_onnx
from lavis_evlgen.models.vision.eva_attention import fuse_attention
from lavis_evlgen.weights.kept_sizes import sizes_of
from lavis_evlgen.weights.sources import (
    WeightsError,
    check_files_floating,
    check_floating,
    load_from_hub,
    on_meta,
    read_state_dict,
    refuse_kernels,
    resolve,
)

DOWNLOADS = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/"


def eva_clip_g(image_size: int, blocks: int = 39) -> nn.Module:
    """LAVIS's EVA-CLIP-g: width 1408, 39 blocks (the last of its 40 dropped), patch 14."""
    return eva_vit.VisionTransformer(
        img_size=image_size, patch_size=14, use_mean_pooling=False, embed_dim=1408, depth=blocks,
        num_heads=1408 // 88, mlp_ratio=4.3637, qkv_bias=True, norm_layer=_LayerNorm1e6,
    )  # fmt: skip


def clip_vit_l(image_size: int, blocks: int = 21) -> nn.Module:
    """LAVIS's CLIP ViT-L/14: width 1024, by default 21 blocks, as LAVIS runs it; EVLGen's released code runs 23."""
    vit = clip_vit.VisionTransformer(  # one layer fewer than is asked for
        input_resolution=image_size, patch_size=14, width=1024, layers=blocks + 1, heads=16,
        use_grad_checkpointing=False,
    )  # fmt: skip
    del vit.transformer.resblocks[blocks:]  # the class of other LAVIS versions builds them all
    return vit


class _LayerNorm1e6(nn.LayerNorm):
    def __init__(self, width: int):
        super().__init__(width, eps=1e-6)


class _LinspaceOnCPU(TorchFunctionMode):
    """LAVIS reads numbers off a `torch.linspace` while it builds; on the meta device there are none."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@dataclass(kw_only=True)
class VisionSettings(Settings):
    """Keys of a model config that choose the vision encoder."""

    vit_model: str = key("eva_clip_g, clip_L, or a Hugging Face vision model (id, folder, DINOv2 .onnx)", "eva_clip_g")
    vit_path: str | None = key("local weights of eva_clip_g or clip_L; empty: LAVIS's download", None)
    vit_layer: int | None = key(
        "hidden layer of a Hugging Face ViT to read (0 embeddings, negative from the end; left out: its own output); "
        "of clip_L, how many of its 24 blocks run (left out: 21, as LAVIS; 23, as EVLGen's released code)", None,
        at_least=-1000, at_most=1000,
    )  # fmt: skip
    vit_precision: Literal[PRECISIONS] = key(
        "fp32 (weights; products as run.amp says), fp16, bf16, or auto: bf16 where the GPU (without one: the "
        "processor) has it, else fp32", "fp16",
    )  # fmt: skip
    freeze_vit: bool = key("must be true: the vision encoder stays frozen", True)
    image_size: int = key("side of the input picture in pixels", 224, at_least=14, at_most=LARGEST["image_size"])
    trust_remote_code: bool = key(
        "true: run the code that a model's folder or hub repository brings; a person says so, never a bundle or "
        "checkpoint", False,
    )  # fmt: skip


# name: (architecture, file of the download, LAVIS's resizing of its position embeddings)
LAVIS_VITS = {
    "eva_clip_g": (eva_clip_g, "eva_vit_g.pth", eva_vit.interpolate_pos_embed),
    "clip_L": (clip_vit_l, "clip_vit_L.pth", clip_vit.interpolate_pos_embed),
}


class VisionEncoder(nn.Module):
    """A frozen ViT. `forward(image (B, 3, H, W))` -> (B, L, D_v) float32, without gradient.

    `protected` counts the leading tokens that are not patches ([CLS], registers).
    """

    def __init__(self, vit: nn.Module, width: int, num_tokens: int, protected: int, precision: str):
        super().__init__()
        self.precision = check_precision(precision, "vit_precision")
        self.vit = freeze(_cast_matrices(fuse_attention(vit), DTYPES[self.precision]))
        self.width, self.num_tokens, self.protected = width, num_tokens, protected

    def train(self, mode: bool = True):
        return super().train(False)  # frozen means eval mode, always

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        return self.encode(image)

    def encode(self, image: Tensor) -> Tensor:
        """`forward` as torch's gradient mode is: for an encoder with trainable modules between its frozen blocks.

        With float32 weights the arithmetic is that of the autocast around it (run.amp), as in LAVIS.
        """
        if self.precision == "fp32":
            return self.vit(image).float()  # (B, L, D_v)
        with torch.autocast(image.device.type, DTYPES[self.precision]):
            return self.vit(image).float()


class HuggingFaceViT(nn.Module):
    """Any Hugging Face vision model as (B, 3, H, W) -> (B, L, D_v).

    layer: which hidden state to read, counted as Hugging Face does (0 the embeddings, k after block k, negative
    from the end); later blocks are removed, so they cost neither memory nor time. None: the model's own
    last_hidden_state.
    """

    def __init__(self, model: nn.Module, image_size: int, layer: int | None = None):
        super().__init__()
        model = getattr(model, "vision_model", model)  # CLIP, SigLIP: the vision half
        config = getattr(model.config, "vision_config", model.config)
        if not hasattr(config, "patch_size"):
            raise ValueError(f"vit_model: {type(model).__name__} is no vision transformer: it has no patch size")
        self.layer, self.reads_embeddings = layer, False
        self.resize = {}
        if getattr(config, "image_size", image_size) != image_size and config.model_type != "dinov2":
            self.resize = {"interpolate_pos_encoding": True}
        if layer is not None:
            self._tap(*_keep_layers(model, config.num_hidden_layers, layer))
        self.model, self.width = model, config.hidden_size
        self.patches = (image_size // config.patch_size) ** 2

    def _tap(self, blocks: nn.ModuleList, wanted: int):
        # Hooks rather than output_hidden_states: which class still answers to that differs between releases.
        self.reads_embeddings = wanted == 0
        if wanted:
            blocks[-1].register_forward_hook(self._keep_output)
        else:
            blocks[0].register_forward_pre_hook(self._keep_input)

    def _keep_output(self, block, args, output):
        self.hidden = output[0] if isinstance(output, tuple) else output

    def _keep_input(self, block, args):
        self.hidden = args[0]

    def forward(self, image: Tensor) -> Tensor:
        output = self.model(image, **self.resize)
        if self.layer is None:
            return output.last_hidden_state
        hidden, self.hidden = self.hidden, None
        return hidden


def _keep_layers(model: nn.Module, depth: int, layer: int) -> tuple[nn.ModuleList, int]:
    """Remove the blocks above `layer`, except the first; the blocks left, and `layer` counted from 0."""
    wanted = layer if layer >= 0 else depth + 1 + layer
    if not 0 <= wanted <= depth:
        raise ValueError(f"vit_layer: {layer} is outside 0..{depth} (or -1..{-depth - 1}) of this ViT")
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not stacks:
        raise ValueError(f"vit_layer: found no stack of {depth} blocks in {type(model).__name__}")
    del stacks[0][max(wanted, 1) :]
    return stacks[0], wanted


def _cast_matrices(vit: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Linear and convolution weights to `dtype`, norms stay float32, as LAVIS and autocast have it."""
    for module in vit.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)
    return vit


def vision_of(cfg) -> nn.Module:
    """The frozen vision encoder that a model config (VisionSettings) names."""
    settings = VisionSettings.read(cfg)
    return load_vision_encoder(
        settings.vit_model, settings.image_size, settings.vit_precision, settings.vit_path, settings.vit_layer,
        settings.trust_remote_code,
    )  # fmt: skip


def load_vision_encoder(
    vit_model: str,
    image_size: int = VisionSettings.image_size,
    precision: str = VisionSettings.vit_precision,
    vit_path: str | None = None,
    vit_layer: int | None = None,
    trust_remote_code: bool = False,
) -> VisionEncoder:
    """Build the encoder and load its weights: from `vit_path`, from the hub, or LAVIS's download.

    Under `torch.device("meta")` it has its shapes and no weights, and nothing but a config is read.
    trust_remote_code: run code that the folder or repository brings. Raises WeightsError.
    """
    if vit_model in LAVIS_VITS:
        _check_lavis_layer(vit_model, vit_layer)
        return _load_lavis_vit(vit_model, image_size, precision, vit_path, vit_layer)
    if vit_path:
        raise ValueError(f"vit_path: only for {', '.join(LAVIS_VITS)}; give the folder as vit_model")
    model = hugging_face_model(resolve(vit_model, "vit_model"), trust_remote_code)
    return wrap_hugging_face(model, image_size, precision, vit_layer)


def hugging_face_model(source: str, trust_remote_code: bool = False) -> nn.Module:
    """The whole vision model of a hub id, a folder or a DINOv2's .onnx file, float32. Raises WeightsError."""
    if source.endswith(".onnx"):
        device = torch.get_default_device()
        with torch.device("cpu"):  # its sizes are those of its weights
            return dinov2_from_onnx(source).to(device)
    trust = {"trust_remote_code": trust_remote_code}
    config = load_from_hub(AutoConfig.from_pretrained, sizes_of(source), "vit_model", **trust)
    if not trust_remote_code:
        refuse_kernels(config, source, "vit_model")
    if type(config) in MODEL_MAPPING:
        # not AutoModel: in older releases it imports every architecture, and one needs a newer timm than LAVIS
        model_class, build = MODEL_MAPPING[type(config)], {}
        create = model_class
    elif trust_remote_code:
        model_class, build = AutoModel, trust
        create = AutoModel.from_config
    else:
        raise WeightsError(f"vit_model: {source} holds a {type(config).__name__}, which has no model of its own")
    if on_meta():
        with _LinspaceOnCPU():
            return load_from_hub(lambda _: create(config, **build), source, "vit_model")
    check_files_floating(source, "vit_model")
    model = load_from_hub(model_class.from_pretrained, source, "vit_model", torch_dtype=torch.float32, **trust)
    weights = dict(model.named_parameters())
    check_floating(weights, dict.fromkeys(weights, torch.empty(0)), f"vit_model: {source}")
    return model


def wrap_hugging_face(model: nn.Module, image_size: int, precision: str, layer: int | None) -> VisionEncoder:
    """A loaded Hugging Face vision model as a VisionEncoder; one dry run counts its tokens."""
    vit = HuggingFaceViT(model, image_size, layer).eval()
    device = next(vit.parameters()).device
    with torch.no_grad():
        num_tokens = vit(torch.zeros(1, 3, image_size, image_size, device=device)).shape[1]
    return VisionEncoder(vit, vit.width, num_tokens, max(num_tokens - vit.patches, 0), precision)


def _check_lavis_layer(name: str, layer: int | None):
    if layer is None:
        return
    if name != "clip_L":
        raise ValueError(f"vit_layer: {name} has one output; use a Hugging Face ViT to choose a layer")
    if isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer <= 24:
        raise ValueError(f"vit_layer: {layer!r} is outside 1..24, the blocks of clip_L")


def build_empty(name: str, image_size: int, blocks: int | None = None) -> nn.Module:
    """A LAVIS ViT on the meta device: no random numbers for a billion weights that are overwritten."""
    with torch.device("meta"), _LinspaceOnCPU():
        return LAVIS_VITS[name][0](image_size, *() if blocks is None else (blocks,))


def _load_lavis_vit(
    name: str, image_size: int, precision: str, vit_path: str | None, blocks: int | None = None
) -> VisionEncoder:
    _, file, resize_positions = LAVIS_VITS[name]
    vit = build_empty(name, image_size, blocks)
    if not on_meta():
        _fill(vit, name, file, resize_positions, vit_path)
    return VisionEncoder(vit, vit.num_features, (image_size // 14) ** 2 + 1, 1, precision)


def _fill(vit: nn.Module, name: str, file: str, resize_positions, vit_path: str | None):
    """Put the weights of `vit_path`, else of LAVIS's download, in place of the empty ones, as float32."""
    if vit_path:
        path = resolve(vit_path, "vit_path")
    else:
        logging.info("vit_model %s: downloading %s (or set model.vit_path to a local copy)", name, file)
        try:
            path = download_cached_file(DOWNLOADS + file, check_hash=False, progress=True)
        except OSError as error:
            raise WeightsError(
                f"vit_model {name}: cannot download {DOWNLOADS + file} ({error}); "
                "fetch it elsewhere and set model.vit_path to the file"
            ) from error
    state = read_state_dict(path, "vit_path")
    check_floating(state, vit.state_dict(), f"vit_path: {path}")
    resize_positions(vit, state)
    try:
        missing = vit.load_state_dict(state, strict=False, assign=True).missing_keys
    except RuntimeError as error:  # a weight of another shape
        what = str(error).splitlines()[-1].strip()
        raise WeightsError(f"vit_path: {path} is not {name} at patch 14: {what}") from error
    if missing:
        raise WeightsError(f"vit_path: {path} lacks {len(missing)} weights of {name}, first {missing[0]}")
    vit.float()
