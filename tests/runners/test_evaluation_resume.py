"""An evaluation that is cut off goes on where it was, ends as if it had not been, and mixes in nothing stale."""

import json

import pytest
import torch

from lavis_evlgen.config import ConfigError
from lavis_evlgen.runners.checkpointing import checkpoints
from lavis_evlgen.runners.checkpointing.evaluation_resume import (
    PartialRows,
    rows_in_parts,
    settings_digest,
    weights_digest,
)
from lavis_evlgen.tasks.captioning import EvlgenCaptionTask

IDENTITY = {"weights": "a", "data": "b", "settings": "c", "ranks": "0 of 1"}


def numbers(part: slice) -> list[dict]:
    return [{"instance_id": str(n), "loss": n / 7, "caption": "é\n"} for n in range(11)[part]]


def test_parts_come_back_as_they_were(tmp_path):
    kept = PartialRows(tmp_path / "rows.jsonl", IDENTITY)
    for start in (0, 4):
        kept.add(numbers(slice(start, start + 4)))
    again = PartialRows(tmp_path / "rows.jsonl", IDENTITY)
    assert again.rows == numbers(slice(0, 8)) and again.chunks == 2
    asked = []
    found = rows_in_parts(again, 11, 4, lambda part: asked.append(part) or numbers(part))
    assert found == numbers(slice(0, 11)) and asked == [slice(8, 12)]
    again.done()
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize("cut", [1, 5, 40, 41])
def test_a_line_that_was_cut_short_is_done_again(tmp_path, cut):
    file = tmp_path / "rows.jsonl"
    kept = PartialRows(file, IDENTITY)
    kept.add(numbers(slice(0, 4)))
    kept.add(numbers(slice(4, 8)))
    file.write_bytes(file.read_bytes()[:-cut])
    again = PartialRows(file, IDENTITY)
    assert again.chunks == (2 if cut == 1 else 1)  # without its line break alone, a line is whole
    again.add(numbers(slice(4 * again.chunks, 4 * again.chunks + 4)))
    assert PartialRows(file, IDENTITY).rows == again.rows == numbers(slice(0, 4 * again.chunks))


def test_rows_of_another_evaluation_are_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    PartialRows(file, IDENTITY).add(numbers(slice(0, 4)))
    with pytest.raises(ConfigError, match="rows.jsonl holds rows of an unfinished .* with other weights, ranks"):
        PartialRows(file, {**IDENTITY, "weights": "x", "ranks": "0 of 2"})
    assert len(file.read_text().splitlines()) == 2


def test_digests_follow_what_they_are_of():
    weights = {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.tensor(3)}
    turned, changed = dict(reversed(weights.items())), {**weights, "a": torch.zeros(2)}
    digests = [weights_digest(w) for w in (weights, turned, changed, {"c": weights["a"], "b": weights["b"]})]
    assert digests[0] == digests[1] and len(set(digests)) == 3
    settings = [{"a": 1, "b": [2]}, {"b": [2], "a": 1}, {"a": 1, "b": [3]}]
    assert len({settings_digest(s) for s in settings}) == 2


def read(path):
    return json.loads(path.read_text())


def test_an_evaluation_goes_on(finished, tmp_path, monkeypatch, capsys):
    """Three parts of two pictures; the process ends in the third."""
    runs = finished.copy(tmp_path, keep_every=1, batch_size_eval=2)
    best = f"model.pretrained={finished.output() / checkpoints.BEST}"

    def evaluate(name, *options):
        return runs.command(best, f"run.run_name={name}", *options, script="evaluate.py")

    assert evaluate("whole") == 0
    done, captioned = EvlgenCaptionTask.evaluation, []

    def counting(self, *args, **kwargs):
        captioned.append(1)
        if len(captioned) == 3:
            raise KeyboardInterrupt
        return done(self, *args, **kwargs)

    monkeypatch.setattr(EvlgenCaptionTask, "evaluation", counting)
    with pytest.raises(KeyboardInterrupt):
        evaluate("cut")
    left = runs.output("cut") / "result" / "test.rank0.partial.jsonl"
    assert len(left.read_text().splitlines()) == 3  # whose it is, and two parts
    assert evaluate("cut", "run.num_beams=2") == 2
    assert "an unfinished evaluation with other settings" in capsys.readouterr().err.splitlines()[-1]
    assert evaluate("cut") == 0 and len(captioned) == 4
    assert read(left.with_name("test_given.json")) == read(runs.output("whole") / "result" / "test_given.json")
    assert not left.exists()
    assert runs.command(best, "run.run_name=null", script="evaluate.py") == 2
    assert "run.keep_every needs run.run_name" in capsys.readouterr().err.splitlines()[-1]
