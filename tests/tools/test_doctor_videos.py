from lavis_evlgen.datasets import VideoCaptionDataset
from lavis_evlgen.datasets.base import CaptionedImage
from lavis_evlgen.tools.doctor.checks import check_images
from tests.clip_tools import write_clip


def clips(folder, names, **keys):
    items = [CaptionedImage(name, name, ("a clip",)) for name in names]
    return VideoCaptionDataset("mine", "val", items, videos=folder, text_processor=str, **keys)


def test_clips_are_opened_and_the_first_that_opens_is_described(tmp_path):
    (tmp_path / "0.avi").write_text("not a clip")
    for n, count in ((1, 7), (2, 9)):
        write_clip(tmp_path / f"{n}.avi", count)
    names = [f"{n}.avi" for n in range(4)]
    found = check_images("mine", "val", clips(tmp_path, names, max_bad_fraction=0.5), None, print)
    assert found.ok and found.what == "data mine val"
    assert found.seen == (
        "2 found and readable, 1 missing, 1 unreadable (at most 2 tolerated); "
        "first clip: 7 frames at 5 a second, 64 x 64"
    )
    assert found.details == [
        f"{tmp_path / '0.avi'}: looks like text, not a video", f"{tmp_path / '3.avi'}: no such file"
    ]  # fmt: skip


def test_where_no_clip_opens_the_check_fails(tmp_path):
    found = check_images("mine", "val", clips(tmp_path, ["0.avi"]), None, print)
    assert not found.ok and "0 found and readable, 1 missing" in found.seen and "clip" not in found.seen
