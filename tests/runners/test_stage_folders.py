"""What a run with stages leaves behind, under the commands that read runs; stages with other tasks and data."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image

from lavis_evlgen import launch
from lavis_evlgen.config import ConfigError
from lavis_evlgen.weights.sources import WeightsError
from tests.run_tools import Runs, checkpoint, losses
from tests.test_cli import evlgen

PROCESSOR = {"image_size": 28, "mean": "half"}
ALIGN = {"name": "align", "trains": ["ln_vision.*", "connector.*", "llm_proj.*"], "datasets": ["scenes"]}
QUESTIONS = {
    "name": "questions", "datasets": ["image_questions"], "trains": ["llm_proj.*", "*lora_*"],
    "run": {"task": "evlgen_vqa", "metric": "exact", "prompt": "Question: {} Short answer:"},
}  # fmt: skip
REWARD = {"name": "reward", "datasets": ["scenes"], "run": {"task": "scst", "num_samples": 1}}


def questions(folder) -> dict:
    """The section of a data set: a question about each of eight drawn colours."""
    rows = []
    for n in range(8):
        Image.new("RGB", (32, 32), (30 * n, 255 - 30 * n, 60)).save(folder / f"{n}.png")
        rows.append({"image": f"{n}.png", "question": "which one is it?", "answer": f"number {n}"})
    (folder / "questions.json").write_text(json.dumps(rows))
    return {"questions": str(folder / "questions.json"), "images": str(folder), "split": {"train": 4, "val": 4}}


@pytest.fixture(scope="module")
def run(parts, tmp_path_factory) -> Runs:
    """Captions with a frozen language model, questions with its adapters, then CIDEr with everything."""
    runs = Runs(parts, tmp_path_factory.mktemp("tasks"), max_iters=2, iters_per_inner_epoch=2, valid_splits=["val"],
                sheet_pictures=0)  # fmt: skip
    runs.config["model"] |= {"llm_train": {"lora": {"rank": 4}}, "max_txt_len": 60}
    stages = {stage: {"name": f"evlgen_image_{stage}", **PROCESSOR} for stage in ("train", "eval")}
    runs.config["datasets"]["image_questions"] = questions(runs.folder) | {"vis_processor": stages}
    runs.config["stages"] = [ALIGN, QUESTIONS, REWARD]
    runs.runner = runs.train()
    return runs


def card(folder) -> dict:
    return json.loads((folder / "run.json").read_text())


def test_each_stage_has_its_task_and_data(run):
    cards = [card(run.output() / name) for name in ("1_align", "2_questions", "3_reward")]
    assert [one["data"]["name"] for one in cards] == ["scenes", "image_questions", "scenes"]
    assert "CIDEr" in cards[0]["metrics"]["metrics"] and "reward" in cards[2]["metrics"]
    assert [one["config"]["stage"]["name"] for one in cards] == ["align", "questions", "reward"]
    trained = [one["model"]["trainable_parameters"] for one in cards]
    assert trained[2] > max(trained[:2])


def test_a_stage_is_evaluated_as_a_run_is(run, tmp_path):
    for name in ("align", "questions"):
        folder = next(run.output().glob(f"?_{name}"))
        weights = f"model.pretrained={folder / 'checkpoint_last.pth'}"
        path = run.path()
        argv = ["--cfg-path", str(path), "--stage", name, "--options", weights, "run.test_splits=[val]",
                f"run.run_name=again_{name}"]  # fmt: skip
        launch.main("evaluate.py", "", True, argv)
        found, expected = card(run.output(f"again_{name}")), card(folder)
        assert found["data"] == expected["data"]
        assert found["metrics"]["loss_right"] == pytest.approx(expected["metrics"]["loss_right"], abs=1e-6)


def test_caption_compare_and_export_read_stages(run, tmp_path, capsys):
    dataset = run.runner.data[0][1]["scenes"]["val"]
    dataset.pil_image(0).save(tmp_path / "0.png")
    assert evlgen("caption", tmp_path / "0.png", "--run", run.output() / "1_align") == 0
    capsys.readouterr()
    out = tmp_path / "compare.png"
    own = tmp_path / "own"  # with what evaluate.py leaves beside the stages, and a stage that was not scored
    shutil.copytree(run.output(), own)
    (own / "result").mkdir()
    shutil.copy(own / "1_align" / "run.json", own / "run.json")
    (own / "2_questions" / "run.json").rename(own / "away.json")
    for given in (sorted(own.glob("*")), [own]):
        assert evlgen("compare", *given, "--markdown", "--out", out) == 0
        lines = capsys.readouterr().out.splitlines()[2:4]
        assert [line.split(" | ")[0] for line in lines] == ["| 1_align", "| 3_reward"]
    for given in (sorted(run.output().glob("*")), [run.output()]):  # RUN/* and RUN
        assert evlgen("compare", *given, "--markdown", "--out", out) == 0
        lines = capsys.readouterr().out.splitlines()[2:5]
        assert [line.split(" | ")[0] for line in lines] == ["| 1_align", "| 2_questions", "| 3_reward"]


def test_the_folder_of_all_stages_is_no_run(run, tmp_path, capsys):
    (tmp_path / "0.png").touch()
    for command in (["export", run.output(), tmp_path / "out"], ["caption", tmp_path / "0.png", "--run", run.output()]):
        assert evlgen(*command) == 2
        assert "holds a run with stages; give the folder of one, such as" in capsys.readouterr().err
    plain = run.copy(tmp_path)
    del plain.config["stages"]
    plain.output().mkdir(parents=True)
    shutil.copy(run.output() / "stages.json", plain.output())
    with pytest.raises(ConfigError, match="holds the stages.json of another run"):
        plain.train("run.train_dataset_ratios={scenes: 1, image_questions: 1}", "run.valid_splits=[]")


@pytest.mark.parametrize("name, has_adapter", [("1_align", False), ("3_reward", True)])
def test_a_bundle_of_a_stage_gives_the_same_losses(run, tmp_path, name, has_adapter):
    folder = run.output() / name
    assert evlgen("export", folder, tmp_path / "bundle", "--checkpoint", folder / "checkpoint_last.pth") == 0
    assert (tmp_path / "bundle" / "adapter").exists() == has_adapter
    stage = name.partition("_")[2]
    args = [f"model.pretrained={tmp_path / 'bundle'}", "run.test_splits=[val]", f"run.run_name=bundle_{stage}"]
    launch.main("evaluate.py", "", True, ["--cfg-path", str(run.path()), "--stage", stage, "--options", *args])
    found = card(run.output(f"bundle_{stage}"))["metrics"]["loss_right"]
    assert found == pytest.approx(card(folder)["metrics"]["loss_right"], abs=1e-6)


def test_a_stage_is_the_start_of_a_run_of_its_own(run, parts, tmp_path):
    """Without stages, and without a language model that learns: nothing of it is in the first stage's checkpoint."""
    plain = Runs(parts, tmp_path, max_iters=1, iters_per_inner_epoch=1)
    plain.config["model"]["max_txt_len"] = 60
    plain.train(f"model.pretrained={run.output() / '1_align' / 'checkpoint_last.pth'}")
    assert list(losses(plain.output())) == [1]


def test_mistakes_of_later_stages_are_found_before_the_first(parts, tmp_path):
    runs = Runs(parts, tmp_path)
    for stage, words in {
        "{name: b, trains: [conector.*]}": "stages.b.trains: conector.* is the name of no parameter .* nearest: conn",
        "{name: b, run: {valid_splits: [dev]}}": "stages.b: no data set has the split 'dev'",
        "{name: b, run: {batch_size_train: null}}": "stages.b: run.batch_size_train is not set",
        "{name: b, run: {task: evlgen_vqa, valid_splits: [val]}}": "stages.b: run.task=evlgen_vqa needs questions",
        "{name: b, run: {amp: bf16}}": "stages.b: run.amp=bf16 with model.llm_precision=fp16: autocast cannot mix",
    }.items():
        with pytest.raises(ConfigError, match=words):
            runs.train(f"stages=[{{name: a}}, {stage}]", "model.llm_precision=fp16")
    assert not runs.output().exists()


def test_a_start_that_is_gone_or_another_is_refused(run, tmp_path):
    copy = run.copy(tmp_path)
    source, there = run.output(), copy.output()
    (there / "1_align").mkdir(parents=True)
    ledger = json.loads((source / "stages.json").read_text())
    for row in ledger["stages"][1:]:
        row["state"] = "waiting"
    (there / "stages.json").write_text(json.dumps(ledger))
    with pytest.raises(WeightsError, match="stages.questions, which starts from the stage before: .*does not exist"):
        copy.train("run.resume_ckpt_path=auto")
    content = checkpoint(source / "1_align")
    values = content["frozen_weights"]["language_model"]["values"]
    values[min(values)][0] += 1
    torch.save(content, there / "1_align" / "checkpoint_last.pth")
    with pytest.raises(ConfigError, match="was trained with another language_model"):
        copy.train("run.resume_ckpt_path=auto")
    for change in ({"stages": [{**ledger["stages"][0], "folder": "../../1_align"}]}, {"settings": {}},
                   {"stages": [{"name": "align", "folder": "1_align", "state": "done"}]}):  # fmt: skip
        (there / "stages.json").write_text(json.dumps(ledger | change))
        with pytest.raises(ConfigError, match="is not the stages.json of a run"):
            copy.train("run.resume_ckpt_path=auto")
    for text in ("{}", "[" * 10**6):
        (there / "stages.json").write_text(text)
        with pytest.raises(ConfigError, match="is not the stages.json of a run"):
            copy.train("run.resume_ckpt_path=auto")


def test_doctor_looks_at_every_stage(run, capsys):
    assert evlgen("doctor", run.path()) == 0
    words = capsys.readouterr().out
    assert re.search("stage 1/3 align: trains connector .*, ln_vision .*, llm_proj .* tensors", words)
    assert re.search("stage 2/3 questions: trains language_model .*, llm_proj .* tensors", words)
    assert words.count("data scenes train") == 1 and words.count("memory:") == 3
    assert evlgen("doctor", run.path(), "--options", "stages.align.trains=[conector.*]") == 1
    assert "FAIL  stage 1/3 align: stages.align.trains: conector.*" in capsys.readouterr().out
    assert evlgen("doctor", run.path(), "--parameters") == 0
    names = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == list(run.runner.parts.parameters)


def test_keys_tell_of_stages(capsys):
    assert evlgen("keys", "stages") == 0
    words = capsys.readouterr().out
    assert all(f"  {name} " in words for name in ("name", "trains", "datasets", "run")) and "connector.*" in words


def test_macs_are_of_each_stage_and_summed(run, capsys):
    assert evlgen("macs", run.path(), "--json", "--text-tokens", 20) == 0
    found = json.loads(capsys.readouterr().out)
    factors = [{part["name"]: part["factor"] for part in stage["parts"]} for stage in found["stages"]]
    assert factors[0]["connector"] == 6 and factors[0]["language model"] == 4 and factors[0]["LoRA adapters"] == 4
    assert factors[1]["connector"] == 2 and factors[1]["language model"] == 4 and factors[1]["LoRA adapters"] == 6
    assert factors[1]["llm_proj"] == 6 and factors[1]["vision encoder"] == 2
    assert [stage["pictures"] for stage in found["stages"]] == [4, 4, 4]
    assert found["flops"] == sum(4 * stage["flops"] for stage in found["stages"])
    for stage in found["stages"]:
        assert stage["flops"] == pytest.approx(stage["step_flops"], rel=0.1)
    assert evlgen("macs", run.path(), "--options", "model.llm_train=full", "stages.questions.trains=[language_model.*]",
                  "--json") == 0  # fmt: skip
    stage = json.loads(capsys.readouterr().out)["stages"][1]
    parts = {part["name"]: part["factor"] for part in stage["parts"]}
    assert parts["language model"] == 6 and {parts[name] for name in ("ln_vision", "connector", "llm_proj")} == {2}


def test_estimate_is_of_each_stage_and_summed(run, capsys):
    assert evlgen("estimate", run.path(), "--gpu", "t4") == 0
    words = capsys.readouterr().out
    assert [label in words for label in ("stage 1/3 align", "stage 2/3 questions", "stage 3/3 reward")] == [True] * 3
    assert "all stages: " in words and words.count("weights that train") == 3
