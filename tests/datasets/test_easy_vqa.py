"""The easy-vqa builder, on a tiny package of its shape, and on the real one where it is installed."""

import importlib.util
import sys

import pytest
from omegaconf import OmegaConf
from PIL import Image

from lavis_evlgen.compat.environment import MissingExtra
from lavis_evlgen.datasets import EasyVqaBuilder

# a stand-in with the interface of easy-vqa 1.0: (questions, answers, picture numbers), {picture number: path}
PACKAGE = '''
from pathlib import Path
DATA = Path(__file__).parent / "data"
def _questions(count):
    texts = ["is it red?", "what is the shape?", "what color is it?"] * count
    return texts, ["yes", "circle", "red"] * count, [n for n in range(count) for _ in range(3)]
def _paths(split):
    return {int(path.stem): str(path) for path in (DATA / split / "images").glob("*.png")}
def get_train_questions(): return _questions(16)
def get_test_questions(): return _questions(4)
def get_train_image_paths(): return _paths("train")
def get_test_image_paths(): return _paths("test")
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder that holds the stand-in, importable as easy_vqa."""
    folder = tmp_path / "easy_vqa"
    for split, count in (("train", 16), ("test", 4)):
        (folder / "data" / split / "images").mkdir(parents=True)
        for n in range(count):
            Image.new("RGB", (64, 64), (n, 0, 0)).save(folder / "data" / split / "images" / f"{n}.png")
    (folder / "__init__.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "easy_vqa", raising=False)
    yield folder
    sys.modules.pop("easy_vqa", None)


def build(**keys):
    config = OmegaConf.load(EasyVqaBuilder.default_config_path()).datasets.easy_vqa
    for stage in ("train", "eval"):
        config.vis_processor[stage].image_size = 16
    return EasyVqaBuilder(OmegaConf.merge(config, keys)).build_datasets()


def test_splits_and_samples(package):
    found = build()
    assert {split: (data.num_images, len(data)) for split, data in found.items()} == {
        "train": (14, 42), "val": (2, 6), "test": (4, 12)
    }
    assert {row["image_id"] for row in found["val"].annotation} == {7, 15}
    assert 7 not in {row["image_id"] for row in found["train"].annotation}
    sample = found["test"][4]
    assert (sample["question"], sample["answer"]) == ("what is the shape?", "circle")
    assert found["test"].pil_image(4).getpixel((0, 0)) == (1, 0, 0)
    assert set(found["val"].kinds.values()) == {"yes/no", "shape", "colour"}
    assert found["val"].missing_files() == [] and sample["image"].shape == (3, 16, 16)


def test_fewer_pictures(package):
    found = build(pictures={"train": 7, "test": 2})
    assert (found["train"].num_images, found["val"].num_images, found["test"].num_images) == (7, 2, 2)


def test_pictures_that_are_not_there_are_told(package):
    (package / "data" / "test" / "images" / "2.png").unlink()
    with pytest.raises(ValueError, match="easy_vqa: test question 6 is about picture 2, which is not there"):
        build()


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(MissingExtra, match="easy_vqa is not installed.*--extra quickstart"):
        build()


@pytest.mark.skipif(importlib.util.find_spec("easy_vqa") is None, reason="needs the package easy-vqa")
def test_the_real_package():
    found = build()
    assert sum(len(data) for split, data in found.items() if split != "test") == 38575
    assert len(found["test"]) == 9673 and found["test"].num_images == 1000 and found["val"].num_images == 500
    assert len({answer for own in found["test"].answers.values() for answer in own}) == 13
    assert found["test"].pil_image(0).size == (64, 64)
