"""Runs side by side, from hand-made run folders."""

import json

import numpy as np
import pytest
from PIL import Image

from lavis_evlgen.config import ConfigError
from lavis_evlgen.reporting.plots import comparison_plot
from lavis_evlgen.tools.compare import COLUMNS, duration, markdown, read_runs, show, table_rows, unlike


def folder_of(path, steps=20, flops=4e9, card=None, **model):
    """A run folder: windows of 10 steps at 2 s and 8 images each, a validation at the end."""
    path.mkdir(parents=True)
    window = {"loss": 1.0, "seconds_per_step": 2.0, "images_per_s": 4.0}
    window |= {} if flops is None else {"flops_per_image": flops}
    log = [{"step": step, **window} for step in range(10, steps + 1, 10)]
    log.append({"step": steps, "val_loss_right": 0.5, "val_loss_shuffled": 1.5, "cider": 1.2, "blind_cider": 0.4})
    (path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    content = {
        "metrics": {"metrics": {"CIDEr": 1.25}, "blind": {"CIDEr": 0.5}, "loss_right": 0.5, "loss_shuffled": 1.5},
        "model": {"trainable_parameters": 11_200_000},
        "data": {"name": "scenes", "split": "test", "size": 100, "fingerprint": "abc"},
        "decoding": {"num_beams": 3}, "prompt": "", "scoring_tokenizer": "ptb", "step": steps,
        "config": {"model": {"connector": "tomeformer", **model}},
    }  # fmt: skip
    (path / "run.json").write_text(json.dumps(content | (card or {})))
    return path


def cells(rows, line):
    return dict(zip(COLUMNS, rows[line], strict=True))


def test_a_row_says_what_a_run_cost_and_scored(tmp_path):
    rows = table_rows(read_runs([folder_of(tmp_path / "a")]))
    assert cells(rows, 0) == {
        "run": "a", "connector": "tomeformer", "trains": "11.2M", "steps": "20", "images": "160", "time": "40 s",
        "GMACs/image": "2.0", "CIDEr": "1.250", "blind CIDEr": "0.500", "loss, right": "0.500",
        "loss, shuffled": "1.500", "scored on": "scenes test, 100",
    }  # fmt: skip
    assert "tomeformer" in show(rows) and markdown(rows).splitlines()[2].startswith("| a | tomeformer | 11.2M |")


def test_what_a_card_scores_earlier_than_the_run_ended_is_charged_up_to_there(tmp_path):
    runs = read_runs([folder_of(tmp_path / "a", steps=40, card={"step": 20})])
    assert cells(table_rows(runs), 0)["images"] == "160"
    assert [row["seconds"] for row in runs[0].rows] == [20.0, 40.0, 60.0, 80.0, 80.0]
    assert runs[0].rows[-1]["macs"] == pytest.approx(320 * 2e9)


def test_a_run_that_counted_nothing(tmp_path):
    runs = read_runs([folder_of(tmp_path / "a", flops=None), folder_of(tmp_path / "b")])
    assert [cells(table_rows(runs), n)["GMACs/image"] for n in (0, 1)] == ["", "2.0"]
    assert {row["macs"] for row in runs[0].rows} == {None}


def test_the_papers_row_stands_under_the_same_recipe(tmp_path):
    def papers(name, step=150_000, data=("laion115m", "ccs14m", "image_captions"), llm="facebook/opt-2.7b"):
        model = {"connector": "tomeformer", "llm_model": llm, "num_layers": 12}
        config = {"model": model, "datasets": dict.fromkeys(data, {})}
        rows = table_rows(read_runs([folder_of(tmp_path / name, card={"step": step, "config": config})]))
        return [tuple(cells(rows, 1)[column] for column in ("CIDEr", "time", "scored on"))] if rows[1:] else []

    assert papers("a") == [("1.370", "80 h, 8 A100", "COCO val")]
    assert papers("b", step=250_000) == [("1.391", "133 h, 8 A100", "COCO val")]
    assert papers("c", data=("ccs14m", "image_captions")) == [("1.351", "80 h, 8 A100", "COCO val")]
    assert papers("d", data=("scenes",)) == papers("e", step=151_000) == papers("f", llm="other") == []


def test_scores_that_do_not_compare_are_named(tmp_path):
    other = {"scoring_tokenizer": "simple", "data": {"name": "scenes", "split": "val", "size": 9, "fingerprint": "x"}}
    runs = read_runs([folder_of(tmp_path / "a"), folder_of(tmp_path / "b"), folder_of(tmp_path / "c", card=other)])
    assert unlike(runs[:2]) == []
    assert unlike(runs) == [
        "the data scored differs between a and c: their scores do not compare",
        "the scoring tokenizer differs between a and c: their scores do not compare",
    ]


def test_runs_of_one_name_are_numbered(tmp_path):
    paths = [folder_of(tmp_path / seed / "run") for seed in ("1", "2")]
    assert [run.name for run in read_runs(paths)] == ["run (1)", "run (2)"]


def test_what_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match="has no run.json; give folders"):
        read_runs([tmp_path])
    for text in ("{", "[]", '{"metrics": {}}'):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ConfigError, match="run.json is not a run card"):
            read_runs([tmp_path])


@pytest.mark.filterwarnings("error::UserWarning")
def test_the_picture(tmp_path):
    runs = read_runs([folder_of(tmp_path / "a"), folder_of(tmp_path / "b", flops=None)])
    path = comparison_plot(tmp_path / "new" / "c.png", {run.name: run.rows for run in runs})
    wide = np.asarray(Image.open(path).convert("RGB"))
    assert wide.shape[1] == 1260 and wide.std() > 10
    path = comparison_plot(tmp_path / "d.png", {"b": runs[1].rows})
    assert np.asarray(Image.open(path)).shape[1] == 840  # no MACs, no panel for them
    with pytest.raises(ValueError, match="run.valid_splits"):
        comparison_plot(tmp_path / "e.png", {"b": runs[1].rows[:2]})


def test_durations():
    assert [duration(seconds) for seconds in (12, 480, 9000)] == ["12 s", "8 min", "2.5 h"]
