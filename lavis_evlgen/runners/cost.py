"""What training costs, counted: operations of a real step, so that what is frozen counts as it runs."""

from __future__ import annotations

from torch.utils.flop_counter import FlopCounterMode


def count_flops(call, *args):
    """(what `call(*args)` returns, its floating-point operations on this rank; a multiply-add is two).

    Counts matrix products, convolutions and attention, forward and backward, as torch's FlopCounterMode does.
    """
    with FlopCounterMode(display=False) as counter:
        result = call(*args)
    return result, counter.get_total_flops()
