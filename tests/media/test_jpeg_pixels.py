"""JPEGs decoded by torch for processors that take pixels: the same pixels as Pillow's, and the same refusals."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from lavis_evlgen.datasets import UnreadableImage
from lavis_evlgen.media import images
from lavis_evlgen.media.images import decode_image, open_image
from lavis_evlgen.processors import EvlgenImageEvalProcessor, EvlgenImageTrainProcessor, EvlgenVideoTrainProcessor
from lavis_evlgen.processors.images import pixels

TAKES = EvlgenImageTrainProcessor(64, shrink_on_load=False)


def jpeg(mode: str = "RGB", size: tuple[int, int] = (50, 37), **keys) -> bytes:
    random = np.random.RandomState(0).randint(0, 256, (size[1] // 4 + 1, size[0] // 4 + 1, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(random).resize(size, Image.BICUBIC).convert(mode).save(content, "JPEG", **keys)
    return content.getvalue()


@pytest.mark.parametrize(
    "keys",
    [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}, {"size": (1, 1)}, {"size": (641, 479)},
     {"restart_marker_rows": 1}, {"exif": Image.Exif()}],
)  # fmt: skip
def test_the_pixels_are_pillows(keys):
    content = jpeg(**keys)
    found = decode_image(content, "x.jpg", TAKES)
    assert isinstance(found, torch.Tensor) and found.dtype == torch.uint8
    assert torch.equal(found, pixels(decode_image(content, "x.jpg")))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_what_is_not_rgb_goes_through_pillow(mode):
    found = decode_image(jpeg(mode), "x.jpg", TAKES)
    assert isinstance(found, Image.Image) and found.mode == "RGB"
    assert np.array_equal(found, decode_image(jpeg(mode), "x.jpg"))


def test_turned_pictures_stand_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(jpeg(exif=exif), "x.jpg", TAKES).size == (37, 50)


def test_who_gets_pixels(tmp_path, monkeypatch):
    (tmp_path / "x.jpg").write_bytes(jpeg())
    assert isinstance(open_image(tmp_path / "x.jpg", TAKES), torch.Tensor)
    for processor in (None, EvlgenImageEvalProcessor(64), EvlgenVideoTrainProcessor(1)):
        assert isinstance(open_image(tmp_path / "x.jpg", processor), Image.Image)

    def not_built(*args):
        raise RuntimeError("decode_jpeg: torchvision not compiled with libjpeg support")

    monkeypatch.setattr(images, "decode_jpeg", not_built)
    images._torch_decodes_jpeg.cache_clear()
    try:
        assert isinstance(open_image(tmp_path / "x.jpg", TAKES), Image.Image)
    finally:
        images._torch_decodes_jpeg.cache_clear()


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_truncated_files_are_named(share, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as LAVIS has it
    content = jpeg(size=(640, 480))
    with pytest.raises(UnreadableImage, match=r"x.jpg: broken or truncated \(Image is incomplete or truncated\)$"):
        decode_image(content[: int(share * len(content))], "x.jpg", TAKES)


def test_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(images, "decode_jpeg", lambda *args: pytest.fail("it was decoded"))
    with pytest.raises(UnreadableImage, match="too many pixels"):
        decode_image(jpeg(), "x.jpg", TAKES)
