"""EVA-CLIP-g as LAVIS has it against fused attention, on random weights of full size.

    python -m benchmarks.speed.vision                    # on a GPU all 39 blocks; on a CPU 4

Forward is what a frozen ViT does for pictures; forward+backward, with gradients to the input and none to a weight, what
it does for clips with a temporal module between its blocks. Memory: what the pass holds beside the weights, counted
over the storages of the pass.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from benchmarks.common.timing import DTYPES, alternate, held_gb, parser, write
from lavis_evlgen.models.vision.encoder import _cast_matrices, eva_clip_g
from lavis_evlgen.models.vision.eva_attention import fuse_attention


def encoders(blocks: int, dtype: torch.dtype, device: torch.device) -> dict[str, nn.Module]:
    """LAVIS's and the fused one, with the same random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        vit = eva_clip_g(224, blocks)
    vit = _cast_matrices(vit.eval().requires_grad_(False), dtype)
    return {"LAVIS": vit, "fused": fuse_attention(copy.deepcopy(vit))}


def passes(vit: nn.Module, image: torch.Tensor, dtype: torch.dtype) -> dict:
    """{name: call}."""

    def forward(grad: bool = False):
        with torch.set_grad_enabled(grad), torch.autocast(image.device.type, dtype, enabled=dtype != torch.float32):
            return vit(image.requires_grad_(grad)).float()

    def both():
        forward(True).square().mean().backward()
        image.grad = None

    return {"forward": forward, "forward+backward": both}


def measure(args) -> list[dict]:
    device, rows = torch.device(args.device), []
    for name, dtype in DTYPES.items():
        vits = encoders(args.blocks, dtype, device)
        image = torch.randn(args.batch, 3, 224, 224, device=device)
        calls = {kind: passes(vit, image, dtype) for kind, vit in vits.items()}
        outputs = {kind: call["forward"]() for kind, call in calls.items()}
        error = ((outputs["LAVIS"] - outputs["fused"]).norm() / outputs["LAVIS"].norm()).item()
        for which in ("forward", "forward+backward"):
            chosen = {kind: call[which] for kind, call in calls.items()}
            memory = {kind: held_gb(call, vits[kind].parameters()) for kind, call in chosen.items()}
            seconds = alternate(chosen, device, args.repetitions, args.seconds)
            row = {"dtype": name, "passes": which, "batch": args.batch, "blocks": args.blocks, "seconds": seconds}
            rows.append({**row, "held_gb": memory, "difference": error})
            print(name, which, {k: f"{1e3 * v['median']:.1f} ms" for k, v in seconds.items()}, memory, flush=True)
    return rows


def main():
    on_gpu = torch.cuda.is_available()
    args_of = parser(__doc__, repetitions=20 if on_gpu else 5, seconds=60)
    args_of.add_argument("--blocks", type=int, default=39 if on_gpu else 4, help="blocks kept of 39 (GPU 39, CPU 4)")
    args_of.add_argument("--batch", type=int, default=32 if on_gpu else 2, help="pictures (GPU 32, CPU 2)")
    args = args_of.parse_args()
    write("vision", args, measure(args))


if __name__ == "__main__":
    main()
