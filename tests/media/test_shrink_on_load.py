"""JPEGs decoded at a part of their size: never too small, never changed where they are small, off when asked."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lavis.common.registry import registry
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from lavis_evlgen.media.errors import UnreadableImage
from lavis_evlgen.media.images import decode_image, open_image
from lavis_evlgen.processors import EvlgenImageEvalProcessor, EvlgenImageTrainProcessor, EvlgenVideoTrainProcessor
from lavis_evlgen.processors.images import least_for_crops, pixels
from tests.datasets.helpers import builder, write_csv
from tests.datasets.shard_tools import image_shards, sample, write_shard


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Soft shapes, as in a photograph: noise has nothing in common with itself at half the size."""
    small = np.random.RandomState(seed).randint(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.BICUBIC)


def file_of(image: Image.Image, kind: str = "JPEG", **keys) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **{"quality": 95, **keys} if kind == "JPEG" else keys)
    return content.getvalue()


@settings(deadline=None, max_examples=60)
@given(st.integers(20, 3000), st.integers(20, 3000), st.sampled_from([0.08, 0.25, 0.5, 0.9]), st.integers(1, 10**6))
def test_no_crop_is_ever_enlarged_by_it(width, height, min_scale, seed):
    size = 32
    least = least_for_crops(size, min_scale, width, height)
    shrink = next(s for s in (8, 4, 2, 1) if min(width // least[0], height // least[1]) >= s or s == 1)  # as Pillow
    if shrink > 1:
        picture = torch.empty(3, -(-height // shrink), -(-width // shrink), device="meta")
        torch.manual_seed(seed)
        for _ in range(5):
            assert min(RandomResizedCrop.get_params(picture, [min_scale, 1.0], [3 / 4, 4 / 3])[2:]) >= size


def test_large_jpegs_are_decoded_at_a_part_of_their_size():
    content = file_of(photograph(640, 480))
    for processor, size in (
        (EvlgenImageEvalProcessor(64, shrink_on_load=True), (160, 120)),  # at 1/8 it would be 60 high
        (EvlgenImageEvalProcessor(64), (640, 480)),
        (EvlgenImageTrainProcessor(64, min_scale=0.5), (160, 120)),  # crops of 339 and more: 84 at 1/4
        (EvlgenImageTrainProcessor(64, min_scale=0.05), (640, 480)),
        (EvlgenImageTrainProcessor(64, shrink_on_load=False), (640, 480)),
        (registry.get_processor_class("blip_image_train")(64), (640, 480)),
    ):
        height, width = pixels(decode_image(content, "large.jpg", processor)).shape[1:]
        assert (width, height) == size


def test_what_shrinking_changes_is_small():
    content = file_of(photograph(640, 480))
    plain = {"mean": [0, 0, 0], "std": [1, 1, 1]}
    kept, shrunk = (EvlgenImageEvalProcessor(64, **plain, shrink_on_load=shrink) for shrink in (False, True))
    distance = kept(decode_image(content, "", kept)) - shrunk(decode_image(content, "", shrunk))
    distance = 255 * distance.abs()  # levels
    assert 0 < distance.max() <= 12 and distance.mean() < 1.5, (distance.max(), distance.mean())


def test_small_pictures_and_other_formats_stay_as_they_are():
    processor = EvlgenImageTrainProcessor(64)
    for content in (file_of(photograph(160, 120)), file_of(photograph(640, 480), "PNG")):
        whole, given = decode_image(content, ""), decode_image(content, "", processor)
        assert torch.equal(pixels(given), pixels(whole))


def test_turned_and_truncated_jpegs():
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    processor = EvlgenImageTrainProcessor(64)
    assert decode_image(file_of(photograph(640, 480), exif=exif), "turned.jpg", processor).size == (120, 160)
    content = file_of(photograph(640, 480))
    with pytest.raises(UnreadableImage, match="broken or truncated"):
        decode_image(content[: len(content) // 2], "cut.jpg", processor)


class Sizes:
    """A processor that needs little, and tells what it gets."""

    def least_size(self, width: int, height: int) -> tuple[int, int]:
        return 80, 60

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return torch.tensor(image.size)


def test_data_sets_ask_their_processor(tmp_path):
    (tmp_path / "images").mkdir()
    content = file_of(photograph(640, 480))
    (tmp_path / "images" / "0.jpg").write_bytes(content)
    captions = write_csv(tmp_path / "captions.csv", [("0.jpg", "a picture")])
    files = builder(tmp_path, annotations={"train": str(captions)}).build_datasets()["train"]
    files.vis_processor = Sizes()
    assert files[0]["image"].tolist() == [80, 60]
    shards = image_shards(str(write_shard(tmp_path / "0.tar", sample("0", image=content))))
    shards.vis_processor = Sizes()
    assert shards._open(content, "0").size == (80, 60)
    assert open_image(tmp_path / "images" / "0.jpg").size == (640, 480)


def test_frames_of_clips_have_no_such_key():
    with pytest.raises(ValueError, match="unknown key shrink_on_load"):
        EvlgenVideoTrainProcessor.from_config({"shrink_on_load": True})


def test_pixels_are_those_of_lavis():
    """By LAVIS's own processors: evaluation bit by bit, training draw by draw, at most two steps of 255 apart."""
    for width, height in ((640, 480), (50, 90), (224, 224)):
        picture = photograph(max(width, 16), height)
        theirs = registry.get_processor_class("blip_image_eval")(image_size=224)
        assert torch.equal(theirs(picture), EvlgenImageEvalProcessor(224, mean="clip")(picture))
        drawn = []
        for processor in (
            registry.get_processor_class("blip2_image_train")(image_size=224),
            EvlgenImageTrainProcessor(224, mean="clip"),
        ):
            torch.manual_seed(3)
            drawn.append(torch.stack([processor(picture) for _ in range(4)]))
        assert (drawn[0] - drawn[1]).abs().max() < 2.01 / 255 / 0.26
