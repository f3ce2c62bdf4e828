"""COCO from files that are here: LAVIS's coco_caption, and its annotation files read by image_captions."""

import json

import pytest
from PIL import Image

from tests.run_tools import losses


@pytest.fixture
def coco(runs, monkeypatch):
    """A run on eight pictures with annotation files as LAVIS has them, where nothing can be downloaded."""
    import torchvision.datasets.utils as downloads

    monkeypatch.setattr(downloads, "_urlretrieve", lambda *a, **k: pytest.fail("it downloads"))
    names = [f"train2014/COCO_train2014_{n:012d}.jpg" for n in range(4)]
    names += [f"val2014/COCO_val2014_{n:012d}.jpg" for n in range(4, 8)]
    for name in names:
        path = runs.folder / "coco" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((30, 30), 90).convert("RGB").save(path)
    rows = [{"caption": f"picture {n}", "image": name, "image_id": f"coco_{n}"} for n, name in enumerate(names)]
    scored = [{"image": row["image"], "caption": [row["caption"], "the same again"]} for row in rows[4:]]
    runs.files = {}
    for split, content in {"train": rows[:4], "val": scored[:2], "test": scored[2:]}.items():
        runs.files[split] = str(runs.folder / f"coco_karpathy_{split}.json")
        (runs.folder / f"coco_karpathy_{split}.json").write_text(json.dumps(content))
    runs.vis = runs.config["datasets"]["scenes"]["vis_processor"]
    return runs


def test_image_captions_reads_the_annotation_files_of_lavis(coco):
    keys = {"images": str(coco.folder / "coco"), "annotations": coco.files, "vis_processor": coco.vis}
    coco.config["datasets"] = {"image_captions": keys}
    runner = coco.train("run.valid_splits=[val]")
    assert len(losses(coco.output())) == 4
    assert runner.datasets["image_captions"]["val"].references["val2014/COCO_val2014_000000000004.jpg"] == [
        "picture 4", "the same again",
    ]  # fmt: skip


def test_the_builder_of_lavis_trains_and_is_refused_where_it_cannot_be_scored(coco, capsys):
    annotations = {split: {"storage": path} for split, path in coco.files.items()}
    coco.config["datasets"]["coco_caption"] = {
        "build_info": {"annotations": annotations, "images": {"storage": str(coco.folder / "coco")}},
        "vis_processor": coco.vis,
        "text_processor": {stage: {"name": "evlgen_caption"} for stage in ("train", "eval")},
    }
    coco.config["datasets"]["scenes"]["sizes"] = {"train": 4, "val": 0}
    coco.config["run"]["train_dataset_ratios"] = {"coco_caption": 3, "scenes": 1}
    coco.train("run.num_workers=1")
    assert len(losses(coco.output())) == 4
    assert coco.command("run.valid_splits=[val]", "run.run_name=other") == 2
    assert "coco_caption has no references to score against: read its annotations with image_captions" in (
        capsys.readouterr().err.splitlines()[-1]
    )
