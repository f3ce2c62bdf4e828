"""Scores of captions in COCO's file format are those that pycocoevalcap computes from the same files."""

import contextlib
import io
import json

import pytest
from pycocoevalcap.cider.cider import Cider

from lavis_evlgen.datasets.annotations.captions import read_captions_file
from lavis_evlgen.evaluation import java
from lavis_evlgen.evaluation.caption_metrics import score_captions, simple_tokenize
from tests.evaluation.test_caption_metrics import PREDICTIONS, REFERENCES


@pytest.fixture
def files(tmp_path):
    """captions_val.json as COCO has it, and a results file as its server takes them."""
    ids = {key: 100 + n for n, key in enumerate(REFERENCES)}
    annotations = [(key, text) for key, own in REFERENCES.items() for text in own]
    coco = {
        "info": {}, "licenses": [], "type": "captions",
        "images": [{"id": n, "file_name": f"COCO_val2014_{n:012d}.jpg"} for n in ids.values()],
        "annotations": [{"id": n, "image_id": ids[key], "caption": text} for n, (key, text) in enumerate(annotations)],
    }  # fmt: skip
    results = [{"image_id": ids[key], "caption": text} for key, text in PREDICTIONS.items()]
    for name, content in (("coco.json", coco), ("results.json", results)):
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path / "coco.json", tmp_path / "results.json"


def ours(files, tokenizer):
    """Our scores of the two files: CIDEr, BLEU, ROUGE-L."""
    references: dict = {}
    for row in read_captions_file(files[0]).rows:
        references.setdefault(row.image_id, []).append(row.caption)
    predictions = {row["image_id"]: row["caption"] for row in json.loads(files[1].read_text())}
    return score_captions(predictions, references, ("CIDEr", "BLEU", "ROUGE_L"), tokenizer)


class Left:
    """In the place of METEOR, tested by itself, and of SPICE, which downloads."""

    def compute_score(self, references, predictions):
        return 0.0, [0.0] * len(references)

    def method(self):
        return "left out"


@pytest.mark.skipif(java.find_java() is None, reason="needs Java on PATH")
def test_equal_to_the_coco_evaluation(files, monkeypatch):
    import pycocoevalcap.eval as coco_eval
    from pycocotools.coco import COCO

    monkeypatch.setattr(coco_eval, "Meteor", Left)
    monkeypatch.setattr(coco_eval, "Spice", Left)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(files[0]))
        evaluation = coco_eval.COCOEvalCap(truth, truth.loadRes(str(files[1])))
        evaluation.evaluate()
    mine = ours(files, "ptb")
    assert mine.scores["CIDEr"] == pytest.approx(evaluation.eval["CIDEr"], abs=1e-6) and mine.scores["CIDEr"] > 0.5
    for n in range(1, 5):
        assert mine.scores[f"BLEU-{n}"] == pytest.approx(evaluation.eval[f"Bleu_{n}"], abs=1e-6)
    assert mine.scores["ROUGE_L"] == pytest.approx(evaluation.eval["ROUGE_L"], abs=1e-6)
    each = {row["image_id"]: row["CIDEr"] for row in evaluation.evalImgs}
    assert {key: row["CIDEr"] for key, row in mine.per_sample.items()} == pytest.approx(each, abs=1e-6)


def test_without_java_equal_to_its_scorers(files):
    truth = json.loads(files[0].read_text())
    references: dict = {}
    for row in truth["annotations"]:
        references.setdefault(row["image_id"], []).append(simple_tokenize(row["caption"]))
    said = {row["image_id"]: [simple_tokenize(row["caption"])] for row in json.loads(files[1].read_text())}
    expected = Cider().compute_score(references, said)[0]
    assert ours(files, "simple").scores["CIDEr"] == pytest.approx(expected, abs=1e-6)
