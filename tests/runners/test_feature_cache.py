"""Tokens of the frozen ViT kept on disk: the same run without the ViT, continued after a kill, refused when stale."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from lavis_evlgen import cli
from lavis_evlgen.config import ConfigError
from lavis_evlgen.datasets import ImageShards, cached_features
from lavis_evlgen.datasets.cached_features import FeatureWriter
from lavis_evlgen.datasets.facts import adapted
from lavis_evlgen.datasets.loading import train_loader
from lavis_evlgen.models.vision.encoder import VisionEncoder
from lavis_evlgen.runners import feature_filling
from lavis_evlgen.runners.checkpointing.lock import RunLock
from lavis_evlgen.runners.feature_cache import check_dataset, check_model
from tests.processes import on_two_ranks, run
from tests.run_tools import Runs, checkpoint, losses, same_tensors
from tests.tiny import IMAGE_SIZE, tiny_evlgen

TRAIN, VAL = 6, 4
BROKEN = ("03.png", "08.png")  # of training, of validation
WHOLE = {"image_size": IMAGE_SIZE, "mean": "half", "min_scale": 1.0, "flip": False}
DRAWN = {**WHOLE, "min_scale": 0.3, "flip": True}


def photos(runs: Runs, train_processor=WHOLE, **run) -> Runs:
    """Six training pictures with two captions each, four for validation; one of each is broken."""
    images = runs.folder / "images"
    images.mkdir(parents=True)
    for n in range(TRAIN + VAL):
        Image.effect_noise((30, 30), 50 + n).convert("RGB").save(images / f"{n:02d}.png")
    for name in BROKEN:
        (images / name).write_bytes((images / name).read_bytes()[:300])
    lines = [f'{n:02d}.png,"picture {n} {way}"' for n in range(TRAIN + VAL) for way in ("once", "twice")]
    (runs.folder / "captions.csv").write_text("\n".join(["image,caption", *lines]) + "\n")
    evaluation = {"name": "evlgen_image_eval", "image_size": IMAGE_SIZE, "mean": "half"}
    runs.config["datasets"] = {
        "image_captions": {
            "images": str(images), "captions": str(runs.folder / "captions.csv"),
            "split": {"train": TRAIN, "val": VAL}, "max_bad_fraction": 0.3,
            "vis_processor": {"train": {"name": "evlgen_image_train", **train_processor}, "eval": evaluation},
        }
    }  # fmt: skip
    runs.config["run"] |= {"max_iters": 5, "iters_per_inner_epoch": 5, "valid_splits": ["val"], **run}
    return runs


def result(runs: Runs, name="run", file="val_5.json") -> dict:
    return json.loads((runs.output(name) / "result" / file).read_text())


def use_cache(runs: Runs, folder=None) -> str:
    return f"run.cache_features={folder or runs.folder / 'cache'}"


def stored(folder, split="train", name="image_captions") -> np.ndarray:
    return np.load(folder / f"{name}-{split}.npy", allow_pickle=False)


def index(folder, split="train") -> dict:
    return json.loads((folder / f"image_captions-{split}.json").read_text())


@pytest.fixture(scope="module")
def plain(parts, tmp_path_factory) -> Runs:
    """A run that decodes every picture, with dropout."""
    runs = photos(Runs(parts, tmp_path_factory.mktemp("plain")))
    runs.config["model"] |= {"dropout": 0.2}
    runs.train()
    return runs


@pytest.fixture(scope="module")
def cached(plain) -> Runs:
    """The same run from a cache that it filled itself."""
    runs = plain.copy(plain.folder)
    runs.runner = runs.train(use_cache(runs), "run.run_name=cached")
    return runs


def own_copy(runs: Runs, folder) -> Runs:
    """The runs with pictures and cache of their own, to be changed."""
    other = runs.copy(folder)
    shutil.copytree(runs.folder / "images", folder / "images")
    shutil.copytree(runs.folder / "cache", folder / "cache")
    other.config["datasets"]["image_captions"]["images"] = str(folder / "images")
    return other


def test_training_from_the_cache_is_training_on_the_pictures(plain, cached):
    assert losses(cached.output("cached")) == losses(plain.output())
    assert len(losses(plain.output())) == 5
    weights = [checkpoint(plain.output(name))["model"] for name in ("run", "cached")]
    assert same_tensors(*weights)


def test_evaluation_and_its_picture_sheet_are_the_same(plain, cached):
    with_pictures, without = result(plain), result(cached, "cached")
    assert without == with_pictures and without["pictures"] == VAL - 1
    assert (cached.output("cached") / "captions.png").exists()


def test_unreadable_pictures_are_named_and_counted_as_ever(plain, cached):
    named = [(plain.output(name) / "bad_images.jsonl").read_text().splitlines() for name in ("run", "cached")]
    assert sorted(named[0]) == sorted(named[1]) and len(named[0]) == 2
    cards = [json.loads((plain.output(name) / "run.json").read_text()) for name in ("run", "cached")]
    assert cards[0]["unreadable_images"] == cards[1]["unreadable_images"] == {"val": 1, "train": 1}


def test_several_texts_of_a_picture_share_its_tokens(plain, cached, tmp_path):
    runs = plain.copy(tmp_path, texts_per_image=2)
    runs.train("run.run_name=without")
    runs.train(use_cache(cached))
    assert losses(runs.output()) == losses(runs.output("without")) != losses(plain.output())
    train, tokens = cached.runner.datasets["image_captions"]["train"], stored(cached.folder / "cache")
    batch = next(iter(train_loader([train], None, 3, 0, 0, 1, 0, 0, False, texts_per_image=2)))
    assert batch["image"].shape == (3, 17, 24) and batch["texts_per_image"] == [2, 2, 2]
    for name, found in zip(batch["image_id"][::2], batch["image"].numpy(), strict=True):
        assert np.array_equal(found, tokens[int(name[:2])])


def test_each_picture_is_stored_once(cached):
    folder = cached.folder / "cache"
    assert stored(folder).shape == (TRAIN, 17, 24) and stored(folder).dtype == np.float32  # not by caption
    assert stored(folder, "val").shape[0] == VAL
    about = index(folder)
    assert about["identity"]["processor"]["min_scale"] == 1.0 and "torch" in about["versions"]
    assert set(about["records"]) == set(about["names"]) and "broken" in about["records"][BROKEN[0]]["reason"]
    assert not list(folder.glob("*.rank*")) and not (folder / feature_filling.LOCK).exists()


def test_a_full_cache_needs_neither_the_encoder_nor_a_decoder(plain, cached, tmp_path, monkeypatch, capfd):
    runs = cached.copy(tmp_path)

    def refuse(*_):
        raise AssertionError("the cache is full")

    monkeypatch.setattr(VisionEncoder, "forward", refuse)
    monkeypatch.setattr("lavis_evlgen.datasets.builders.image_folder.open_image", refuse)
    runs.train(use_cache(cached), "run.num_workers=1", "run.sheet_pictures=0")
    assert losses(runs.output()) == losses(plain.output())
    assert f"cached features  {cached.folder / 'cache'}, {TRAIN + VAL} pictures, 0.00 GB" in capfd.readouterr().err


def test_an_evaluation_reads_the_cache_that_training_filled(plain, cached, tmp_path):
    runs = plain.copy(tmp_path, test_splits=["val"], valid_splits=[])
    weights = f"model.pretrained={plain.output() / 'checkpoint_last.pth'}"
    before = (cached.folder / "cache" / "image_captions-val.json").stat().st_mtime_ns
    for name, options in {"without": [], "with": [use_cache(cached)]}.items():
        runs.train(weights, f"run.run_name={name}", *options, evaluate=True)
    assert result(runs, "with", "val_given.json") == result(runs, "without", "val_given.json")
    assert (cached.folder / "cache" / "image_captions-val.json").stat().st_mtime_ns == before


def kill_in_mid_write(monkeypatch, after: int):
    """The process ends in the middle of writing its picture number `after`, tokens without their record."""
    add, flush, calls = FeatureWriter.add, FeatureWriter.flush, []

    def counted(self, name, record, tokens):
        calls.append(name)
        if len(calls) == after:
            monkeypatch.setattr(cached_features, "FLUSH_SECONDS", 1e9)
            add(self, name, record, torch.zeros_like(tokens))
            self.file.flush()
            os._exit(9)
        add(self, name, record, tokens)

    monkeypatch.setattr(FeatureWriter, "add", counted)
    monkeypatch.setattr(FeatureWriter, "flush", flush)
    monkeypatch.setattr(cached_features, "FLUSH_SECONDS", 0.0)


def test_a_cache_that_was_cut_off_is_continued(cached, tmp_path, monkeypatch):
    runs = cached.copy(tmp_path)
    with monkeypatch.context() as patch:
        kill_in_mid_write(patch, after=3)
        with run(runs, use_cache(runs)) as process:
            assert process.wait() == 9, process.words
    folder = tmp_path / "cache"
    progress = folder / "image_captions-train.rank0.jsonl"
    assert len(progress.read_text().splitlines()) == 2 and not index(folder)["records"]
    assert not np.array_equal(stored(folder), stored(cached.folder / "cache"))
    progress.write_text(progress.read_text() + '{"records": {"0')  # a kill in the middle of a line
    read = []
    processed = cached_features.PicturesToStore.__getitem__
    monkeypatch.setattr(
        cached_features.PicturesToStore, "__getitem__", lambda self, n: read.append(self.rows[n]["image"]) or
        processed(self, n)
    )  # fmt: skip
    runs.train(use_cache(runs))
    assert len(read) == TRAIN + VAL - 2
    for split in ("train", "val"):
        assert np.array_equal(stored(folder, split), stored(cached.folder / "cache", split))
        assert index(folder, split)["records"] == index(cached.folder / "cache", split)["records"]


def test_two_ranks_fill_one_cache(cached, tmp_path):
    runs = cached.copy(tmp_path, max_iters=1, iters_per_inner_epoch=1, blind_shuffles=1)
    on_two_ranks(runs, use_cache(runs))
    for split in ("train", "val"):
        assert np.array_equal(stored(tmp_path / "cache", split), stored(cached.folder / "cache", split))
        assert index(tmp_path / "cache", split)["records"] == index(cached.folder / "cache", split)["records"]
    assert not list((tmp_path / "cache").glob("*.rank*"))


@pytest.mark.parametrize("change, words", [
    ({"model.vit_layer": 1}, r"encoder.layer \(None there, 1 here\), encoder.parameters \(\d+ there, \d+ here\)"),
    ({"model.vit_precision": "bf16"}, r"computed \(float32 there, bfloat16 here\)"),
    ({"run.amp": "bf16", "run.cache_precision": "fp32"}, r"another computed \(float32 there, bfloat16 here\)"),
    ({"run.cache_precision": "fp16"}, r"another dtype \(float32 there, float16 here\)"),
    ({"datasets.image_captions.vis_processor.train.mean": "clip"}, r"processor.mean \(half there, clip here\)"),
    ({"datasets.image_captions.split": f"{{train: {TRAIN + 1}, val: {VAL - 1}}}"},
     "1 of the 7 pictures are not in it, such as 06.png"),
])  # fmt: skip
def test_a_cache_of_other_settings_is_refused(cached, tmp_path, change, words):
    runs = cached.copy(tmp_path)
    with pytest.raises(ConfigError, match=f"{words}.*; delete {cached.folder / 'cache'}, or set run.cache_features"):
        runs.train(use_cache(cached), *(f"{key}={value}" for key, value in change.items()))


def test_other_weights_of_the_encoder_are_refused(cached, tmp_path):
    from safetensors.torch import load_file, save_file

    runs = cached.copy(tmp_path)
    shutil.copytree(cached.config["model"]["vit_model"], tmp_path / "vit")
    weights = load_file(tmp_path / "vit" / "model.safetensors")
    changed = {name: value * 1.001 for name, value in weights.items()}
    save_file(changed, tmp_path / "vit" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="vision encoder: its weights are others; delete"):
        runs.train(use_cache(cached), f"model.vit_model={tmp_path / 'vit'}")


def test_changed_pictures_are_refused_and_repaired_ones_are_stored(cached, tmp_path):
    runs = own_copy(cached, tmp_path)
    for image in (tmp_path / "images").iterdir():  # copied anew, as by a tool that keeps no times
        os.utime(image, ns=(1, 1))
    Image.effect_noise((30, 30), 9).convert("RGB").save(tmp_path / "images" / BROKEN[0])
    runs.train(use_cache(runs))
    assert "reason" not in index(tmp_path / "cache")["records"][BROKEN[0]]
    assert stored(tmp_path / "cache")[3].any() and not stored(cached.folder / "cache")[3].any()
    picture = tmp_path / "images" / "01.png"
    shutil.copy(tmp_path / "images" / "02.png", picture)
    with pytest.raises(ConfigError, match=f"1 pictures have changed since, the first is {picture}; delete"):
        runs.train(use_cache(runs), "run.run_name=again")


def test_a_picture_uses_its_views_in_turn(plain, tmp_path):
    runs = photos(Runs(plain.config["model"], tmp_path), DRAWN)
    runs.config["model"] = plain.config["model"]
    runner = runs.train(use_cache(runs), "run.cache_views=3", "run.batch_size_train=5")
    tokens = stored(tmp_path / "cache").reshape(TRAIN, 3, 17, 24)
    assert not any(np.array_equal(tokens[0, a], tokens[0, b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    train = runner.datasets["image_captions"]["train"]
    loader = iter(train_loader([train], None, len(train), 0, 0, 1, 0, num_workers=1, pin_memory=False))
    for epoch in range(4):  # a batch is an epoch
        batch = next(loader)
        for name, found in zip(batch["image_id"], batch["image"].numpy(), strict=True):
            assert np.array_equal(found, tokens[int(name[:2]), epoch % 3])
    assert stored(tmp_path / "cache", "val").shape[0] == VAL  # evaluation draws nothing


def test_a_cache_in_bfloat16_changes_a_run_by_the_rounding_of_tokens_alone(plain, tmp_path, monkeypatch):
    runs, forward = plain.copy(tmp_path, amp="bf16", valid_splits=[]), VisionEncoder.forward
    monkeypatch.setattr(VisionEncoder, "forward", lambda self, image: forward(self, image).bfloat16().float())
    runs.train("run.run_name=rounded")
    monkeypatch.undo()
    runs.train("run.run_name=without")
    runs.train(use_cache(runs, tmp_path / "fp32"), "run.cache_precision=fp32", "run.run_name=fp32")
    assert stored(tmp_path / "fp32").dtype == np.float32
    assert losses(runs.output("fp32")) == losses(runs.output("without")) != losses(runs.output("rounded"))
    runs.train(use_cache(runs), "run.valid_splits=[val]")
    assert stored(tmp_path / "cache").dtype == np.uint16
    assert stored(tmp_path / "cache", "val").dtype == np.float32  # evaluation has no autocast
    assert losses(runs.output()) == losses(runs.output("rounded"))


def test_stages_share_a_cache_or_are_told_before_they_train(cached, tmp_path):
    runs = cached.copy(tmp_path, max_iters=1, iters_per_inner_epoch=1, valid_splits=[])
    runs.config["stages"] = [{"name": "align"}, {"name": "last", "trains": ["connector.*"]}]
    runs.train(use_cache(cached))
    assert losses(runs.output() / "2_last").keys() == {1}
    other = json.loads(json.dumps(runs.config["datasets"]))
    other["image_captions"]["vis_processor"]["train"]["mean"] = "clip"
    runs.config["stages"][1]["datasets"] = other
    with pytest.raises(ConfigError, match="image_captions-train, which .* set stages.last.run.cache_features=ANOTHER"):
        runs.train(use_cache(cached), "run.run_name=other")
    assert not (runs.output("other") / "1_align").exists()


@pytest.mark.parametrize("options, words", [
    (["run.cache_views=2"], "run.cache_views=2 needs run.cache_features"),
    (["run.cache_precision=fp16"], "run.cache_precision=fp16 needs run.cache_features"),
    (["run.cache_features=cache", "run.cache_views=2"], "no training processor draws anything"),
    (["run.cache_features=cache", "datasets.image_captions.vis_processor.train.flip=true"],
     "crops or mirrors at random.*run.cache_views=K.*train.min_scale=1 and flip=false"),
    (["run.cache_features=cache", "datasets.image_captions.vis_processor.train={name: blip_image_train}"],
     "not read by a data set and an image processor of this package"),
    (["run.cache_features=cache", "model.arch=evlgen_video", "model.model_type=quickstart"],
     "evlgen_video reads clips"),
])  # fmt: skip
def test_what_is_no_function_of_the_row_is_refused(cached, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=words):
        cached.copy(tmp_path).train(*options)
    assert not (tmp_path / "cache").exists()


def test_models_and_data_sets_of_other_kinds_are_refused():
    model = tiny_evlgen()
    check_model(model)
    next(model.visual_encoder.parameters()).requires_grad_(True)
    with pytest.raises(ConfigError, match="here the ViT trains .visual_encoder.vit"):
        check_model(model)
    with pytest.raises(ConfigError, match="Linear is no model.arch=evlgen"):
        check_model(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="shards is of tar shards, which have no fixed rows"):
        check_dataset("shards", object.__new__(ImageShards), 1)
    with pytest.raises(ConfigError, match="coco_caption is not read by a data set .* of this package"):
        check_dataset("coco_caption", adapted([{"image": None}]), 1)


def test_drawn_pictures_are_told_apart_by_what_defines_them(runs, tmp_path):
    runs.config["datasets"]["scenes"]["vis_processor"]["train"] |= {"min_scale": 1.0, "flip": False}
    runs.config["run"] |= {"max_iters": 1, "iters_per_inner_epoch": 1}
    runs.train(use_cache(runs))
    assert stored(tmp_path / "cache", name="scenes").shape == (12, 17, 24)
    with pytest.raises(ConfigError, match="scenes-train.json does not fit .* another data"):
        runs.train(use_cache(runs), "run.run_name=other", "datasets.scenes.seed=1")


def test_one_run_fills_a_cache_at_a_time(cached, tmp_path):
    runs = cached.copy(tmp_path)
    (tmp_path / "cache").mkdir()
    lock = RunLock(tmp_path / "cache", name=feature_filling.LOCK)
    lock.take()
    try:
        with pytest.raises(ConfigError, match="in use by another run .* another run.cache_features"):
            runs.train(use_cache(runs))
    finally:
        lock.release()


def test_doctor_says_what_it_takes_on_disk(cached, tmp_path, monkeypatch, capsys):
    def finding(folder):
        words = ["doctor", str(cached.path()), "--options", f"run.cache_features={folder}"]
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        return end.value.code, next(line for line in capsys.readouterr().out.splitlines() if "cached features:" in line)

    pictures = TRAIN + VAL
    code, line = finding(tmp_path / "new")
    assert code == 0 and line.startswith(f"ok    cached features: {tmp_path / 'new'}, {pictures} pictures, 0.00 GB: ")
    assert not (tmp_path / "new").exists()
    free = shutil.disk_usage(tmp_path)._replace(free=pictures * 17 * 24 * 4 - 1)
    monkeypatch.setattr(feature_filling.shutil, "disk_usage", lambda _: free)
    code, line = finding(tmp_path / "new")
    assert code == 1 and line.startswith("FAIL") and "free space" in line
    assert finding(cached.folder / "cache")[0] == 0  # it is there already


def test_a_disk_without_room_is_one_line(cached, tmp_path, monkeypatch, capsys):
    free = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(feature_filling.shutil, "disk_usage", lambda _: free)
    runs = cached.copy(tmp_path)
    assert runs.command(use_cache(runs)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "GB to be stored, 0.00 GB free: free space, or give a folder on another disk" in line


def test_a_folder_that_cannot_be_made_is_one_line(cached, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file")
    runs = cached.copy(tmp_path)
    assert runs.command(use_cache(runs)) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"train.py: {tmp_path / 'cache'}")


def test_tokens_that_overflow_are_refused(cached, tmp_path, monkeypatch):
    forward = VisionEncoder.forward
    monkeypatch.setattr(VisionEncoder, "forward", lambda self, image: forward(self, image) * 1e39)
    with pytest.raises(ConfigError, match=r"tokens of 00.png \(image_captions train\) are not finite as float32"):
        runs = cached.copy(tmp_path)
        runs.train(use_cache(runs))
