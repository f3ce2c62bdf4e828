"""`run.compile`: compiled steps equal plain ones; what is not training runs as it is written."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from lavis_evlgen.config import ConfigError
from lavis_evlgen.models.compile import PARTS, check_parts, compile_parts, eager, stack_of
from tests.run_tools import losses
from tests.tiny import (
    clips,
    pictures,
    tiny_eva,
    tiny_evlgen,
    tiny_evlgen_video,
    tiny_lavis_clip,
    tiny_lavis_vision,
    tiny_vision,
)


@pytest.fixture
def counter(monkeypatch):
    """A compiler that runs what it is given and counts it, in place of torch's own, which takes a minute."""
    counter = CompileCounter()
    compiler = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, **how: compiler(module, backend=counter, **how))
    torch._dynamo.reset()
    return counter


def test_names_of_parts():
    assert check_parts(None) == check_parts(False) == check_parts([]) == []
    assert check_parts(True) == ["vision", "connector", "llm"]
    assert check_parts(["llm", "vision", "llm"]) == ["llm", "vision"] and check_parts("vision") == ["vision"]
    with pytest.raises(ConfigError, match="run.compile: 'vit' is not one of vision, connector, llm; true is all"):
        check_parts(["vision", "vit"])
    with pytest.raises(ConfigError, match="run.compile: 1 is not one of vision"):
        check_parts(1)
    with pytest.raises(ConfigError, match="run.compile: Linear has no connector; leave connector out"):
        compile_parts(nn.Linear(1, 1), ["connector"])


def test_regions_are_the_blocks_of_the_largest_stack():
    blocks = [nn.Linear(2, 2) for _ in range(3)]
    model = nn.ModuleDict({"small": nn.ModuleList([nn.Linear(1, 1)] * 4), "blocks": nn.ModuleList(blocks)})
    assert stack_of(model) == blocks
    lone = nn.Linear(2, 2)
    assert stack_of(lone) == [lone]


def test_a_compiled_run_equals_a_plain_one(runs, counter):
    runs.config["run"] |= {"valid_splits": ["val"], "max_iters": 3, "iters_per_inner_epoch": 3}
    runs.train("run.run_name=plain")
    assert counter.frame_count == 0
    runner = runs.train("run.run_name=compiled", "run.compile=true")
    assert counter.frame_count >= len(PARTS) and runner.compiled == list(PARTS)
    plain, compiled = losses(runs.output("plain")), losses(runs.output("compiled"))
    assert list(compiled) == [1, 2, 3] and compiled == pytest.approx(plain, rel=1e-5)


def grads(model, samples) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model(samples)["loss"].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_each_budget_of_an_elastic_model_is_compiled_once(counter, monkeypatch):
    """More of them than the eight shapes that torch compiles for one function unless it is told."""
    from torch._dynamo import config

    monkeypatch.setattr(config, "cache_size_limit", 8)
    samples, budgets = {"image": pictures(2), "text_input": ["a red square", "a dog"]}, list(range(5, 15))
    plain, compiled = (tiny_evlgen(connector={"tome_r": {"elastic": budgets}}) for _ in range(2))
    compile_parts(compiled, ["connector"])
    for _ in range(2):
        for budget in budgets:
            drawn = samples | {"budgets": (budget,)}
            assert compiled(drawn)["loss"].item() == pytest.approx(plain(drawn)["loss"].item(), rel=1e-5)
    assert counter.frame_count == len(budgets)


@pytest.mark.parametrize("vision", ["hidden layer", "eva", "LAVIS's CLIP", "frames", "ordered frames", "all options"])
def test_every_kind_of_encoder_compiles_to_the_same_gradients(vision, counter):
    samples = {"image": pictures(2), "text_input": ["a red square", "a blue circle"]}
    if vision == "hidden layer":
        model = tiny_evlgen(vision=tiny_vision(layer=1))
    elif vision == "all options":  # of the connector
        model = tiny_evlgen(connector={"merge_at": "input", "readout": "group", "skip": "pooled"})
    elif "frames" in vision:  # trainable modules between the frozen blocks
        model = tiny_evlgen_video(alpha=0.5, positions=vision == "ordered frames")
        samples["image"] = clips(2)
    else:
        model = tiny_evlgen(vision=tiny_lavis_vision(tiny_eva if vision == "eva" else tiny_lavis_clip))
    plain = grads(model, samples)
    model.zero_grad(set_to_none=True)
    names = list(model.state_dict())
    compile_parts(model, list(PARTS))
    compiled = grads(model, samples)
    assert counter.frame_count > 0 and list(model.state_dict()) == names
    assert plain.keys() == compiled.keys()
    for name in plain:
        torch.testing.assert_close(compiled[name], plain[name], rtol=1e-4, atol=1e-5, msg=name)


def test_captions_of_many_lengths_are_few_shapes(counter):
    """The language model's sequences are multiples of 8 tokens: one compilation for each, and the same loss."""
    model = tiny_evlgen()
    words = "red blue green square circle star on a dark floor beside it".split()
    batches = [{"image": pictures(2), "text_input": ["a", " ".join(words[:n])]} for n in range(1, len(words) + 1)]
    seen = []
    model.language_model.llm.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    plain = [model(batch)["loss"].item() for batch in batches]
    lengths = set(seen)
    assert len(lengths) > 8  # more than torch would compile
    seen.clear()
    compile_parts(model, ["llm"])
    compiled = [model(batch)["loss"].item() for batch in batches]
    assert compiled == pytest.approx(plain, rel=1e-5)
    assert set(seen) == {-(-length // 8) * 8 for length in lengths} and counter.frame_count == len(set(seen))
    seen.clear()
    model.eval()
    with eager():
        model(batches[0])
    assert set(seen) == {min(lengths)}  # an evaluation pays for no padding


def test_long_captions_are_few_shapes_too():
    for longest, multiple in ((32, 8), (48, 8), (64, 16), (128, 24), (512, 88)):
        module = tiny_evlgen(max_txt_len=longest)
        compile_parts(module, ["llm"])
        assert module.language_model.length_multiple == multiple and longest / multiple <= 6


def test_what_is_not_training_is_not_compiled(counter):
    model = tiny_evlgen()
    compile_parts(model, list(PARTS))
    image = torch.randn(2, 3, 28, 28)
    with eager():
        model({"image": image, "text_input": ["a red square"] * 2})
        model.generate({"image": image}, max_length=4)
    assert counter.frame_count == 0
    model.language_model.generate(torch.randn(1, 2, model.language_model.width), [""], max_new_tokens=3)
    assert counter.frame_count == 0
    learns = tiny_evlgen(llm_train="full").eval()
    compile_parts(learns, ["llm"])
    learns.text_loss()  # at a run's start: its long windows would take up the few shapes that torch compiles
    assert counter.frame_count == 0
    model({"image": image, "text_input": ["a red square"] * 2})
    assert counter.frame_count > 0


def test_those_who_leave_eager_in_another_order_leave_nothing_behind(counter):
    model = nn.Linear(2, 2)
    model.compile()
    first, second = eager(), eager()
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    model(torch.zeros(1, 2))
    assert counter.frame_count == 0  # the second is still inside
    second.__exit__(None, None, None)
    model(torch.zeros(1, 2))
    assert counter.frame_count == 1


def test_pictures_that_keep_numbers_of_tokens_of_their_own(counter):
    """Shapes do not depend on them: one compilation; thresholds follow as they do without."""
    plain, compiled = (tiny_evlgen(connector={"tome_r": {"average": 9, "least": 6, "most": 13}}) for _ in range(2))
    compile_parts(compiled, ["connector"])
    frames = []
    for seed in range(3):
        samples = {"image": pictures(4, seed), "text_input": ["a dog"] * 4}
        assert compiled(samples)["loss"].item() == pytest.approx(plain(samples)["loss"].item(), rel=1e-5)
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1] >= 1
    expected, found = (model.connector.tomeformer.thresholds for model in (plain, compiled))
    torch.testing.assert_close(found, expected)
