import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lavis.common.registry import registry
from omegaconf import OmegaConf
from PIL import Image
from torchvision import transforms

from lavis_evlgen.processors import (
    EvlgenCaptionProcessor,
    EvlgenImageEvalProcessor,
    EvlgenImageTrainProcessor,
)
from lavis_evlgen.processors.images import STATISTICS

ONE_STEP = 1.01 / 255 / 0.224  # Pillow and torch round resized pixels each in its own way
NOISE = Image.fromarray(np.random.RandomState(0).randint(0, 256, (40, 60, 3), dtype=np.uint8))


def made(name, **keys):
    return registry.get_processor_class(name).from_config(OmegaConf.create({"name": name, **keys}))


@pytest.mark.parametrize("name", ["evlgen_image_train", "evlgen_image_eval"])
def test_images_become_normalised_squares(name):
    grey = Image.new("RGB", (50, 30), (128, 128, 128))
    for key, (mean, std) in STATISTICS.items():
        image = made(name, image_size=20, mean=key)(grey)
        assert image.shape == (3, 20, 20) and image.dtype == torch.float32
        expected = (128 / 255 - torch.tensor(mean)) / torch.tensor(std)
        assert torch.allclose(image.mean((1, 2)), expected, atol=1e-4)
    numbers = made(name, image_size=20, mean=[0, 0, 0], std=[1, 1, 1])(grey)
    assert torch.allclose(numbers, torch.full_like(numbers, 128 / 255))


def test_whole_picture_without_crop_and_flip():
    train, evaluate = EvlgenImageTrainProcessor(16, min_scale=1.0, flip=False), EvlgenImageEvalProcessor(16)
    assert (train(NOISE) - evaluate(NOISE)).abs().max() < ONE_STEP


@pytest.mark.parametrize("width, height", [(60, 40), (400, 300), (30, 500), (17, 11)])
@pytest.mark.parametrize("min_scale", [0.3, 0.5, 1.0])
def test_training_makes_of_a_picture_what_torchvision_makes_of_it_with_pillow(width, height, min_scale):
    pixels = np.random.RandomState(width).randint(0, 256, (height, width, 3), dtype=np.uint8)
    soft = Image.fromarray(pixels).resize((width, height), Image.BICUBIC, box=(0, 0, width / 4, height / 4))
    bicubic = {"interpolation": transforms.InterpolationMode.BICUBIC, "antialias": True}
    resize = transforms.Resize((24, 24), **bicubic)
    if min_scale < 1:
        resize = transforms.RandomResizedCrop(24, scale=(min_scale, 1.0), **bicubic)
    mean, std = STATISTICS["imagenet"]
    steps = [resize, transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(mean, std)]
    slow, fast = transforms.Compose(steps), EvlgenImageTrainProcessor(24, min_scale=min_scale)
    for picture in (Image.fromarray(pixels), soft):
        for seed in range(5):
            torch.manual_seed(seed)
            expected = slow(picture)
            torch.manual_seed(seed)
            found = fast(picture)
            assert found.is_contiguous() and (found - expected).abs().mean() < 0.5 * ONE_STEP
            if picture is soft:  # of noise, what overshoots is cut off after the first pass, and passes change places
                assert (found - expected).abs().max() < ONE_STEP


def test_crops_and_flips_follow_torchs_seed():
    for keys in ({"min_scale": 0.3, "flip": False}, {"min_scale": 1.0, "flip": True}):
        processor = EvlgenImageTrainProcessor(16, **keys)
        runs = []
        for seed in (0, 0):
            torch.manual_seed(seed)
            runs.append(torch.stack([processor(NOISE) for _ in range(8)]))
        assert torch.equal(*runs)
        assert len({image.numpy().tobytes() for image in runs[0]}) > 1


def test_unknown_and_impossible_keys():
    with pytest.raises(ValueError, match="unknown key img_size; did you mean image_size"):
        made("evlgen_image_train", img_size=3)
    with pytest.raises(ValueError, match="mean=laion must be clip"):
        made("evlgen_image_eval", mean="laion")
    with pytest.raises(ValueError, match="std must be too"):
        made("evlgen_image_eval", mean=[0, 0, 0])
    with pytest.raises(ValueError, match="three numbers above 0"):
        made("evlgen_image_eval", std=[0, 1, 1])
    with pytest.raises(ValueError, match="min_scale=0"):
        made("evlgen_image_train", min_scale=0)
    with pytest.raises(ValueError, match="image_size=0"):
        made("evlgen_image_eval", image_size=0)
    with pytest.raises(ValueError, match="max_words=0"):
        made("evlgen_caption", max_words=0)


def test_captions_are_cleaned():
    assert EvlgenCaptionProcessor()(" A  dog\truns ,\nfast . ") == "a dog runs , fast"
    assert made("evlgen_caption", lower=False)("A Dog!") == "A Dog"
    assert made("evlgen_caption", max_words=2, prompt="a photo of ")("One two three.") == "a photo of one two"


@given(st.text())
def test_caption_cleaning_is_idempotent(text):
    clean = EvlgenCaptionProcessor(max_words=5)
    assert clean(clean(text)) == clean(text)
    assert clean(text) == " ".join(clean(text).split())
