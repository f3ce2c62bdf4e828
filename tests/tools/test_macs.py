"""MACs and FLOPs against formulas on paper, against the paper's own, and against what a real model does."""

import copy
import functools
import json

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel

from lavis_evlgen.config import ConfigError
from lavis_evlgen.datasets.seeding import EpochOrder
from lavis_evlgen.models.blip2_stage1 import Blip2Stage1
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.models.vision import encoder
from lavis_evlgen.nn.merging import merge_schedule
from lavis_evlgen.runners.cost import flops_per_image
from lavis_evlgen.tools.cost import macs
from lavis_evlgen.tools.cost.macs import COLUMNS, amount, cost_of, table_rows
from lavis_evlgen.tools.cost.texts import ONE, Texts
from lavis_evlgen.weights.bundle import empty_model
from tests.models.test_full_size import LLMS
from tests.run_tools import ROOT
from tests.runners.test_cost import step_of
from tests.test_cli import evlgen
from tests.tiny import pictures

WIDTH, HIDDEN = 768, 3072
LAYER_ATTENTION, LAYER_MLP = 4 * WIDTH**2, 2 * WIDTH * HIDDEN


@pytest.fixture(scope="module", autouse=True)
def each_vit_once():
    """A ViT of a billion empty numbers is drawn once; each test has a copy."""
    with pytest.MonkeyPatch.context() as patch:
        built = functools.cache(encoder.build_empty)
        patch.setattr(encoder, "build_empty", lambda *args: copy.deepcopy(built(*args)))
        yield


@pytest.fixture
def shallow(monkeypatch):
    """Of the ViT a connector's test needs the width and the tokens: one block will do."""
    built = encoder.build_empty

    def one_block(*args):
        vit = built(*args)
        del vit.blocks[1:]
        return vit

    monkeypatch.setattr(encoder, "build_empty", one_block)


def full_size(texts=ONE, text_tokens=None, **changes):
    section = OmegaConf.load(EVLGen.default_config_path("opt2.7b")).model
    return cost_of(section | changes, text_tokens, texts=texts)


def part(cost, name):
    return next(part for part in cost.parts if part.name == name)


def tomeformer(schedule, tokens=257) -> int:
    """Linear layers of a TomeFormer of bert-base's width: attention before merging, MLP after it."""
    macs = 0
    for r in schedule:
        macs += tokens * LAYER_ATTENTION
        tokens -= r
        macs += tokens * LAYER_MLP
    return macs


@pytest.mark.parametrize(
    "layers, r, schedule, paper",
    [(12, 19, [19] * 12, "11.9G"), (6, 40, [40] * 5 + [28], "5.6G")],
)
def test_the_papers_tomeformers(shallow, layers, r, schedule, paper):
    """Table 6 counts the linear layers of the body alone; 5.6G is r = 40 where a layer can: `{target: 29}`."""
    cost = full_size(num_layers=layers, tome_r=r)
    body = part(cost, "connector")
    assert body.linear == tomeformer(schedule) and f"{body.linear / 1e9:.1f}G" == paper
    assert schedule == merge_schedule({"target": 29}, layers, 257)
    assert part(cost, "input_proj").linear == 257 * 1408 * WIDTH
    assert part(cost, "llm_proj").linear == 29 * WIDTH * 2560 and cost.prompt_tokens == 29


def test_all_parts_of_the_papers_model(capsys, monkeypatch):
    """By the README's own command: nothing of it has to be here."""
    costs = []
    monkeypatch.setattr(macs, "cost_of", lambda *args, **more: costs.append(cost_of(*args, **more)) or costs[0])
    assert evlgen("macs", ROOT / "projects" / "evlgen" / "opt.yaml") == 0
    assert "11.88G" in capsys.readouterr().out
    cost = costs[0]
    eva, hidden, depth = 1408, int(1408 * 4.3637), 39
    vit = part(cost, "vision encoder")
    assert vit.linear == 256 * 14 * 14 * 3 * eva + depth * 257 * (4 * eva**2 + 2 * eva * hidden)
    assert vit.products == depth * 2 * 257**2 * eva
    length = 29 + 32
    llm, head = part(cost, "language model"), part(cost, "head")
    assert llm.linear == 32 * length * (4 * 2560**2 + 2 * 2560 * 10240)
    assert llm.products == 32 * 2 * length**2 * 2560
    assert (head.macs, head.parameters) == (32 * 2560 * 50272, 0)  # 32: the BOS is a label too, as released; tied
    assert llm.parameters == LLMS["opt2.7b"][1]
    tokens = [257 - 19 * n for n in range(12)]
    attention = sum(2 * n**2 * WIDTH for n in tokens)
    keys = sum(tokens) * WIDTH * 64  # averaged over heads, in float32
    matching = sum(((n + 1) // 2) * (n // 2) * 64 for n in tokens) + keys
    assert part(cost, "connector").products == attention + matching
    trained = sum(part(cost, name).macs for name in ("ln_vision", "input_proj", "connector", "llm_proj"))
    assert cost.flops == 2 * vit.macs + 6 * trained + 4 * (llm.macs + head.macs)
    assert cost.flops == pytest.approx(cost.step_flops, rel=0.01)


def test_five_texts_of_a_picture_cost_it_once():
    """By hand: the language model runs over 29 + 5 x 20 positions in place of 5 x (29 + 20)."""
    one, five = (full_size(texts=Texts(count), text_tokens=20) for count in (1, 5))
    for name in ("vision encoder", "ln_vision", "input_proj", "connector", "llm_proj"):
        assert part(five, name) == part(one, name)
    llm, length = part(five, "language model"), 29 + 5 * 20
    assert llm.linear == 32 * length * (4 * 2560**2 + 2 * 2560 * 10240)
    assert llm.products == 32 * 2 * length**2 * 2560
    assert part(five, "head").macs == 5 * part(one, "head").macs
    assert five.flops == pytest.approx(five.step_flops, rel=0.01)
    assert five.step_flops / 5 / one.step_flops == pytest.approx(0.36, abs=0.005)  # docs/macs.md


@pytest.mark.parametrize(
    "changes, layout",
    [({}, (1, 1 + 5 * 11, 5 * 11)), ({"bos": "after"}, (1, 5 * 12, 5 * 11)),
     ({"bos": "after", "label_bos": True}, (1, 5 * 12, 5 * 12)), ({"own_rows": True}, (5, 12, 11))],
)  # fmt: skip
def test_where_texts_of_a_picture_lie(runs, changes, layout):
    """Of 12 tokens with BOS, which stands in front of the picture in the quickstart, once for all texts."""
    own_rows = changes.pop("own_rows", False)
    model = empty_model(EVLGen, OmegaConf.create(runs.config["model"] | {"bos": "before"} | changes))
    assert Texts(5, own_rows).layout(model, 12) == layout


@pytest.mark.parametrize("kind", ["causal", "visual"])
def test_it_counts_what_a_real_step_on_several_texts_does(runs, kind):
    section = runs.config["model"] | {"vit_precision": "fp32", "prompt": "a photo of", "prompt_attention": kind}
    model = EVLGen.from_config(OmegaConf.create(section)).eval()
    language, caption = model.language_model, "a red square and a blue circle"
    ids, _ = language.text.caption(model.prompt, caption, language.text_limit)
    cost = cost_of(OmegaConf.create(section), text_tokens=1 + len(ids), texts=Texts(3))
    batch = {"image": pictures(2), "text_input": [caption] * 6, "texts_per_image": [3, 3]}
    with sdpa_kernel(SDPBackend.MATH):
        flops_per_image(step_of(model), batch)  # asks whether the language model can
        real = flops_per_image(step_of(model), batch)
    assert cost.step_flops == real


def test_the_papers_q_former_in_stage_2(shallow):
    body = part(full_size(connector="qformer", num_query_token=32), "connector")
    assert body.linear == q_former() and f"{body.linear / 1e9:.2f}G" == "6.28G"


def test_a_stage_2_is_counted_before_there_is_a_stage_1(shallow, caplog):
    to_come = full_size(connector="qformer", num_query_token=32, connector_init="output/stage1/checkpoint_best.pth")
    assert part(to_come, "connector").linear == q_former()
    assert "output/stage1/checkpoint_best.pth does not exist yet; counted with the sizes of bert-base" in caplog.text


def q_former(queries=32, text=0) -> int:
    """Linear layers of a Q-Former on one picture (none without queries): every second layer reads the picture."""
    cross = 6 * (2 * queries * WIDTH**2 + 2 * 257 * 1408 * WIDTH) if queries else 0
    return 12 * (queries + text) * (LAYER_ATTENTION + LAYER_MLP) + cross


def test_the_papers_q_former_in_stage_1(shallow):
    """36.7G are the pictures, the matching (27.0G, which the paper names after the captions), the captions and their
    words; LAVIS's forward also reads the texts alone, for the contrast."""
    section = OmegaConf.load(Blip2Stage1.default_config_path("pretrain")).model
    cost = cost_of(section)
    linear = {part.name: part.linear for part in cost.parts}
    assert linear["pictures"] == q_former()
    assert linear["texts"] == linear["captioning"] == q_former(queries=0, text=32)
    assert linear["matching, 3 pairs"] == 3 * q_former(text=32)
    assert linear["word head"] == 32 * (WIDTH**2 + WIDTH * 30523)
    assert linear["contrast and matching heads"] == (32 + 1) * WIDTH * 256 + 3 * 32 * WIDTH * 2
    assert f"{linear['matching, 3 pairs'] / 1e9:.1f}G" == "27.0G"
    words = 32 * WIDTH * 30523
    named = sum(linear[name] for name in ("pictures", "matching, 3 pairs", "captioning")) + words
    assert f"{named / 1e9:.1f}G" == "36.7G"
    everything = sum(linear.values()) - linear["vision encoder"]
    assert f"{everything / 1e9:.1f}G" == "39.5G"
    assert cost.flops == pytest.approx(cost.step_flops, rel=0.02)


def test_a_body_behind_a_fold_runs_on_what_is_left():
    """The paper's body on 29 tokens: a sixth of its linear layers, and projections of 29 tokens; a readout of 257."""
    cost = full_size(num_layers=12, tome_r=19, merge_at="input", skip="pooled", readout="group")
    readout = 2 * 257 * 1408 * WIDTH + 2 * 29 * WIDTH**2
    assert part(cost, "connector").linear == 12 * 29 * (LAYER_ATTENTION + LAYER_MLP) + readout
    assert part(cost, "input_proj").linear == 2 * 29 * 1408 * WIDTH  # and the skip's
    assert part(cost, "input_proj").parameters == 2 * 1408 * WIDTH + WIDTH
    assert part(cost, "gates").parameters == 2 and cost.prompt_tokens == 29
    attention, folds = 12 * 2 * 29**2 * WIDTH + 2 * 29 * 257 * WIDTH, (257, 129, 65, 33)
    assert part(cost, "connector").products == attention + sum((n + 1) // 2 * (n // 2) * 1408 for n in folds)


OPTIONS = {"merge_at": "input", "readout": "group", "skip": "pooled"}
RAGGED = {"tome_r": {"average": 9, "least": 6, "most": 13}}


@pytest.mark.parametrize(
    "connector, more",
    [("tomeformer", {}), ("tomeformer", OPTIONS), ("tomeformer", RAGGED), ("avgpool", {}), ("qformer", {})],
)
def test_it_counts_what_a_real_step_does(runs, connector, more):
    """Without a number in memory as with them: forward and backward on one picture."""
    section = runs.config["model"] | {"connector": connector, "vit_precision": "fp32", **more}
    section |= {"num_query_token": 5, "prompt": "a photo of"}
    model = EVLGen.from_config(OmegaConf.create(section)).eval()
    language, caption = model.language_model, "a red square and a blue circle"
    ids, _ = language.text.caption(model.prompt, caption, language.text_limit)
    cost = cost_of(OmegaConf.create(section), text_tokens=1 + len(ids))  # 1: BOS
    with sdpa_kernel(SDPBackend.MATH):
        real = flops_per_image(step_of(model), {"image": pictures(1), "text_input": [caption]})
    assert cost.step_flops == real
    assert (cost.mean is None) == (more is not RAGGED)
    for name in ("vision encoder", "language model", "connector"):
        modules = {"vision encoder": "visual_encoder", "language model": "language_model", "connector": "connector"}
        numbers = sum(p.numel() for p in getattr(model, modules[name]).parameters())
        together = {"language model": ("language model", "head"), "connector": ("connector", "input_proj", "gates")}
        assert sum(p.parameters for p in cost.parts if p.name in together.get(name, (name,))) == numbers
    trained = {"ln_vision", "llm_proj"} | {"tomeformer": {"input_proj", "connector"}, "qformer": {"connector"}}.get(
        connector, set()
    )
    assert {p.name for p in cost.parts if p.trains} == trained | ({"gates"} if more is OPTIONS else set())


@pytest.mark.parametrize("llm_train", ["full", {"lora": {"rank": 4}}], ids=["full", "lora"])
def test_a_language_model_that_learns(runs, llm_train):
    """A trained one costs 6 FLOPs a MAC; beside adapters the frozen one still costs 4, and they 6."""
    section = runs.config["model"] | {"llm_train": llm_train, "vit_precision": "fp32", "llm_precision": "fp32"}
    model = EVLGen.from_config(OmegaConf.create(section)).eval()
    language, caption = model.language_model, "a red square and a blue circle"
    ids, _ = language.text.caption(model.prompt, caption, language.text_limit)
    cost = cost_of(OmegaConf.create(section), text_tokens=1 + len(ids))
    with sdpa_kernel(SDPBackend.MATH):
        real = flops_per_image(step_of(model), {"image": pictures(1), "text_input": [caption]})
    assert cost.step_flops == real
    learns = sum(p.numel() for p in language.parameters() if p.requires_grad)
    if llm_train == "full":
        assert (part(cost, "language model").factor, part(cost, "head").factor) == (6, 6)
        assert part(cost, "language model").parameters + part(cost, "head").parameters == learns
        return
    adapters, frozen = part(cost, "LoRA adapters"), part(cost, "language model")
    plain = part(cost_of(OmegaConf.create(section | {"llm_train": None}), 1 + len(ids)), "language model")
    assert (adapters.parameters, adapters.trains, adapters.factor) == (learns, True, 6)
    assert adapters.macs == learns * (cost.prompt_tokens + cost.text_tokens)
    assert (frozen.parameters, frozen.trains, frozen.factor, frozen.macs) == (plain.parameters, False, 4, plain.macs)


@pytest.mark.parametrize("draw", ["one", "sandwich"])
def test_an_elastic_model_costs_the_mean_of_what_it_draws(runs, draw, capsys):
    section = runs.config["model"] | {"vit_precision": "fp32"}
    elastic = OmegaConf.create(section | {"tome_r": {"elastic": [5, 9, 13], "draw": draw}})
    model = EVLGen.from_config(elastic).eval()
    language, caption = model.language_model, "a red square and a blue circle"
    length = 1 + len(language.text.caption(model.prompt, caption, language.text_limit)[0])
    cost = cost_of(elastic, text_tokens=length)
    each = {n: cost_of(OmegaConf.create(section | {"tome_r": {"target": n}}), length) for n in (5, 9, 13)}
    passes = {"one": [(5,), (9,), (13,)], "sandwich": [(13, 5), (13, 9)]}[draw]
    assert (cost.drawn, cost.prompt_tokens) == (passes, 13)
    assert cost.inference == {n: sum(part.macs for part in one.parts) for n, one in each.items()}
    for name in ("connector", "language model"):
        mean = sum(part(each[n], name).macs for draw in passes for n in draw) / len(passes)
        assert part(cost, name).macs == pytest.approx(mean, abs=2)
    assert part(cost, "vision encoder") == part(each[5], "vision encoder")
    step = step_of(model)
    step.draws, step.order = model.token_draws(), EpochOrder(len(passes), 0)
    with sdpa_kernel(SDPBackend.MATH):
        real = flops_per_image(step, {"image": pictures(1), "text_input": [caption]})
    assert cost.step_flops == pytest.approx(real, abs=1)
    options = ["--options", f"model.tome_r={{elastic: [5, 13], draw: {draw}}}", "model.tokens=9"]
    assert evlgen("macs", runs.path(), *options) == 0
    words = capsys.readouterr().out
    drawn = {"one": "5, 13", "sandwich": "13 + 5"}[draw]
    assert "9 after the connector" in words and f"mean over what training draws: {drawn} tokens" in words
    assert all(f" {n}: " in words.splitlines()[-1] for n in (5, 9, 13))


def test_longer_texts_cost_the_language_model_more(runs):
    short, long = (cost_of(OmegaConf.create(runs.config["model"]), text_tokens=n) for n in (10, 20))
    assert part(short, "vision encoder") == part(long, "vision encoder")
    assert part(long, "head").macs == part(short, "head").macs * 19 / 9
    with pytest.raises(ConfigError, match="--text-tokens 1: BOS and"):
        cost_of(OmegaConf.create(runs.config["model"]), text_tokens=1)


def test_pictures_of_different_length_are_padded_and_the_mean_one_is_told_beside(runs, capsys):
    section = OmegaConf.create(runs.config["model"])
    padded = cost_of(OmegaConf.create({**section, **RAGGED}), 12)
    widest, mean = (cost_of(OmegaConf.create({**section, "tome_r": r}), 12) for r in ({"target": 13}, [4, 4]))
    assert padded.prompt_tokens == 13 and padded.mean == mean and mean.mean is None
    assert [part.linear for part in padded.parts] == [part.linear for part in widest.parts]
    runs.config["model"] |= RAGGED
    assert evlgen("macs", runs.path(), "--text-tokens", 12) == 0
    words = capsys.readouterr().out
    assert "with 13 tokens, to which all pictures are padded; with the 9 of the mean picture" in words
    assert f"picture: {amount(mean.macs)} MACs (padded: {amount(padded.macs)})" in words
    assert evlgen("macs", runs.path(), "--text-tokens", 12, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["prompt_tokens"], content["mean"]["prompt_tokens"]) == (13, 9)
    assert content["mean"]["flops"] == mean.flops < content["flops"]


def test_what_cannot_be_counted_is_named():
    with pytest.raises(ConfigError, match="cannot count blip2_opt; it counts evlgen, evlgen_blip2"):
        cost_of(OmegaConf.create({"arch": "blip2_opt"}))


def test_the_command(runs, capsys):
    assert evlgen("macs", runs.path(), "--options", "model.tome_r=2") == 0
    words = capsys.readouterr().out
    assert "28 x 28: 17 visual tokens, 13 after the connector, 40 text tokens" in words
    assert "vision encoder" in words and "counted forward and backward" in words
    assert evlgen("macs", runs.path(), "--json", "--text-tokens", 12) == 0
    content = json.loads(capsys.readouterr().out)
    cost = cost_of(OmegaConf.create(runs.config["model"]), 12)
    assert content["flops"] == cost.flops == sum(part["flops"] for part in content["parts"])
    assert (content["text_tokens"], content["step_flops"]) == (12, cost.step_flops)
    rows = table_rows(cost)
    assert {len(row) for row in rows} == {len(COLUMNS)} and rows[-1][0] == "sum"
    assert evlgen("macs", runs.path(), "--text-tokens", 12, "--options", "run.texts_per_image=3") == 0
    words = capsys.readouterr().out
    assert "3 texts of 12 text tokens each" in words and "of each of the 3 texts: " in words
    assert evlgen("macs", runs.path(), "--options", "model.tomer=2") == 2
    assert "did you mean tome_r?" in capsys.readouterr().err
    assert evlgen("macs", runs.path(), "--text-tokens", 0) == 2
    assert "--text-tokens 0: give at least 1" in capsys.readouterr().err


def test_amounts():
    assert [amount(n) for n in (11.877e9, 6.28e6, 1500, 12, 1.2e13)] == ["11.88G", "6.28M", "1.50k", "12", "12.00T"]
    assert torch.get_default_device().type == "cpu"
