"""The benchmark scripts: what they compare is the same thing, and docs/performance.md shows what they measured."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks.common import performance_page as page
from benchmarks.common import performance_tables as tables
from benchmarks.common import random_models as models
from benchmarks.common import timing
from benchmarks.speed import (
    blip2_step,
    cached_features,
    caption_many,
    connector,
    data,
    generate,
    lengths,
    merge,
    packing,
    roofline,
    scaling,
    step,
)
from lavis_evlgen.tools.cost.macs import evlgen_cost

SIZES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.fixture
def card_of(tmp_path, monkeypatch):
    """Runs a script with these words; what it wrote into tmp_path/NAME-cpu.json."""

    def run(script, words: str) -> dict:
        out = tmp_path / f"{script.__name__.rpartition('.')[2]}-cpu.json"
        monkeypatch.setattr(sys, "argv", ["benchmark", *words.split(), "--out", str(out)])
        script.main()
        return json.loads(out.read_text())

    return run


def test_alternating_times_every_call_as_often():
    made, device = [], torch.device("cpu")
    calls = {name: lambda name=name: made.append(name) for name in "abc"}
    found = timing.alternate(calls, device, repetitions=4, least=0)
    assert made[6:] == list("abc" "bca" "cab" "abc")
    assert {time["repetitions"] for time in found.values()} == {4}
    assert timing.alternate(calls, device, repetitions=9, seconds=0, least=0)["a"]["repetitions"] == 3
    assert timing.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.5, "high": 2.5, "repetitions": 3}


def test_merges_compared_are_the_same_merge():
    for dtype, atol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        which, x = merge.example(33, batch=2, width=8, dtype=dtype, device="cpu")
        assert which.num_slots < 33
        gradients, means = [], []
        for way in merge.WAYS.values():
            leaf = x.clone().requires_grad_()
            means.append(way(which, leaf))
            (means[-1] ** 2).sum().backward()
            gradients.append(leaf.grad)
        for other in (1, 2):
            assert torch.allclose(means[0], means[other], atol=atol, rtol=0)
            assert torch.allclose(gradients[0], gradients[other], atol=10 * atol, rtol=0)
    assert merge.largest_error(merge.product, which, x) < 1e-6


def test_connectors_compared_have_the_same_shapes():
    torch.manual_seed(0)
    models = connector.connectors(24, 33, 9, SIZES, layers=(4, 2))
    visual = torch.randn(2, 33, 24)
    shapes = {name: model.eval()(visual) for name, model in models.items()}
    stage1 = shapes.pop("Q-Former, stage 1 (LAVIS)")
    assert [tuple(out.shape) for out in shapes.values()] == [(2, 9, 32), (2, 9, 32), (2, 32, 32), (2, 32, 32)]
    assert [out.shape[0] for out in stage1] == [2, 2, 6, 2] and stage1[-1].shape == (2, 32, 30523)
    costs = {name: connector.macs(model, visual) for name, model in models.items()}
    lavis, theirs = (costs[f"Q-Former, stage 2 ({who})"] for who in ("LAVIS", "Hugging Face"))
    assert lavis == theirs  # two implementations of one architecture


def test_a_benchmark_from_start_to_page(card_of, tmp_path):
    card = card_of(merge, "--device cpu --repetitions 1 --batch 1 --width 4 --tokens 17")
    assert {"versions", "commit", "hardware", "date", "machine", "settings"} <= set(card)
    assert len(card["rows"]) == 4  # two precisions, forward and both passes
    text = page.section("merge", tmp_path)
    assert text.startswith(page.NO_GPU) and "17 -> 16" in text and "forward+backward" in text
    card["machine"]["device"], card["hardware"]["gpu"] = "cuda", "Some GPU"
    (tmp_path / "merge-some-gpu.json").write_text(json.dumps(card))
    text = page.section("merge", tmp_path)
    assert page.NO_GPU not in text and text.startswith("**Some GPU**")


def test_pictures_a_second_of_both_sides(card_of, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SIZE", 32)
    card = card_of(data, "--repetitions 1 --batch 2 --pictures 2 --sizes 160x128")
    assert [row["kind"] for row in card["rows"]] == ["files", "shards"]
    for row in card["rows"]:
        assert sorted(name.startswith("LAVIS") for name in row["seconds"]) == [False, False, True, True]
    assert "160 x 128" in page.section("data", tmp_path)


@pytest.fixture
def tiny():
    """(model, TrainingStep, batch) without dropout."""
    device = torch.device("cpu")
    model = models.build(models.scales()["tiny"], "fp32", device).eval()
    training = step.TrainingStep(model, step.adamw(model, 1e-3, 0.05, 0.999), device, {"max_grad_norm": 0})
    return model, training, models.samples(models.scales()["tiny"], 3, device)


def gradients(model) -> dict:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_phases_are_the_step(tiny, monkeypatch):
    model, training, batch = tiny
    model(batch)["loss"].backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    found = {}
    monkeypatch.setattr(training, "_update", lambda: found.update(gradients(model)))
    seconds = step.in_phases(model, training, batch)
    assert tuple(seconds) == tables.PHASES
    assert expected.keys() == found.keys() and expected
    for name in expected:
        assert torch.allclose(found[name], expected[name], atol=1e-6), name


def test_savings_undone_change_no_loss_and_are_redone(tiny):
    model, _, batch = tiny
    loss = model(batch)["loss"]
    for name, undo in (step.UNDONE | step.TRADED).items():
        with undo(model):
            other = model(batch)["loss"]
            assert torch.allclose(other, loss, atol=1e-5), name
            other.backward()
            paid = any(p.grad is not None for part in (model.visual_encoder, model.language_model) for p in
                       part.parameters())  # fmt: skip
            assert paid == (name.endswith("-grad") or name == "everything")
        frozen = [*model.visual_encoder.parameters(), *model.language_model.parameters()]
        assert not any(p.requires_grad or p.grad is not None for p in frozen)
        model.zero_grad(set_to_none=True)
    model(batch)["loss"].backward()
    assert "forward" not in vars(model.visual_encoder)


def test_a_step_measured(card_of, tmp_path):
    card = card_of(step, "--device cpu --scale tiny --batch 2 --dtype fp32 --repetitions 1 --seconds 1")
    row = card["rows"][0]
    assert set(row["seconds"]) == {"whole", *step.UNDONE, *step.TRADED} == set(row["memory_gb"])
    assert row["memory_gb"]["grad-checkpoint"] < row["memory_gb"]["whole"] < row["memory_gb"]["everything"]
    rows = row["head_and_loss"]["rows_of_logits"]
    assert rows["supervised"] < rows["full"]
    assert row["flops_per_image"] > 0 and row["mfu"] is None
    flops = row["flops"]
    differences = row["loss_differences"]
    assert set(differences) == set(row["seconds"]) - {"whole"} and max(differences.values()) < 1e-5
    assert set(flops) == set(row["seconds"]) and flops["whole"] == 2 * row["flops_per_image"]
    assert min(flops["full-logits"], flops["vit-grad"], flops["llm-grad"]) > flops["whole"]
    text = page.section("step", tmp_path)
    assert "`tiny`" in text and "`--full-logits`" in text and "Head and loss alone" in text


def test_a_compiled_step_against_the_same_without(card_of, tmp_path, monkeypatch):
    compiler, compiled = torch.nn.Module.compile, []

    def plain(module, **how):
        compiled.append(type(module).__name__)
        compiler(module, backend="eager", **how)

    monkeypatch.setattr(torch.nn.Module, "compile", plain)
    options = "--device cpu --scale tiny --batch 2 --dtype fp32 --repetitions 1 --seconds 1"
    card = card_of(step, f"{options} --compile vision connector")
    row = card["rows"][0]
    assert compiled[-1] == "TomeFormerConnector" and len(set(compiled)) == 2
    assert set(row["seconds"]) == {"whole", "compile"} and row["flops"]["whole"] == row["flops"]["compile"] > 0
    text = page.section("step", tmp_path)
    assert "compiled: vision and connector" in text and "| `--compile` | 1.00x |" in text


def test_lengths_padded_against_one_compilation_for_any(card_of, tmp_path, monkeypatch):
    compiler, how = torch.nn.Module.compile, []

    def plain(module, dynamic):
        how.append(dynamic)
        compiler(module, backend="eager", dynamic=dynamic)

    monkeypatch.setattr(torch.nn.Module, "compile", plain)
    options = "--device cpu --scale tiny --batch 2 --dtype fp32 --repetitions 1 --seconds 1 --tokens 4 11"
    padded, free = card_of(lengths, options)["rows"]
    assert how == [False, False, True, True]  # two blocks
    # 9 visual tokens, 4 to 11 of text and its end: 8 lengths in 2 multiples of 8
    assert padded["steps"] == 8 and padded["graphs"] in (2, 3) and 1 <= free["graphs"] < 4
    assert padded["flops"]["compiled"] > padded["flops"]["not compiled"] == free["flops"]["not compiled"]
    assert free["flops"]["compiled"] == free["flops"]["not compiled"]
    assert max(row["loss_difference"] for row in (padded, free)) < 1e-5
    text = page.section("lengths", tmp_path)
    assert "captions of 4 to 11 tokens" in text and "| one compilation for any length |" in text


def test_texts_that_share_a_prompt_against_a_prompt_for_each(card_of, tmp_path):
    options = "--device cpu --scale tiny --batch 2 --dtype fp32 --repetitions 1 --seconds 1 --texts 1 3 --samples 2"
    one, three, scst = card_of(packing, f"{options} --tokens 3")["rows"]
    assert (one["texts"], three["texts"], one["loss_difference"]) == (1, 3, 0) and three["loss_difference"] < 1e-5
    assert set(one["phases"]) == set(three["phases"]) == set(tables.PHASES)
    ways = {f"{name}, {way}" for name in ("step", "drawing") for way in tables.SCST_PROMPTS}
    assert set(scst["seconds"]) == ways and scst["same_draws"] == 1
    text = page.section("packing", tmp_path)
    assert "2 captions of 3 tokens drawn" in text and "| 3 |" in text and "| drawing |" in text


@torch.no_grad()
def test_captions_with_a_prompt_for_each_are_compared_with_what_training_does():
    """Either way is the same captions; with prompts of their own the language model reads each of them."""
    model, reads = models.build(models.scales()["tiny"], "fp32", torch.device("cpu")), []
    batch = models.samples(models.scales()["tiny"], 2, torch.device("cpu"))
    prompt = model.visual_prompt(batch["image"])
    model.check_packing()  # tried once, which reads too

    def draw():
        reads.clear()
        rows = model.sample(prompt, batch, seeds=[1, 2], num_samples=3, max_new_tokens=2)
        return rows, model.log_probs_of(prompt, batch, rows)[0], [tuple(shape[:2]) for shape in reads]

    blocks = model.language_model.llm.model.layers
    blocks[0].register_forward_hook(lambda module, args, output: reads.append(args[0].shape))
    rows, shared, read = draw()
    with packing.own_prompts(model):
        again, own, read_own = draw()
    assert rows == again and torch.allclose(shared, own, atol=1e-4)
    assert [batch for batch, _ in read] == [2, 6, 2] and [batch for batch, _ in read_own] == [6, 6, 6]


def test_steps_of_blip2_beside_evlgens(card_of, tmp_path):
    names = {"EVLGen", "BLIP-2, stage 2", "BLIP-2, stage 1"}
    (row,) = card_of(blip2_step, "--device cpu --scale tiny --batch 2 --dtype fp32 --repetitions 1")["rows"]
    assert set(row["seconds"]) == set(row["trains"]) == names and row["memory_gb"] == dict.fromkeys(names)
    assert row["trains"]["BLIP-2, stage 1"] > row["trains"]["BLIP-2, stage 2"] > 0  # words, heads of three losses
    (tmp_path / "blip2_step-cpu.json").rename(tmp_path / "blip2-tiny-cpu.json")
    assert "| BLIP-2, stage 1 |" in page.section("blip2", tmp_path)


def test_a_step_from_stored_tokens_beside_one_with_the_vit(card_of, tmp_path):
    (row,) = card_of(cached_features, "--device cpu --scale tiny --batch 2 --dtype fp32 --repetitions 1")["rows"]
    assert set(row["seconds"]) == {*cached_features.WAYS, "reading tokens"}
    with_vit, cached = (row["flops"][name] for name in cached_features.WAYS)
    assert 0 < cached < with_vit and row["bytes_a_picture"] == 17 * 24 * 4
    (tmp_path / "cached_features-cpu.json").rename(tmp_path / "cached_features-tiny-cpu.json")
    assert "| cached features |" in page.section("cached_features", tmp_path)


def test_the_cached_step_is_the_same_step(tiny, tmp_path):
    model, step, batch = tiny
    model.eval()
    features = cached_features.stored(tmp_path, model, step, batch, torch.float32)
    own = next(cached_features.from_store(features, batch))
    assert model(own)["loss"] == model(batch)["loss"]


def test_blip2_stages_compared_share_what_is_frozen():
    scale = models.scales()["tiny"]
    found = blip2_step.models(scale, "fp32", torch.device("cpu"))
    evlgen, stage2, stage1 = found.values()
    assert evlgen.visual_encoder is stage2.visual_encoder is stage1.visual_encoder
    assert evlgen.language_model is stage2.language_model
    bert = stage1.Qformer.bert.config
    assert (bert.hidden_size, bert.num_hidden_layers) == (16, 2)
    assert stage2.connector.width == evlgen.connector.width == 16
    for model in found.values():
        assert not any(p.requires_grad for p in model.visual_encoder.parameters())


def test_the_floor_counts_what_macs_counts(tmp_path):
    scale, text = models.scales()["tiny"], 9
    found = roofline.parts_of(models.build(scale, "bf16", torch.device("meta")), 3, 28, text)
    assert tuple(found) == tables.PHASES
    assert all(0 < part["products"] <= part["all"] for part in found.values())
    cost = evlgen_cost(models.build(scale, "fp32", torch.device("meta")).eval(), 28, text)
    forward = {part.name: 2 * 3 * part.macs for part in cost.parts}
    assert found["vision encoder"]["flops"] == forward.pop("vision encoder")
    # rotary angles are computed once a batch
    assert found["language model, forward"]["flops"] == pytest.approx(forward.pop("language model"), rel=1e-3)
    assert found["head and loss, both passes"]["flops"] == 2 * forward.pop("head")
    assert found["connector, forward"]["flops"] == sum(forward.values())
    whole, step = sum(part["flops"] for part in found.values()), 3 * cost.step_flops
    assert whole == pytest.approx(step, rel=0.05) and whole >= step  # fused attention computes one product again
    (tmp_path / "floor.json").write_text(
        json.dumps({"gpu": "x", "peak": 1e12, "bandwidth": 1e9, "rows": [
            {"scale": "tiny", "batch": 3, "text": text, "parts": found}]})
    )  # fmt: skip
    assert "`tiny`, batch 3, 9 tokens of text" in page.section("floor", tmp_path)
    assert page.section("floor", tmp_path / "none") == "Not counted yet."


def test_a_step_on_data_that_is_read(tiny):
    _, training, _ = tiny
    args = SimpleNamespace(workers=0, batch=2, device="cpu", repetitions=1)
    found = step.with_data(training, args, SimpleNamespace(image_size=28))
    assert 0 < found["waited"] < found["seconds"]


def test_a_step_against_its_sizes(card_of, tmp_path):
    card = card_of(scaling, "--scale tiny --batch 2 --dtype fp32 --repetitions 1 --seconds 1 --device cpu")
    rows = {axis: [row for row in card["rows"] if row["axis"] == axis] for axis in tables.AXES}
    assert [row["value"] for row in rows["batch"]] == [1, 2, 4, 8]
    assert [row["value"] for row in rows["tokens_left"]] == [6, 8, 17]
    assert [row["frames"] for row in rows["frames"]] == [1, 4, 8, 16]
    for axis in ("text", "tokens_left", "frames"):
        flops, memory = ([row[key] for row in rows[axis]] for key in ("flops", "working_gb"))
        assert flops == sorted(flops) and len(set(flops)) == len(flops) and memory == sorted(memory)
    of_one_picture = [row["flops"] for row in rows["batch"]]
    assert max(of_one_picture) == pytest.approx(min(of_one_picture), rel=1e-3)
    assert "frames of a clip | 16 |" in page.section("scaling", tmp_path)


def test_captions_a_second(card_of, tmp_path):
    card = card_of(generate, "--device cpu --scale tiny --batch 1 2 --tokens 4 --repetitions 1 --seconds 1")
    for row, size in zip(card["rows"], (1, 2), strict=True):
        for name, rate in row["captions_per_s"].items():
            assert row["seconds"][name]["median"] * rate == pytest.approx(size)
            assert row["seconds"][name]["median"] > row["seconds"]["visual prompt"]["median"]
    assert "`tiny`, bf16, 4 new tokens each" in page.section("generate", tmp_path)


def test_pictures_in_batches_and_one_by_one(card_of, tmp_path):
    words = "--device cpu --scale tiny --dtype fp32 --pictures 5 --different 3 --size 64x48 --batch 2 4 --workers 0"
    card = card_of(caption_many, f"{words} --tokens 4 --beams 2 --repetitions 2")
    assert [row["batch"] for row in card["rows"]] == [2, 4]
    for row in card["rows"]:
        assert row["same"] == row["pictures"] == 5 and set(row["seconds"]) == set(caption_many.WAYS)
        for way, rate in row["pictures_per_s"].items():
            assert row["seconds"][way]["median"] * rate == pytest.approx(5) and row["seconds"][way]["repetitions"] == 2
    assert "`tiny`, fp32, 4 new tokens each, 2 beams." in page.section("caption_many", tmp_path)


def test_every_caption_timed_has_the_same_length(tiny, monkeypatch):
    model, _, batch = tiny
    llm, shapes = model.language_model.llm, []
    says = llm.generate

    def spy(*args, **kwargs):
        ids = says(*args, **kwargs)
        shapes.append(tuple(ids.shape))
        return ids

    monkeypatch.setattr(llm, "generate", spy)
    calls = generate.calls_of(model, batch, 5)
    for name in generate.SEARCHES:
        calls[name]()
    assert shapes == [(3, 5)] * 2


def test_full_size_models_are_the_papers():
    for name, parameters in (("opt-2.7b", 2.65e9), ("vicuna-7b", 6.74e9)):
        scale = models.scales()[name]
        with torch.device("meta"):
            llm = models.AutoModelForCausalLM.from_config(scale.llm)
        assert sum(p.numel() for p in llm.parameters()) == pytest.approx(parameters, rel=0.01)
    encoder = models.tokenizer()
    assert len(encoder("a" * 13, add_special_tokens=False).input_ids) == 13


def test_the_page_is_what_the_results_make_it():
    assert page.PAGE.read_text() == page.filled(page.PAGE.read_text()), "python -m benchmarks.common.performance_page"
    with pytest.raises(ValueError, match="no place for"):
        page.filled("# Performance")
