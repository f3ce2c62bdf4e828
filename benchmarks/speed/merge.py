"""The sum of merged tokens: a product with the 0/1 map (ours on GPUs), index_add (ours on CPUs), and scatter_add.

    python -m benchmarks.speed.merge

Sums that a scatter makes run in any order on a GPU, and in bf16 they are rounded after every addition: beside the
times stands how far each formulation is from the mean in float64.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from benchmarks.common.timing import DTYPES, alternate, backward_of, parser, write
from lavis_evlgen.nn.merging import MergeMap, match

TOKENS = (65, 129, 257, 513, 1025)


def product(merge: MergeMap, x: Tensor) -> Tensor:
    """What the TomeFormer does on a GPU: (B, T, D) -> (B, T', D)."""
    return merge.sums_by_product(x) / merge.sizes().unsqueeze(-1).to(x.dtype)


def scatter(merge: MergeMap, x: Tensor) -> Tensor:
    """The same by scatter_add, with the integer map spread over all channels."""
    index = merge.slot.unsqueeze(-1).expand_as(x)  # (B, T, D)
    sums = x.new_zeros(len(x), merge.num_slots, x.shape[-1]).scatter_add(1, index, x)  # (B, T', D)
    return sums / merge.sizes().unsqueeze(-1).to(x.dtype)


def index_add(merge: MergeMap, x: Tensor) -> Tensor:
    """What the TomeFormer does on a CPU: by rows of all pictures at once."""
    return merge.sums_by_index(x) / merge.sizes().unsqueeze(-1).to(x.dtype)


WAYS = {"product": product, "scatter_add": scatter, "index_add": index_add}


def example(tokens: int, batch: int, width: int, dtype: torch.dtype, device) -> tuple[MergeMap, Tensor]:
    """A map that merges the paper's share of the tokens (19 of 257), and tokens (B, T, D) to be merged by it."""
    generator = torch.Generator().manual_seed(tokens)
    keys = torch.randn(batch, tokens, 64, generator=generator).to(device)
    x = torch.randn(batch, tokens, width, generator=generator).to(device, dtype)
    return match(keys, round(tokens * 19 / 257)), x


def largest_error(way, merge: MergeMap, x: Tensor) -> float:
    """The largest distance from the mean in float64."""
    return (way(merge, x).double() - scatter(merge, x.double())).abs().max().item()


def forward_backward(way, merge: MergeMap, x: Tensor):
    """One call of both passes; x gets no .grad that would be added to."""
    leaf = x.detach().requires_grad_()
    backward_of(way(merge, leaf))


def measure(tokens: int, dtype: str, args) -> list[dict]:
    """Two rows, forward and forward+backward, of one length and precision."""
    device = torch.device(args.device)
    merge, x = example(tokens, args.batch, args.width, DTYPES[dtype], device)
    forward = {name: lambda way=way: way(merge, x) for name, way in WAYS.items()}
    both = {name: lambda way=way: forward_backward(way, merge, x) for name, way in WAYS.items()}
    same = {"tokens": tokens, "slots": merge.num_slots, "dtype": dtype}
    errors = {name: largest_error(way, merge, x) for name, way in WAYS.items()}
    rows = []
    for passes, calls in (("forward", forward), ("forward+backward", both)):
        times = alternate(calls, device, args.repetitions, args.seconds)
        rows.append({**same, "passes": passes, "seconds": times, "largest_error": errors})
        print(tokens, dtype, passes, {name: f"{1e3 * t['median']:.3f} ms" for name, t in times.items()}, flush=True)
    return rows


def main():
    args_of = parser(__doc__, repetitions=15, seconds=5)
    args_of.add_argument("--batch", type=int, default=8, help="pictures (8)")
    args_of.add_argument("--width", type=int, default=768, help="of a token (768)")
    args_of.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="before merging")
    args = args_of.parse_args()
    rows = [row for t, dtype in itertools.product(args.tokens, DTYPES) for row in measure(t, dtype, args)]
    write("merge", args, rows)


if __name__ == "__main__":
    main()
