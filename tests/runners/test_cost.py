import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lavis_evlgen.runners.cost import flops_per_image
from lavis_evlgen.runners.step import TrainingStep
from tests.tiny import pictures, tiny_evlgen


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen, self.trained = nn.Linear(8, 16).requires_grad_(False), nn.Linear(16, 4)

    def forward(self, samples):
        return {"loss": self.trained(self.frozen(samples["image"])).sum()}


def step_of(model) -> TrainingStep:
    trains = [p for p in model.parameters() if p.requires_grad]
    return TrainingStep(model, torch.optim.AdamW(trains), torch.device("cpu"), {})


def test_operations_are_those_on_paper():
    forward = 2 * (8 * 16 + 16 * 4)
    backward = 2 * 16 * 4  # the trained weight's gradient; what is frozen needs none
    assert flops_per_image(step_of(TwoLayers()), {"image": torch.randn(5, 8)}) == forward + backward


@pytest.mark.parametrize("connector", [{"dropout": 0.5, "partition": "random"}])
def test_counting_leaves_no_trace(connector, tmp_path):
    model = tiny_evlgen(connector=connector)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    batch = {"image": pictures(2), "text_input": ["a red square", "a dog"]}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        assert flops_per_image(step_of(DistributedDataParallel(model)), batch) > 1e5
    finally:
        dist.destroy_process_group()
    assert torch.equal(torch.get_rng_state(), generator) and set(batch) == {"image", "text_input"}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
