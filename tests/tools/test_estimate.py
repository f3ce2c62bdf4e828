"""Memory counted without numbers against a real step's, and hours against measured files."""

import json
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lavis_evlgen.config import ConfigError
from lavis_evlgen.models.activation_checkpointing import recompute_llm
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.models.evlgen_video import EVLGenVideo
from lavis_evlgen.runners.cost import flops_per_image
from lavis_evlgen.tools.cost.estimate import Speed, auto_on, speed_of
from lavis_evlgen.tools.cost.hardware import ASSUMED, HARDWARE, RESULTS
from lavis_evlgen.tools.cost.macs import cost_of
from lavis_evlgen.tools.cost.step_memory import Alive, step_flops, step_memory
from lavis_evlgen.tools.cost.texts import Texts
from lavis_evlgen.weights.bundle import empty_model
from tests.runners.test_cost import step_of
from tests.test_cli import evlgen
from tests.tiny import clips, pictures

CAPTION = "a red square and a blue circle"


def section(runs, **changes):
    return OmegaConf.create(runs.config["model"] | {"vit_precision": "fp32", "dropout": 0.0} | changes)


def length_of(model) -> int:
    """Tokens of CAPTION with BOS and the config's prompt."""
    language = model.language_model
    return 1 + len(language.text.caption(model.prompt, CAPTION, language.text_limit)[0])


def test_alive_is_what_nobody_has_let_go():
    weight = nn.Parameter(torch.zeros(1000, 500))
    with Alive() as alive:
        x = torch.ones(10, 1000)
        view = x[:5]
        assert alive.now == 4 * 10_000
        y = x @ weight
        assert alive.now == 4 * (10_000 + 5_000)
        del x
        assert alive.now == 4 * (10_000 + 5_000)  # the graph holds it, and so does the view
        loss = y.square().sum()
        del y
        loss.backward()
        assert alive.most >= alive.now + 4 * 5_000
        del view, loss
        assert alive.now == weight.grad.nbytes


@pytest.mark.parametrize(
    "connector, dtype, recomputed",
    [("tomeformer", None, False), ("tomeformer", torch.bfloat16, False), ("qformer", None, False),
     ("all options", None, False), ("ragged", None, False), ("avgpool", None, False), ("linear", None, False),
     ("linear", None, True)],
)  # fmt: skip
def test_a_step_without_numbers_takes_what_a_real_one_does(runs, connector, dtype, recomputed):
    precision = "fp32" if dtype is None else "bf16"
    more = {"all options": {"merge_at": "input", "readout": "group", "skip": "pooled"},
            "ragged": {"tome_r": {"average": 9, "least": 6, "most": 13}}}.get(connector, {})  # fmt: skip
    cfg = section(runs, connector="tomeformer" if more else connector, prompt="a photo of", num_query_token=5,
                  llm_precision=precision, **more)  # fmt: skip
    model, batch = EVLGen.from_config(cfg).train(), 16
    empty = empty_model(EVLGen, cfg)
    for each in (model, empty):
        recompute_llm(each, recomputed)
    found = step_memory(empty, (batch, 3, 28, 28), length_of(model), dtype)
    weights, most = real_step(model, pictures(batch), dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert found.trained == sum(p.nbytes for p in trained) and found.moments == 2 * found.trained
    assert found.frozen == weights - found.trained
    assert found.working == pytest.approx(most, rel=0.02)
    assert found.working > sum(p.grad.nbytes for p in trained)


@pytest.mark.parametrize("draw", ["one", "sandwich"])
def test_an_elastic_step_takes_what_its_largest_draw_does(runs, draw):
    cfg = section(runs, tome_r={"elastic": [5, 9, 13], "draw": draw})
    model = EVLGen.from_config(cfg).train()
    largest = {"one": (13,), "sandwich": (13, 9)}[draw]
    found = step_memory(empty_model(EVLGen, cfg), (16, 3, 28, 28), length_of(model), None)
    assert found.working == pytest.approx(real_step(model, pictures(16), None, budgets=largest)[1], rel=0.02)
    flops = step_flops(empty_model(EVLGen, cfg), (1, 3, 28, 28), length_of(model))
    assert flops == pytest.approx(cost_of(cfg, length_of(model)).step_flops, abs=1)


def real_step(model, image, dtype, texts: int = 1, budgets=None) -> tuple[int, int]:
    """Bytes of a model's parameters and buffers, and the most that forward and backward hold beside them."""
    samples = {"image": image, "text_input": [CAPTION] * len(image) * texts, "texts_per_image": [texts] * len(image),
               "budgets": budgets}  # fmt: skip
    with Alive() as alive:
        for value in (*model.parameters(), *model.buffers(), samples["image"]):
            alive.add(value)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = model(samples)["loss"]
        loss.backward()
    weights = sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
    return weights, alive.most - weights


def test_a_float32_vit_of_clips_counts_in_autocasts_type(runs):
    """Gradients go through its blocks, so that what it keeps is most of a step: half of it in autocast's type."""
    cfg = section(runs, arch="evlgen_video", num_frames=3, llm_precision="bf16")
    model, image = EVLGenVideo.from_config(cfg).train(), clips(8)
    empty = [empty_model(EVLGenVideo, cfg) for _ in range(2)]
    half, single = (step_memory(model, image.shape, length_of(model), dtype).working
                    for model, dtype in zip(empty, (torch.bfloat16, None), strict=True))  # fmt: skip
    assert half == pytest.approx(real_step(model, image, torch.bfloat16)[1], rel=0.02)
    assert half < 0.85 * single


def test_memory_grows_as_pictures_do(runs):
    cfg = section(runs)
    two, four, six, again = (
        step_memory(empty_model(EVLGen, cfg), (batch, 3, 28, 28), 20, None, accumulated)
        for batch, accumulated in ((2, False), (4, False), (6, False), (6, True))
    )
    assert six.working - four.working == pytest.approx(four.working - two.working, rel=0.01)
    assert again.working > six.working  # gradients of the micro-batch before


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_several_texts_of_a_picture_take_what_a_real_step_does(runs, dtype):
    """Their mask and their copies of the last states are left out of the count: of tiny models that is seen."""
    cfg = section(runs, prompt="a photo of", llm_precision="fp32" if dtype is None else "bf16")
    model = EVLGen.from_config(cfg).train()
    found = step_memory(empty_model(EVLGen, cfg), (16, 3, 28, 28), length_of(model), dtype, texts=Texts(3))
    _, most = real_step(model, pictures(16), dtype, texts=3)
    assert found.working == pytest.approx(most, rel=0.1)
    alone = step_memory(empty_model(EVLGen, cfg), (48, 3, 28, 28), length_of(model), dtype)
    assert found.working < alone.working and found.frozen == alone.frozen


def test_frames_are_paid_for(runs):
    frames, flops = [], []
    for count in (1, 4):
        cfg = section(runs, arch="evlgen_video", num_frames=count)
        image = (3, count, 28, 28)
        frames.append(step_memory(empty_model(EVLGenVideo, cfg), (2, *image), 20, None).working)
        flops.append(step_flops(empty_model(EVLGenVideo, cfg), (1, *image), 20))
    assert frames[1] > 2 * frames[0] and flops[1] > 1.5 * flops[0]


def test_operations_are_a_real_steps(runs):
    cfg = section(runs)
    model = EVLGen.from_config(cfg).eval()
    with sdpa_kernel(SDPBackend.MATH):
        real = flops_per_image(step_of(model), {"image": pictures(1), "text_input": [CAPTION]})
    assert step_flops(empty_model(EVLGen, cfg), (1, 3, 28, 28), length_of(model)) == real


def test_texts_of_a_run_share_a_row_or_do_not(runs):
    def texts(count=4, task="evlgen_captioning", **model):
        sections = {"run_cfg": {"texts_per_image": count, "task": task}, "model_cfg": model}
        return Texts.of(SimpleNamespace(**{name: OmegaConf.create(value) for name, value in sections.items()}))

    assert texts() == texts(task="evlgen_vqa") == texts(prompt_attention="prefix") == Texts(4, False)
    assert texts(None) == Texts(1, False) and texts(task="evlgen_conversations") == Texts(4, True)
    assert texts(prompt_attention="prefix", prompt="a photo of") == Texts(4, True)
    assert texts(prompt_attention="prefix", task="evlgen_vqa") == Texts(4, True)


def measured(folder, gpu, scale="opt-2.7b", flops=1e12, seconds=0.5, dtype="bf16"):
    row = {"scale": scale, "batch": 10, "dtype": dtype, "flops_per_image": flops}
    row["seconds"] = {"whole": {"median": seconds}}
    file = folder / f"step-{scale}-{dtype}-{gpu}.json".replace(" ", "-")
    file.write_text(json.dumps({"hardware": {"gpu": gpu or None}, "rows": [row]}))


def test_speed_is_measured_where_it_was(tmp_path):
    measured(tmp_path, "NVIDIA H200", flops=1e12, seconds=0.05)
    measured(tmp_path, "NVIDIA H200", "vicuna-7b", flops=3e12, seconds=0.1)
    measured(tmp_path, "NVIDIA A100-SXM4-80GB", seconds=0.1)
    measured(tmp_path, "", "quickstart", flops=1e9, seconds=2.0)
    assert speed_of("h200", "half", 1.2e12, tmp_path, 0.3).rate == pytest.approx(1e12 * 10 / 0.05)
    assert speed_of("h200", "half", 2.8e12, tmp_path, 0.3).rate == pytest.approx(3e12 * 10 / 0.1)
    assert "(step-opt-2.7b-bf16-NVIDIA-A100" in speed_of("a100-80g", "half", 1e12, tmp_path, 0.3).source
    assert speed_of("cpu", "half", 1e12, tmp_path, 0.3).rate == pytest.approx(1e9 * 10 / 2)
    # an A10 is no A100, and float32 no bf16
    assumed = speed_of("a10", "half", 1e12, tmp_path, 0.4)
    assert assumed == Speed(0.4 * 125e12, assumed.source, False) and "assumed: 40%" in assumed.source
    assert speed_of("h200", "fp32", 1e12, tmp_path, 0.3).rate == pytest.approx(0.3 * 67e12)
    with pytest.raises(ConfigError, match="no step in float32 was measured on a processor"):
        speed_of("cpu", "fp32", 1e12, tmp_path, 0.3)


def test_the_projects_own_results_are_read():
    assert speed_of("cpu", "half", 5e10, RESULTS, ASSUMED).measured


def test_drivers_names():
    names = {"h200": "NVIDIA H200", "a100-40g": "NVIDIA A100-PCIE-40GB", "a6000": "NVIDIA RTX A6000", "t4": "Tesla T4",
             "4090": "NVIDIA GeForce RTX 4090", "v100": "Tesla V100-SXM2-32GB", "a10": "NVIDIA A10"}  # fmt: skip
    for kind, name in names.items():
        assert {key.partition("-")[0] for key in HARDWARE if HARDWARE[key].is_called(name)} == {kind.partition("-")[0]}


def test_auto_is_the_other_machines(monkeypatch):
    assert (auto_on("h200"), auto_on("v100")) == ("bf16", "fp32")


def test_the_command(runs, tmp_path, capsys):
    measured(tmp_path, "", "tiny", flops=1e6, seconds=1e-3, dtype="fp32")
    words = ("--gpu", "cpu", "--results", str(tmp_path))
    assert evlgen("estimate", runs.path(), *words) == 0
    told = capsys.readouterr().out
    assert "measured: tiny, batch 10, fp32" in told and "CUDA" not in told and "AdamW's moments" in told
    assert evlgen("estimate", runs.path(), "--gpu", "t4", "--gpus", 8, "--options", "run.batch_size_train=4") == 0
    told = capsys.readouterr().out
    assert "fits into 16 GB of one T4; the largest micro-batch that does: " in told
    assert "32 of them a step" in told and "assumed: 37% of the data sheet's peak" in told
    largest = int(told.split("that does: ")[1].split()[0])
    assert evlgen("estimate", runs.path(), "--gpu", "t4", "--options", f"run.batch_size_train={largest * 2}") == 0
    told = capsys.readouterr().out
    assert "does not fit into 16 GB of one T4" in told
    again = int(told.split("that does: ")[1].split()[0])
    assert again == pytest.approx(largest, rel=0.02)
    assert evlgen("estimate", runs.path(), "--gpu", "t4", "--options", "run.texts_per_image=5") == 0
    told = capsys.readouterr().out
    assert "a picture or clip with 5 texts (" in told and "FLOPs a text), 2 of them a step" in told
    assert "pictures with 5 texts each a second" in told


@pytest.mark.parametrize(
    "words, said",
    [
        (("--gpus", 0), "--gpus 0: give at least 1"),
        (("--mfu", 3), "--mfu 3.0: a share above 0"),
        (("--options", "run.amp=half"), "run.amp: 'half' is not one of"),
        (("--options", "run.amp=bf16", "model.llm_precision=fp16"), "cannot mix the two half"),
    ],
)
def test_mistakes_are_named(runs, capsys, words, said):
    assert evlgen("estimate", runs.path(), "--gpu", "h200", *words) == 2
    assert said in capsys.readouterr().err
