"""`run.llm_grad_checkpoint`: the same gradients with less in memory, at the price of a second forward pass."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lavis_evlgen.config import ConfigError
from lavis_evlgen.models.activation_checkpointing import recompute_llm
from lavis_evlgen.tools.cost.step_memory import Alive
from tests.run_tools import losses
from tests.tiny import pictures, tiny_evlgen

SAMPLES = {"image": pictures(4), "text_input": ["a red square", "a blue circle", "a", "two green triangles"]}


def passes(model) -> tuple[dict[str, torch.Tensor], int, int]:
    """Gradients, bytes held between the forward and the backward pass beside the weights, and FLOPs of both."""
    model.zero_grad(set_to_none=True)
    with Alive() as alive:
        for value in (*model.parameters(), *model.buffers()):
            alive.add(value)
        before = alive.now
        loss = model(SAMPLES)["loss"]
        held = alive.now - before
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with FlopCounterMode(display=False) as counter:
        model(SAMPLES)["loss"].backward()
    return grads, held, counter.get_total_flops()


@pytest.mark.parametrize("llm", ["llama", "opt"])
def test_gradients_are_the_same_and_activations_are_not_kept(llm):
    model = tiny_evlgen(llm)
    body = model.language_model.llm.base_model
    layers = getattr(body, "decoder", body).layers
    layers.extend(copy.deepcopy(layers[0]) for _ in range(8))
    body.config.num_hidden_layers = len(layers)
    names = list(model.state_dict())
    plain, held, flops = passes(model)
    recompute_llm(model, True)
    again, less, more = passes(model)
    assert list(model.state_dict()) == names and plain.keys() == again.keys()
    for name in plain:
        assert torch.equal(plain[name], again[name]), name
    assert less < 0.5 * held and more > 1.1 * flops, (less, held, more, flops)


def test_a_deep_copy_has_its_own_blocks():
    model = tiny_evlgen()
    recompute_llm(model, True)
    loss, other = model(SAMPLES)["loss"].item(), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            parameter.zero_()
    assert other(SAMPLES)["loss"].item() == pytest.approx(loss) and model(SAMPLES)["loss"].item() != loss


def test_generation_is_what_it_was():
    model, text = tiny_evlgen(), {"max_length": 6, "num_beams": 2}
    before = model.generate({"image": SAMPLES["image"]}, **text)
    recompute_llm(model, True)
    assert model.generate({"image": SAMPLES["image"]}, **text) == before


def test_a_run(runs):
    runs.train("run.run_name=plain")
    runs.train("run.run_name=less", "run.llm_grad_checkpoint=true")
    assert losses(runs.output("plain")) == losses(runs.output("less"))
    with pytest.raises(ConfigError, match="run.llm_grad_checkpoint: 'llm' is not true or false"):
        runs.train("run.run_name=bad", "run.llm_grad_checkpoint=llm")
    with pytest.raises(ConfigError, match="Linear has no language model"):
        recompute_llm(nn.Linear(1, 1), True)
