import numpy as np
import pytest
from PIL import Image

from lavis_evlgen.reporting.plots import _smooth, caption_sheet, loss_plot


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def picture(width, height, mode="RGB"):
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    return Image.fromarray(noise).convert(mode)


def test_loss_plot_has_one_or_two_panels(tmp_path):
    history = [{"step": step, "loss": 5 / (1 + step / 20)} for step in range(0, 100, 2)]
    single = pixels(loss_plot(tmp_path / "a.png", history))
    assert single.shape[1] == 720 and single.std() > 10
    history.append({"step": 50, "val_loss_right": 2.0, "val_loss_shuffled": 3.0})
    history.append({"step": 60, "loss": float("nan")})
    validated = pixels(loss_plot(tmp_path / "b.png", history, "costs $5 or $6"))
    assert validated.shape[1] == 720 and not np.array_equal(single, validated)
    history.append({"step": 50, "cider": 0.7, "blind_cider": None})
    assert pixels(loss_plot(tmp_path / "new" / "c.png", history)).shape[1] == 1200


@pytest.mark.filterwarnings("error::UserWarning")
def test_loss_plot_of_little(tmp_path):
    assert loss_plot(tmp_path / "a.png", [{"step": 1, "loss": 2.0}]).exists()
    assert loss_plot(tmp_path / "b.png", [{"step": 1, "cider": 0.0}]).exists()
    with pytest.raises(ValueError, match="no finite loss"):
        loss_plot(tmp_path / "c.png", [{"step": 1, "loss": float("nan")}])


def test_smoothing_keeps_slopes_and_quietens_noise():
    line = np.linspace(5.0, 1.0, 301)
    assert _smooth(line)[:-5] == pytest.approx(line[:-5])
    assert _smooth(line)[-5:] == pytest.approx(line[-5:], abs=0.05)
    noise = np.random.default_rng(0).normal(size=600)
    assert _smooth(noise).std() < noise.std() / 2
    assert _smooth(np.array([3.0])) == [3.0]


def test_caption_sheet(tmp_path):
    images = [picture(64, 48), picture(30, 90, "L"), picture(90, 20, "P"), picture(8, 8, "RGBA")]
    images.append(picture(20, 20))
    sizes = [image.size for image in images]
    captions = ["a dog worth $5 or $6", "", "a very long caption " * 9, "x", "y"]
    references = [["one reference", "another"], ["a"] * 12, [], ["b"], ["c"]]
    scores = [1.0, None, 0.0, 2, np.float32(3)]
    sheet = pixels(caption_sheet(tmp_path / "sheet.png", images, captions, references, scores))
    assert sheet.shape[1] == 1200 and sheet.std() > 10
    assert [image.size for image in images] == sizes
    one = pixels(caption_sheet(tmp_path / "one.png", images[:1], captions[:1], references[:1]))
    assert one.shape[1] == 400


def test_caption_sheet_faults(tmp_path):
    with pytest.raises(ValueError, match="got 1, 2, 1 and 1"):
        caption_sheet(tmp_path / "a.png", [picture(8, 8)], ["a", "b"], [["c"]])
    with pytest.raises(ValueError, match="got 0"):
        caption_sheet(tmp_path / "a.png", [], [], [])
    with pytest.raises(ValueError, match="at most about"):
        caption_sheet(tmp_path / "a.png", [picture(8, 8)] * 900, ["a"] * 900, [["b"]] * 900, columns=3)
