"""Pictures that cannot be read, in training and validation."""

import json

import pytest
from PIL import Image

from lavis_evlgen.datasets.facts import adapted
from lavis_evlgen.runners.skipped_samples import SkippedFiles, TooManyBadImages
from tests.run_tools import Runs, log, losses

COUNT, VAL = 14, 4
HTML, TRUNCATED, MISSING = "02.png", "05.png", "07.png"  # of training
REASONS = {HTML: "looks like HTML", TRUNCATED: "broken or truncated", MISSING: "no such file"}


def own_pictures(runs, **keys):
    """A data set of 10 training pictures, three of them bad, and 4 for validation, one of them empty."""
    images = runs.folder / "images"
    images.mkdir(parents=True)
    for n in range(COUNT):
        Image.effect_noise((30, 30), 50 + n).convert("RGB").save(images / f"{n:02d}.png")
    (images / HTML).write_text("<!DOCTYPE html><html>Not found</html>")
    (images / TRUNCATED).write_bytes((images / TRUNCATED).read_bytes()[:300])
    (images / MISSING).unlink()
    (images / f"{COUNT - 1}.png").write_bytes(b"")
    lines = [f'{n:02d}.png,"picture {n} {way}"' for n in range(COUNT) for way in ("once", "twice")]
    (runs.folder / "captions.csv").write_text("\n".join(["image,caption", *lines]) + "\n")
    runs.config["datasets"] = {
        "image_captions": {
            "images": str(images), "captions": str(runs.folder / "captions.csv"),
            "split": {"train": COUNT - VAL, "val": VAL}, "max_bad_fraction": 0.3,
            "vis_processor": runs.config["datasets"]["scenes"]["vis_processor"], **keys,
        }
    }  # fmt: skip
    # several epochs over 20 rows: every bad picture is met often
    runs.config["run"] |= {"max_iters": 20, "iters_per_inner_epoch": 20, "batch_size_train": 4}
    return runs


def named(runs):
    file = runs.output() / "bad_images.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def survived(parts, tmp_path_factory):
    runs = own_pictures(Runs(parts, tmp_path_factory.mktemp("bad")))
    runs.train("run.valid_splits=[val]", "run.num_workers=1")
    return runs


def test_training_goes_on_and_each_is_named_once_with_its_reason(survived):
    assert len(losses(survived.output())) == 20
    in_training = [entry for entry in named(survived) if "split" not in entry]
    entries = {entry["image"].rsplit("/", 1)[1]: entry["reason"] for entry in in_training}
    assert len(entries) == len(in_training) == 3
    for name, reason in REASONS.items():
        assert reason in entries[name]


def test_validation_leaves_them_out_and_counts_them(survived):
    result = json.loads((survived.output() / "result" / "val_20.json").read_text())
    assert result["pictures"] == VAL - 1
    assert [entry["reason"] for entry in result["unreadable"]] == ["the file is empty (0 bytes)"]
    assert json.loads((survived.output() / "run.json").read_text())["unreadable_images"] == {"val": 1, "train": 3}
    assert [entry["split"] for entry in named(survived) if "split" in entry] == ["val"]
    assert [row["step"] for row in log(survived.output()) if "val_loss_right" in row] == [20]


def test_a_resumed_run_does_not_name_them_again(survived):
    before = named(survived)
    last = survived.output() / "checkpoint_last.pth"
    runner = survived.train(f"run.resume_ckpt_path={last}", "run.max_iters=24")
    assert runner.start_step == 20 and len(runner.skipped.files.found) == 3
    assert named(survived) == before


def test_above_max_bad_fraction_a_run_stops_with_one_line(runs, capsys):
    code = own_pictures(runs, max_bad_fraction=0.2).command()
    last = capsys.readouterr().err.splitlines()[-1]
    assert code == 2
    assert last.startswith("train.py: 3 of 10 images are unreadable, more than max_bad_fraction allows (2); the first")
    assert str(runs.output() / "bad_images.jsonl") in last and "max_bad_fraction" in last
    assert len(named(runs)) == 3  # named all the same


class Ten:
    num_images, max_bad_fraction = 10, 0.2

    def __len__(self):
        return 50  # captions


def entries(*names):
    return [{"image": name, "reason": "broken"} for name in names]


def test_the_limit_itself_is_allowed_and_repeats_do_not_count(tmp_path):
    bad = SkippedFiles(tmp_path, [adapted(Ten())])
    bad.add(entries("a", "a", "b")), bad.share(1), bad.check()
    bad.add(entries("b")), bad.share(2), bad.check()
    assert bad.file.read_text().count("\n") == 2
    bad.add(entries("c")), bad.share(3)
    with pytest.raises(TooManyBadImages, match="3 of 10"):
        bad.check()


def test_a_new_run_in_an_old_folder_counts_anew(tmp_path):
    first, resumed, new = (SkippedFiles(tmp_path, [adapted(Ten())]) for _ in range(3))
    first.add(entries("a", "b")), first.share(1)
    resumed.resume_at(1)
    assert set(resumed.found) == {"a", "b"}
    new.resume_at(0)
    assert not new.found and not first.file.exists()


def test_a_data_set_that_says_nothing_tolerates_nothing(tmp_path):
    bad = SkippedFiles(tmp_path, [adapted([1, 2, 3])])
    bad.share(1), bad.check()
    bad.add(entries("a")), bad.share(2)
    with pytest.raises(TooManyBadImages, match="1 of 3"):
        bad.check()
