"""The evlgen command on a tiny run."""

import argparse
import json

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from lavis_evlgen import cli
from lavis_evlgen.config import EvlgenConfig
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.runners import trackers
from lavis_evlgen.runners.trainer import Trainer
from lavis_evlgen.tools.doctor import checks as doctor
from tests.run_tools import ROOT, checkpoint, losses, same_tensors
from tests.tiny import tiny_llama


def evlgen(*arguments):
    """Its exit code."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
    return end.value.code


def test_train_and_evaluate_do_what_the_scripts_do(finished, tmp_path, capsys):
    path, place = finished.path(), f"run.output_dir={tmp_path}"
    assert evlgen("train", path, "--options", place, "run.test_splits=[]") == 0
    assert losses(tmp_path / "run") == losses(finished.output())
    assert same_tensors(checkpoint(tmp_path / "run")["model"], checkpoint(finished.output())["model"])
    weights = f"model.pretrained={finished.output() / 'checkpoint_best.pth'}"
    assert evlgen("evaluate", path, "--options", place, "run.run_name=scored", weights) == 0
    cards = [json.loads((folder / "run.json").read_text()) for folder in (tmp_path / "scored", finished.output())]
    assert cards[0]["metrics"] == cards[1]["metrics"]
    capsys.readouterr()
    assert evlgen("train", path, "--options", place) == 2  # the folder holds a run
    assert capsys.readouterr().err.splitlines()[-1].startswith("evlgen train: ")
    assert evlgen("evaluate", path, "--stage", "align") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"evlgen evaluate: {path}: --stage align: ")


def test_a_bug_in_a_training_keeps_its_trace(runs, monkeypatch):
    """Errors of our own code while training are not mistakes in the config."""

    def fail(self, batches):
        raise ValueError("a bug")

    monkeypatch.setattr(Trainer, "_loop", fail)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["train", str(runs.path())])


def test_commands_take_a_recipe_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cfg = EvlgenConfig(argparse.Namespace(cfg_path="quickstart", options=["run.seed=3"]))
    assert cfg.path == ROOT / "projects/evlgen/quickstart.yaml" and cfg.run_cfg.seed == 3
    assert cfg.run_cfg.output_dir == OmegaConf.load(cfg.path).run.output_dir  # seen from where one stands, as ever
    for command, *more in (["macs"], ["doctor"], ["estimate", "--gpu", "cpu"], ["ablate", "--sweep", "model.tome_r=3"],
                           ["train"], ["evaluate"]):  # fmt: skip
        assert evlgen(command, "quickstrat", *more) == 2
        assert "no recipe has this name; did you mean quickstart?" in capsys.readouterr().err


def test_torchs_launcher_leaves_the_options_to_the_command():
    """It takes beginnings of its own options, wherever they stand."""
    from torch.distributed.run import get_args_parser

    words = ["train", "quickstart", "--options", "run.seed=1", "model.tome_r=3"]
    for command in (words, ["evaluate", *words[1:], "--stage", "align"]):
        args = get_args_parser().parse_args(["--nproc_per_node", "2", "-m", "lavis_evlgen.cli", *command])
        assert args.module and args.training_script_args == command


@pytest.fixture
def drawn(finished, tmp_path):
    """(files, captions) of the run's first two test pictures, whose captions are in its results."""
    dataset = finished.runner.datasets["scenes"]["test"]
    paths = []
    for row in range(2):
        paths.append(tmp_path / f"{row}.png")
        dataset.pil_image(row).save(paths[-1])
    rows = json.loads(next((finished.output() / "result").glob("test_?.json")).read_text())["rows"]
    return paths, [" ".join(row["caption"].split()) for row in rows[:2]]


def test_caption_says_what_the_run_said(finished, drawn, capsys):
    paths, captions = drawn
    assert evlgen("caption", *paths, "--run", finished.output()) == 0
    expected = "".join(f"{path}\t{caption}\n" for path, caption in zip(paths, captions, strict=True))
    assert capsys.readouterr().out == expected


def test_many_pictures_to_a_file_get_the_same_captions(finished, drawn, tmp_path, capsys):
    paths, captions = drawn
    out = tmp_path / "captions.csv"
    assert evlgen("caption", paths[0].parent, "--run", finished.output(), "--out", out, "--workers", 1) == 0
    rows = "".join(f"{path.name},{caption},\r\n" for path, caption in zip(paths, captions, strict=True))
    assert out.read_bytes().decode() == "image,caption,error\r\n" + rows
    assert evlgen("caption", paths[0].parent, "--run", finished.output()) == 2
    assert "name the file of their captions by --out" in capsys.readouterr().err


def test_caption_decodes_as_the_run_did(finished, drawn, tmp_path, capsys):
    """Every decoding key of the run config counts, and options of the command replace them."""
    paths, _ = drawn
    seen = {}
    for name, keys in {"plain": {}, "penalty": {"repetition_penalty": 3.0}, "short": {"max_len": 1}}.items():
        folder = tmp_path / name
        folder.mkdir()
        content = checkpoint(finished.output())
        content["config"]["run"] |= keys
        content["config"]["model"]["pretrained"] = "/gone.pth"  # all that it held is in this checkpoint
        torch.save(content, folder / "checkpoint_last.pth")
        assert evlgen("caption", paths[0], "--run", folder) == 0
        seen[name] = capsys.readouterr().out.rstrip("\n").split("\t", 1)[1]
    assert len(seen["short"]) < len(seen["plain"]) and seen["penalty"] != seen["plain"]
    assert evlgen("caption", paths[0], "--run", tmp_path / "plain", "--prompt", "two cats") == 0
    assert capsys.readouterr().out.rstrip("\n").split("\t", 1)[1] != seen["plain"]


def test_a_bad_picture_is_named_and_the_others_are_captioned(finished, drawn, tmp_path, capsys):
    paths, captions = drawn
    (tmp_path / "page.png").write_text("<html>")
    assert evlgen("caption", tmp_path / "page.png", paths[1], tmp_path / "none.png", "--run", finished.output()) == 1
    words = capsys.readouterr()
    assert words.out == f"{paths[1]}\t{captions[1]}\n"
    assert "page.png: looks like HTML" in words.err and "none.png: no such file" in words.err


@pytest.mark.parametrize(
    "file, says",
    [(None, "neither checkpoint_best.pth nor"), ("x.pth", "x.pth does not exist"), (__file__, "cannot be read")],
)
def test_caption_needs_a_checkpoint(drawn, tmp_path, file, says, capsys):
    chosen = ["--checkpoint", file] if file else []
    assert evlgen("caption", drawn[0][0], "--run", tmp_path, *chosen) == 2
    words = capsys.readouterr().err.splitlines()
    assert says in words[-1] and words[-1].startswith("evlgen caption: ")


def pictures(runs):
    """Four pictures in the captions file: two fine, one missing, one empty; half may be bad."""
    images = runs.folder / "images"
    images.mkdir(parents=True)
    for name in ("0.png", "1.png"):
        Image.new("RGB", (20, 20)).save(images / name)
    (images / "3.png").write_bytes(b"")
    lines = ["image,caption", *(f"{n}.png,picture {n}" for n in (0, 0, 1, 2, 3))]
    (runs.folder / "captions.csv").write_text("\n".join(lines) + "\n")
    runs.config["datasets"] = {
        "image_captions": {
            "images": str(images), "captions": str(runs.folder / "captions.csv"), "split": {"train": 4},
            "max_bad_fraction": 0.5,
        }
    }  # fmt: skip
    return runs


def test_doctor_counts_pictures(runs, capsys):
    path = pictures(runs).path()
    assert evlgen("doctor", path) == 0
    words = capsys.readouterr().out
    counts = "2 found and readable, 1 missing, 1 unreadable (at most 2 tolerated)"
    assert f"ok    data image_captions train: {counts}" in words
    assert "2.png: no such file" in words and "3.png: the file is empty (0 bytes)" in words
    assert "all 6 checks passed" in words
    assert evlgen("doctor", path, "--options", "datasets.image_captions.max_bad_fraction=0.4") == 1
    words = capsys.readouterr().out
    assert "FAIL  data image_captions train: 2 found" in words and "1 of 6 checks failed" in words
    assert evlgen("doctor", path, "--limit", 2) == 0
    assert "2 found and readable, 0 missing, 0 unreadable; 2 not looked at" in capsys.readouterr().out


def test_doctor_names_missing_weights(runs, parts, capsys):
    path = runs.path()
    options = ["model.connector_init=./no/bert", "model.pretrained=/no/checkpoint_best.pth"]
    assert evlgen("doctor", path, "--options", *options) == 1
    words = capsys.readouterr().out
    assert f"ok    weights vit_model: {parts['vit_model']}" in words
    assert "FAIL  weights connector_init: model.connector_init: ./no/bert does not exist" in words
    assert "FAIL  weights pretrained: model.pretrained: /no/checkpoint_best.pth does not exist" in words
    assert "ok    data scenes train: 12 found and readable, 0 missing, 0 unreadable" in words


def test_doctor_weighs_the_language_model_and_compares_with_what_is_free(runs, monkeypatch, capsys):
    runs.config["model"]["llm_precision"] = "fp32"
    monkeypatch.setattr(doctor, "available_memory", lambda: ("a small machine", 10**3))
    assert evlgen("doctor", runs.path()) == 1
    words = capsys.readouterr().out
    assert "FAIL  memory: vision encoder 0M = 0.0 GB, language model 0M = 0.0 GB; 0.0M parameters train: " in words
    assert "a small machine has 0.0 GB free" in words
    model_cfg = OmegaConf.create(runs.config["model"])
    built = EVLGen.from_config(OmegaConf.create({**runs.config["model"], "vit_precision": "fp32"}))
    counts = [sum(p.numel() for p in part.parameters()) for part in (built.visual_encoder, built.language_model)]
    assert counts[1] == sum(p.numel() for p in tiny_llama().parameters())
    frozen = dict(zip(("vision encoder", "language model"), ((n, 4 * n) for n in counts), strict=True))
    assert doctor.count_frozen(OmegaConf.merge(model_cfg, {"vit_precision": "fp32"})) == frozen
    assert doctor.count_trainable(model_cfg) == sum(p.numel() for p in built.parameters() if p.requires_grad)


def test_shards_are_written_and_pass_the_doctor(runs, tmp_path, capsys):
    images = pictures(runs).folder / "images"
    write = ["shards", tmp_path / "out", "--images", images, "--captions", runs.folder / "captions.csv"]
    assert evlgen(*write) == 2
    assert "more than --max-bad-fraction 0.01 allows" in capsys.readouterr().err
    assert evlgen(*write, "--max-bad-fraction", 0.5, "--per-shard", 1) == 0
    words = capsys.readouterr()
    assert words.out.startswith("2 samples, 2 unreadable images and 0 rows left out. In a config:\n")
    assert "3.png: the file is empty (0 bytes)" in words.err and words.err.count("left out: ") == 2
    runs.config["datasets"] = {"image_shards": {"shards": words.out.split()[-1]}}
    assert evlgen("doctor", runs.path()) == 0
    seen = "2 of 2 shards are there; 1, 1 samples in 2 of them; of up to 256 each, 2 are usable, 0 are not"
    assert f"ok    data image_shards train: {seen}" in capsys.readouterr().out
    assert evlgen("doctor", runs.path(), "--options", "datasets.image_shards.caption_key=text") == 1
    words = capsys.readouterr().out
    assert "FAIL  data image_shards train: " in words
    assert "0 are usable, 2 are not: its json has no key text (2)" in words
    assert "its json has no key text (it has caption, image, image_id)" in words
    elsewhere = f"datasets.image_shards.shards={tmp_path}/out/0000{{0..9}}.tar"
    assert evlgen("doctor", runs.path(), "--options", elsewhere) == 1
    assert "00002.tar: no such file" in capsys.readouterr().out
    assert evlgen(*write, "--columns", "image") == 2
    assert "--columns image: write COLUMN=NAME" in capsys.readouterr().err


def test_doctor_names_a_tracker_that_is_not_installed(runs, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    assert evlgen("doctor", runs.path(), "--options", "run.track=[wandb]") == 1
    words = capsys.readouterr().out
    assert "FAIL  splits: run.track: wandb is not installed: run `bash run_scripts/setup_environment.sh" in words


def test_doctor_refuses_an_unknown_key_in_one_line(runs, capsys):
    assert evlgen("doctor", runs.path(), "--options", "model.tomer=3") == 2
    words = capsys.readouterr().err.splitlines()
    assert len(words) == 1 and words[0].startswith("evlgen doctor: ") and "did you mean tome_r?" in words[0]


@pytest.mark.parametrize("option, says", [("run.tokenizer=nltk", "'nltk'"), ("run.metrics=[SPICE]", "'SPICE'")])
def test_doctor_says_in_one_line_what_cannot_be(runs, option, says, capsys):
    code = evlgen("doctor", runs.path(), "--options", option)
    words = capsys.readouterr()
    assert code == 2 and says in words.err and len(words.err.splitlines()) == 1


def test_keys_explains_every_key_that_the_projects_use(capsys):
    assert evlgen("keys") == 0
    words = capsys.readouterr().out
    listed = {line.split()[0] for line in words.splitlines() if line.startswith("  ")}
    for project in ROOT.glob("projects/**/*.yaml"):
        config = OmegaConf.load(project)
        used = {*config.run, *config.model, *(key for section in config.datasets.values() for key in section)}
        assert used <= listed, project.name
    assert evlgen("keys", "model") == 0
    words = capsys.readouterr().out
    assert "model: evlgen" in words and "tome_r" in words and "max_iters" not in words


def test_without_a_command_it_says_which_there_are(capsys):
    assert evlgen() == 2
    assert "COMMAND" in capsys.readouterr().err


def test_compare_prints_the_table_and_draws(finished, tmp_path, capsys):
    out = tmp_path / "compare.png"
    assert evlgen("compare", finished.output(), finished.output(), "--markdown", "--out", out) == 0
    words = capsys.readouterr().out
    assert "| run (1) | tomeformer |" in words and "| run (2) | tomeformer |" in words and "note:" not in words
    assert f"picture: {out}" in words and out.exists()
    assert evlgen("compare", tmp_path) == 2
    assert "has no run.json" in capsys.readouterr().err


def test_export_makes_a_bundle_that_captions_as_the_run_does(finished, drawn, tmp_path, monkeypatch, capsys):
    paths, captions = drawn
    read = []
    for place in ("vision.encoder", "connectors.tomeformer"):  # config and tokenizer are enough
        monkeypatch.setattr(f"lavis_evlgen.models.{place}.read_state_dict", lambda *a: read.append(a))
    assert evlgen("export", finished.output(), tmp_path / "b") == 0
    assert not read
    best = checkpoint(finished.output(), "checkpoint_best.pth")
    words = capsys.readouterr().out
    assert f"checkpoint_best.pth, step {best['step']}; its test results are in README.md" in words
    result = json.loads((finished.output() / "run.json").read_text())
    assert f"| loss_right | {result['metrics']['loss_right']:.4g} |" in (tmp_path / "b" / "README.md").read_text()
    assert str(finished.folder) not in (tmp_path / "b" / "README.md").read_text()
    monkeypatch.undo()
    again = finished.copy(tmp_path)
    again.train(f"model.pretrained={tmp_path / 'b'}", evaluate=True)  # as evaluate.py does
    assert json.loads((again.output() / "run.json").read_text())["metrics"] == result["metrics"]
    assert evlgen("caption", *paths, "--run", tmp_path / "b") == 0
    expected = "".join(f"{path}\t{caption}\n" for path, caption in zip(paths, captions, strict=True))
    assert capsys.readouterr().out == expected


def test_export_names_what_it_cannot_do(finished, tmp_path, capsys):
    assert evlgen("export", tmp_path, tmp_path / "b") == 2
    assert "neither checkpoint_best.pth nor" in capsys.readouterr().err
    assert evlgen("export", finished.output(), finished.output()) == 2
    assert "is no empty folder: it holds" in capsys.readouterr().err
    assert evlgen("export", finished.output(), tmp_path / "b", "--options", "model.llm_modle=x") == 2
    assert "unknown key llm_modle; did you mean llm_model?" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_export_writes_public_names_where_they_are_given(finished, tmp_path):
    assert evlgen("export", finished.output(), tmp_path / "b", "--options", "model.llm_model=somebody/llm") == 0
    assert json.loads((tmp_path / "b" / "config.json").read_text())["model"]["llm_model"] == "somebody/llm"
