import torch
from torch import nn

from lavis_evlgen.runners.cost import count_flops


def test_operations_of_a_step_are_those_on_paper():
    frozen, trained = nn.Linear(8, 16).requires_grad_(False), nn.Linear(16, 4)
    x = torch.randn(5, 8)

    def step(inputs):
        trained(frozen(inputs)).sum().backward()
        return "done"

    outcome, flops = count_flops(step, x)
    forward = 2 * 5 * (8 * 16 + 16 * 4)
    backward = 2 * 5 * 16 * 4  # the trained weight's gradient; what is frozen needs none
    assert (outcome, flops) == ("done", forward + backward)
