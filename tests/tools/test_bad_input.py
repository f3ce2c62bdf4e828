"""Mistakes a user makes: one line that says what is wrong and how to fix it, exit code 2, no stack trace."""

import json

import pytest
import torch
import yaml

from lavis_evlgen import launch
from lavis_evlgen.errors import UserError
from tests.run_tools import EXIT_USER_ERROR, ROOT
from tests.test_cli import pictures


def complaint(runs, capsys, *options, script="train.py") -> str:
    """The one line that a run says before it ends with exit code 2; log lines with their time come before it."""
    assert runs.command(*options, script=script) == EXIT_USER_ERROR
    words = capsys.readouterr().err
    assert "Traceback" not in words
    lines = [line for line in words.splitlines() if line.startswith(f"{script}: ")]
    assert len(lines) == 1 and words.endswith(lines[0] + "\n"), words
    return lines[0]


def test_a_wrong_config_key(runs, capsys):
    runs.config["run"]["batch_size"] = 3
    line = complaint(runs, capsys)
    assert "unknown key run.batch_size; did you mean batch_size_" in line and str(runs.path()) in line


def test_a_config_that_is_not_there(runs, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "path", lambda: tmp_path / "none.yaml", raising=False)
    assert "none.yaml does not exist" in complaint(runs, capsys)


@pytest.mark.parametrize("key", ["vit_model", "connector_init", "llm_model"])
@pytest.mark.parametrize("path", ["/no/such/folder", "./weights.onnx"])
def test_missing_weights(runs, capsys, key, path):
    line = complaint(runs, capsys, f"model.{key}={path}")
    assert f"{key}: {path} does not exist" in line and "fix the path" in line


def test_a_folder_without_weights(runs, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    line = complaint(runs, capsys, f"model.vit_model={tmp_path / 'empty'}")
    assert "vit_model" in line and str(tmp_path / "empty") in line


def test_a_package_that_is_not_installed(runs, capsys):
    line = complaint(runs, capsys, "model.vit_model=package:no_such_package/vit.onnx")
    assert "no_such_package is not installed" in line and "--extra" in line


def test_a_captions_file_with_a_missing_column(runs, capsys):
    pictures(runs)
    file = runs.folder / "captions.csv"
    file.write_text(file.read_text().replace("image,caption", "image,words"))
    line = complaint(runs, capsys)
    assert str(file) in line and "caption" in line and "words" in line


def test_pictures_that_are_elsewhere(runs, capsys):
    pictures(runs)
    line = complaint(runs, capsys, "datasets.image_captions.images=/no/pictures")
    assert "datasets.image_captions.images=/no/pictures is not a folder" in line


@pytest.mark.parametrize("change, says", [("model.num_layers=1", "have no place"), ("", "differ in shape")])
def test_a_checkpoint_of_another_architecture(runs, finished, capsys, change, says, tmp_path):
    best = finished.output() / "checkpoint_best.pth"
    if not change:
        saved = torch.load(best, weights_only=True)
        saved["model"]["llm_proj.bias"] = torch.zeros(3)
        best = tmp_path / "other.pth"
        torch.save(saved, best)
    line = complaint(runs, capsys, f"model.pretrained={best}", *filter(None, [change]), script="evaluate.py")
    assert str(best) in line and "another architecture" in line and says in line


def test_a_checkpoint_that_would_run_code(runs, capsys, tmp_path):
    class Touches:
        def __reduce__(self):
            return (tmp_path / "touched").touch, ()

    torch.save({"model": Touches()}, tmp_path / "evil.pth")
    line = complaint(runs, capsys, f"model.pretrained={tmp_path / 'evil.pth'}")
    assert "evil.pth" in line and "plain tensors" in line and not (tmp_path / "touched").exists()


def test_a_checkpoint_that_is_not_there(runs, capsys):
    assert "/no/best.pth does not exist" in complaint(runs, capsys, "model.pretrained=/no/best.pth")
    line = complaint(runs, capsys, f"run.resume_ckpt_path={runs.folder / 'checkpoint_last.pth'}")
    assert "run.resume_ckpt_path" in line and "does not exist" in line


def test_cuda_where_there_is_none(runs, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "run.device=cuda, but torch sees no CUDA device" in complaint(runs, capsys, "run.device=cuda")


def test_without_java_the_rest_is_scored_and_meteor_says_how(runs, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    options = ["run.valid_splits=[val]", "run.tokenizer=auto", "run.metrics=[CIDEr,METEOR]"]
    assert runs.command(*options) == 0
    card = json.loads((runs.output() / "run.json").read_text())
    assert card["scoring_tokenizer"] == "simple" and set(card["metrics"]["metrics"]) == {"CIDEr"}
    result = json.loads((runs.output() / "result" / "val_4.json").read_text())
    assert "Install a Java runtime" in result["unscored"]["METEOR"]
    words = capsys.readouterr().err
    assert "METEOR was not scored: Java was not found on PATH. Install a Java runtime" in words


def test_ptb_without_java_is_refused(runs, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    line = complaint(runs, capsys, "run.tokenizer=ptb", "run.valid_splits=[val]")
    assert 'tokenizer="ptb" needs Java' in line and "Install a Java runtime" in line


@pytest.mark.parametrize(
    "option, says",
    [
        ("run.metrics=[CIDEr,SPICE]", "unknown caption metric 'SPICE'"),
        ("run.amp=fp8", "run.amp: 'fp8' is not one of"),
        ("run.max_iters=many", "run.max_iters"),
        ("run.tokenizer=nltk", "unknown tokenizer 'nltk'"),
        ("model.bos=middle", "bos: 'middle' is not one of before, after"),
        ("model.tome_r={targt: 3}", "targt"),
        ("model.vit_precision=fp8", "vit_precision: 'fp8'"),
        ("model.connector=perceiver", "connector: 'perceiver' is not one of"),
        ("model.llm_model=null", "llm_model"),
    ],
)
def test_values_that_are_not_known(runs, capsys, option, says):
    runs.config["run"]["valid_splits"] = ["val"]
    assert says in complaint(runs, capsys, option)


def test_an_error_that_is_not_ours_keeps_its_trace(runs, monkeypatch):
    monkeypatch.setattr(launch, "build", lambda cfg: int("a bug elsewhere"))
    with pytest.raises(ValueError, match="a bug elsewhere") as error:
        runs.command()
    assert not isinstance(error.value, UserError)


def test_the_projects_say_what_to_do_where_their_data_is_not(runs, capsys):
    project = yaml.safe_load((ROOT / "projects" / "evlgen" / "flickr8k_mini.yaml").read_text())
    runs.config["datasets"] = project["datasets"]
    runs.config["datasets"]["image_captions"]["images"] = "data/none"
    assert "datasets.image_captions.images=data/none is not a folder" in complaint(runs, capsys)
