"""`video_captions`: a folder of clips and a captions file, or one per split; `webvid2m`: WebVid's tables."""

import re
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path

from lavis.common.registry import registry
from PIL import Image

from lavis_evlgen.config.keys import key
from lavis_evlgen.datasets.annotations.captions import CaptionRow, CaptionsFile
from lavis_evlgen.datasets.annotations.files import Table, quoted, read_rows, report_problems
from lavis_evlgen.datasets.base import CaptionDataset
from lavis_evlgen.datasets.builder import CONFIG_FOLDER
from lavis_evlgen.datasets.builders.image_captions import CaptionsFileSettings, ColumnsSettings, ImageCaptionsBuilder
from lavis_evlgen.datasets.builders.image_folder import ImageFolder
from lavis_evlgen.media.errors import DataError
from lavis_evlgen.media.video import VideoFile, uniform

_SHEET = 2  # frames on a side of a clip's sheet
# ID_START_END, YouTube's id and seconds: how MSVD names the clips of a film. Other numbers in a name, as in
# video_0001_0002.mp4, say nothing of where it is from
_FILM = re.compile(r"([\w-]{11})_(\d+(?:\.\d+)?)_(\d+(?:\.\d+)?)")


class Clips:
    """Mixin of a data set whose rows are clips: `_load(row)` opens one, the video processor takes its frames.

    A sample is that of CaptionDataset, with `image` (3, T, H, W).
    """

    media = "video"

    def clip(self, index: int):
        """The clip of row `index`, opened (see lavis_evlgen/media/video.py). Raises UnreadableVideo."""
        return self._load(self.annotation[index])

    def pil_image(self, index: int) -> Image.Image:
        """Four frames of row `index`, spread over the clip, on one picture: in rows, from left to right."""
        clip = self.clip(index)
        frames = clip.frames(uniform(len(clip), _SHEET * _SHEET))  # (4, H, W, 3)
        _, height, width, _ = frames.shape
        sheet = frames.reshape(_SHEET, _SHEET, height, width, 3).transpose(0, 2, 1, 3, 4)  # (row, H, column, W, 3)
        return Image.fromarray(sheet.reshape(_SHEET * height, _SHEET * width, 3))


class VideoCaptionDataset(Clips, ImageFolder, CaptionDataset):
    """Captioned video files of one split, in the folder `videos`."""

    def __init__(self, *args, videos: str, **kwargs):
        super().__init__(*args, images=videos, **kwargs)

    def _load(self, row: dict) -> VideoFile:
        return VideoFile(self.path_of(row["image"]))

    def source_of(self, row: dict) -> Hashable:
        """The film that a clip was cut from: by the annotations, else by a name such as -4wsuPCjDBc_5_15.avi."""
        if row["image_id"] in self.sources:
            return self.sources[row["image_id"]]
        named = _FILM.fullmatch(Path(row["image"]).stem)
        return named[1] if named else row["image_id"]


@dataclass(kw_only=True)
class WebvidSettings(CaptionsFileSettings):
    videos: str | None = key("the folder that the video names of the captions file start from", None)


@dataclass(kw_only=True)
class VideoCaptionsSettings(ColumnsSettings, WebvidSettings):
    pass


@registry.register_builder("video_captions")
class VideoCaptionsBuilder(ImageCaptionsBuilder):
    """Builds splits of captioned video files; relative paths start at the current folder.

    Types `msrvtt` and `msvd` look where LAVIS keeps these data sets, below data/.
    """

    NAME, MEDIA = "video_captions", "video"
    train_dataset_cls = eval_dataset_cls = VideoCaptionDataset
    DATASET_CONFIG_DICT = {
        "default": str(CONFIG_FOLDER / "video_captions.yaml"),
        "msrvtt": str(CONFIG_FOLDER / "msrvtt.yaml"),
        "msvd": str(CONFIG_FOLDER / "msvd.yaml"),
    }
    Settings = VideoCaptionsSettings


@registry.register_builder("webvid2m")
class WebvidBuilder(VideoCaptionsBuilder):
    """WebVid-2M from its tables (videoid, name, page_dir), CSV or JSON, and a folder of page_dir/videoid.mp4."""

    NAME = "webvid2m"
    DATASET_CONFIG_DICT = {"default": str(CONFIG_FOLDER / "webvid2m.yaml")}
    Settings = WebvidSettings

    def _read(self, path: str) -> list[CaptionRow]:
        found = read_webvid_file(path, self.config_path)
        report_problems(path, found, self.settings.max_bad_fraction, self.config_path)
        return found.rows


def read_webvid_file(path, config_path: str) -> CaptionsFile:
    """WebVid's rows; a clip's file is page_dir/videoid.mp4 (videoid.mp4 where page_dir is empty). Raises DataError."""
    found = CaptionsFile(str(path), "WebVid", media="video", config_path=config_path)
    table = read_rows(path, "WebVid table", is_file=lambda content: False)
    if isinstance(table, dict):  # a single row
        table = Table("", [], [("row 1", table)])
    found.problems = table.problems
    _check_webvid(found, table.header)
    seen: dict = {}
    for where, row in found.dicts(table.records, seen):
        number, folder = row.get("videoid"), row.get("page_dir")
        name = f"{number}.mp4" if number not in (None, "") else ""
        found.add(where, f"{folder}/{name}" if name and folder else name, row.get("name"), str(number))
    _check_webvid(found, seen)
    return found


def _check_webvid(found: CaptionsFile, header: Iterable[str]):
    for column in ("videoid", "name"):
        if header and column not in header:
            words = "WebVid's tables have videoid, name and page_dir; other tables are read by video_captions"
            raise DataError(f"{found.path} has no column {column!r}; its columns are {quoted(header)}. {words}")
