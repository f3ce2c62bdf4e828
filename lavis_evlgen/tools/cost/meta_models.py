"""Models of tensors that have a shape and no numbers: all code runs, nothing is computed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def without_weights(model: nn.Module, dtype: torch.dtype | None = None):
    """In a FakeTensorMode: everything on the meta device becomes a fake CPU tensor, of `dtype` (default: its own)."""
    made: dict[int, nn.Parameter] = {}  # a weight that two modules share stays one
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                if id(value) not in made:
                    fake = torch.empty(value.shape, dtype=dtype or value.dtype, device="cpu")
                    made[id(value)] = nn.Parameter(fake, requires_grad=value.requires_grad)
                module._parameters[name] = made[id(value)]
        for name, value in module._buffers.items():
            if value is not None and value.is_meta:
                module._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device="cpu")


class NothingIsPadded(TorchFunctionMode):
    """Language models look whether their mask is all ones, which fake tensors cannot tell: here it is."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return True if func in (torch.all, torch.Tensor.all) else func(*args, **(kwargs or {}))


def backward(output: Tensor, grad: Tensor):
    """output.backward(grad) that stays in the modes it is called in, as blocks that are computed again need them."""
    engine = torch.autograd.Variable._execution_engine  # every other way to it leaves the modes of torch functions
    engine.run_backward((output,), (grad,), False, False, (), allow_unreachable=True, accumulate_grad=True)
