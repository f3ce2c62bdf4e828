"""The floor of a training step: operations and bytes of each part, counted without a weight, and the time they need.

    python -m benchmarks.speed.roofline                 # opt-2.7b and vicuna-7b, 64 pictures, on an H200

The model's own code runs on tensors without numbers. Operations: FLOPs of matrix products, convolutions and attention.
Bytes: what these read and write, which nothing can avoid; and what all operations read and write when each is a kernel
of its own, the way torch runs code that is not compiled. A part takes no less than the longer of operations over the
GPU's peak and bytes over its bandwidth. What is measured beside it: benchmarks/speed/step.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.common.random_models import build, scales
from benchmarks.common.timing import RESULTS
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.reporting.provenance import provenance
from lavis_evlgen.reporting.run_card import write_run_card
from lavis_evlgen.tools.cost.hardware import HARDWARE
from lavis_evlgen.tools.cost.meta_models import NothingIsPadded, backward, without_weights

BANDWIDTH = {"h200": 4.8e12, "h100": 3.35e12, "a100-80g": 2.0e12}  # bytes a second, the makers' data sheets
ADAMW = 4 * 7  # bytes a weight: reads weight, gradient and two moments, writes weight and moments
FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Traffic(TorchDispatchMode):
    """FLOPs, bytes of products, and bytes of all operations that make or change a tensor."""

    def __init__(self):
        super().__init__()
        self.flops = self.products = self.all = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if func.is_view:
            return made
        tensors = [value for value in tree_leaves((args, kwargs, made)) if isinstance(value, Tensor)]
        moved = sum({id(value): value.numel() * value.element_size() for value in tensors}.values())
        self.all += moved
        packet = func.overloadpacket
        if packet in (FORWARD, BACKWARD):
            self.flops += attention_flops(packet, args)
            self.products += moved
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=made)
            self.products += moved
        return made


def attention_flops(packet, args) -> int:
    """Two products forward, five backward (one is computed again), of all pairs of query (B, H, T, D) and key."""
    first, products = (1, 5) if packet is BACKWARD else (0, 2)
    query, key = args[first : first + 2]
    return products * 2 * query.numel() * key.shape[-2]


def parts_of(model: EVLGen, batch: int, size: int, text: int) -> dict[str, dict[str, int]]:
    """{part: its FLOPs and bytes} of a step of a model on the meta device; captions of `text` tokens with BOS."""
    found: dict[str, dict[str, int]] = {}

    def count(name: str, call: Callable):
        with Traffic() as traffic:
            result = call()
        found[name] = {"flops": traffic.flops, "products": traffic.products, "all": traffic.all}
        return result

    language = model.language_model
    with FakeTensorMode(allow_non_fake_inputs=True), NothingIsPadded(), torch.autocast("cpu", torch.bfloat16):
        without_weights(model.train())
        image = torch.empty(batch, 3, size, size)
        visual = count("vision encoder", lambda: model.visual_encoder(image))
        connect = lambda: model.connector(model.ln_vision(visual), features=visual).tokens  # noqa: E731
        prompt = count("connector, forward", lambda: model.llm_proj(connect()))
        cut = prompt.detach().requires_grad_()
        words = torch.empty(batch, text, language.width, dtype=language.dtype)
        inputs = torch.cat([cut.to(language.dtype), words], 1)
        hidden = count("language model, forward", lambda: language.body(inputs))
        last = hidden.detach().requires_grad_()

        def head():
            rows = last[:, -text:-1].flatten(0, 1)
            loss = F.cross_entropy(language._head(rows).float(), torch.zeros(len(rows), dtype=torch.long))
            backward(loss, torch.ones_like(loss))

        count("head and loss, both passes", head)
        count("language model, backward", lambda: backward(hidden, torch.empty_like(hidden)))
        count("connector, backward", lambda: backward(prompt, torch.empty_like(prompt)))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found["optimizer"] = {"flops": 0, "products": ADAMW * trained, "all": ADAMW * trained}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scales", nargs="+", choices=scales(), default=["opt-2.7b", "vicuna-7b"])
    parser.add_argument("--batch", type=int, default=64, help="pictures (64)")
    parser.add_argument("--text", type=int, default=16, help="tokens of a caption with BOS and end (16)")
    parser.add_argument("--gpu", choices=BANDWIDTH, default="h200")
    parser.add_argument("--out", type=Path, default=RESULTS / "floor.json")
    args = parser.parse_args()
    rows = []
    for name in args.scales:
        scale = scales()[name]
        parts = parts_of(build(scale, "bf16", torch.device("meta")), args.batch, scale.image_size, args.text)
        rows.append({"scale": name, "batch": args.batch, "text": args.text, "parts": parts})
        for part, found in parts.items():
            print(name, part, {key: f"{value / 1e9:.1f}G" for key, value in found.items()})
    gpu = {"gpu": args.gpu, "peak": HARDWARE[args.gpu].half, "bandwidth": BANDWIDTH[args.gpu]}
    print(f"-> {write_run_card(args.out, {**gpu, 'rows': rows, **provenance()})}")


if __name__ == "__main__":
    main()
