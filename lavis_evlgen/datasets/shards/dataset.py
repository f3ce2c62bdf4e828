"""`image_shards`, `ccs14m`, `laion115m`, `video_shards`: captioned images or clips in tar shards, for training.

Shards are as webdataset and img2dataset write them: one holds KEY.jpg (jpeg, png, webp) and, beside it, KEY.json with
the caption under `caption_key`, or KEY.txt. Shards of clips hold KEY.mp4 (webm, mkv, avi, mov) in the image's place.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from lavis.common.registry import registry

from lavis_evlgen.config.keys import key
from lavis_evlgen.datasets.annotations.files import encodes, has_words
from lavis_evlgen.datasets.builder import CONFIG_FOLDER, BuilderSettings, CaptionDatasetBuilder
from lavis_evlgen.datasets.facts import DatasetFacts
from lavis_evlgen.datasets.packing import in_a_row
from lavis_evlgen.datasets.shards.names import shard_names
from lavis_evlgen.datasets.shards.reader import IMAGES, ShardItem
from lavis_evlgen.media.errors import DataError, UnreadableImage
from lavis_evlgen.media.images import decode_image
from lavis_evlgen.media.video import VideoFile

_ONE = {"image": "an image", "video": "a clip"}  # in messages
_CHECKED = 256  # shards whose presence is checked before a run


class ImageShards(DatasetFacts):
    """Training samples in tar shards, read without end by stream.ShardStream. Its length is not known.

    Attributes: `name`, `split` ("train"), `shards` (file names), `caption_key`, `shuffle_window` (samples shuffled
    together, 1 or more), `max_bad_fraction` (share of samples, or of shards, that may be unusable), `description`.

    A sample is a dict with `image` (3, H, W) float, `text_input` str, `image_id` str (shard:KEY), `instance_id` str; of
    several captions a picture, `image` and `texts`, a list of dicts with the rest.
    """

    split, is_train = "train", True
    extensions: tuple[str, ...] = IMAGES  # of the files of images or videos

    def __init__(self, name: str, shards: Sequence[str], *, vis_processor, text_processor, caption_key: str = "caption",
                 shuffle_window: int = 256, max_bad_fraction: float = 0.01):
        if not 0 <= max_bad_fraction <= 1:
            raise DataError(f"{name}: max_bad_fraction={max_bad_fraction} must lie between 0 and 1")
        if isinstance(shuffle_window, bool) or not isinstance(shuffle_window, int) or shuffle_window < 1:
            raise DataError(f"{name}: shuffle_window={shuffle_window} must be a whole number of at least 1")
        self.name, self.shards, self.caption_key = name, shards, caption_key
        self.vis_processor, self.text_processor = vis_processor, text_processor
        self.shuffle_window, self.max_bad_fraction = shuffle_window, float(max_bad_fraction)
        self.description = f"{name} train: {len(shards)} shards, {shards[0]} to {shards[-1]}"

    def sample(self, index: int, item: ShardItem, most: int = 1) -> dict:
        """Item of shard `index` as a sample; draws from Python's and torch's generators. Raises UnreadableImage.

        most: above 1, a sample of up to so many of its captions, each drawn once at most.
        """
        where = f"{self.shards[index]}:{item.key}"
        captions = self.captions(item, where)
        content = next((item.files[kind] for kind in item.files if kind in self.extensions), None)
        if content is None:
            kinds = ", ".join(self.extensions)
            raise UnreadableImage(where, f"a caption without {_ONE[self.media]} ({kinds}) beside it")
        if most > 1:
            drawn = random.sample(captions, min(most, len(captions)))
        else:
            drawn = captions if len(captions) == 1 else [random.choice(captions)]
        image, ids = self._open(content, where), {"image_id": where, "instance_id": f"{index}:{item.index}"}
        image = self.vis_processor(image)  # (3, H, W)
        texts = [{"text_input": self.text_processor(caption), **ids} for caption in drawn]
        return {"image": image, "texts": texts} if most > 1 else {"image": image, **texts[0]}

    def _open(self, content: bytes, where: str):
        return decode_image(content, where, self.vis_processor)

    def captions(self, item: ShardItem, where: str) -> list[str]:
        """All captions of an item, at least one: of its json where there is one, else its txt."""
        content = item.files.get("json", item.files.get("txt"))
        if content is None:
            shown = _ONE[self.media]
            raise UnreadableImage(where, f"{shown} without a caption (json or txt of the same name) beside it")
        found = self._of_json(content, where) if "json" in item.files else _text(content, where)
        captions = found if isinstance(found, list) and found else [found]
        if not all(has_words(caption) and encodes(caption) for caption in captions):
            raise UnreadableImage(where, f"its caption has no words ({found!r:.60})")
        return captions

    def _of_json(self, content: bytes, where: str):
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UnreadableImage(where, f"its json cannot be parsed ({error})") from None
        if not isinstance(row, dict) or self.caption_key not in row:
            keys = ", ".join(map(str, list(row)[:12])) if isinstance(row, dict) else f"a {type(row).__name__}"
            raise UnreadableImage(where, f"its json has no key {self.caption_key} (it has {keys})")
        return row[self.caption_key]

    def collater(self, samples: list[dict]) -> dict:
        """Stack samples into a batch: `image` (B, 3, H, W); the rest lists, as ReadableRows.collater makes them."""
        images, (texts, counts) = torch.stack([sample["image"] for sample in samples]), in_a_row(samples)
        keys = ("text_input", "image_id", "instance_id")
        return {"image": images, **{key: [text[key] for text in texts] for key in keys}, **counts}

    def looked_at(self) -> Iterator[str]:
        """A few hundred shards, evenly over the list, the first and the last among them."""
        last = len(self.shards) - 1
        for index in sorted({last * n // (_CHECKED - 1) for n in range(_CHECKED)}):
            yield self.shards[index]


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UnreadableImage(where, f"its txt is not UTF-8 ({error})") from None


class VideoShards(ImageShards):
    """Captioned clips in tar shards; a sample's `image` is (3, T, H, W)."""

    media, extensions = "video", ("mp4", "webm", "mkv", "avi", "mov")

    def _open(self, content: bytes, where: str) -> VideoFile:
        return VideoFile(content, where)


@dataclass(kw_only=True)
class ShardsSettings(BuilderSettings):
    shards: str | list[str] | None = key(
        "tar files: a brace list {00000..00099}.tar, a glob, a folder, or a list of those", None
    )
    folder: str | None = key("folder that relative shard names start from; left out: where you stand", None)
    caption_key: str = key("key of the caption in KEY.json; KEY.txt is read where there is no json")
    shuffle_window: int = key(
        "samples of a shard shuffled together in memory; 1: in file order", at_least=1, at_most=10**9
    )


@registry.register_builder("image_shards")
class ImageShardsBuilder(CaptionDatasetBuilder):
    """Builds the training split of tar shards that are files here; other splits come from another data set."""

    NAME = "image_shards"
    DATASET_CONFIG_DICT = {"default": str(CONFIG_FOLDER / "image_shards.yaml")}
    NEEDS_FOLDER, DATASET = False, ImageShards
    Settings = ShardsSettings

    def build(self) -> dict[str, ImageShards]:
        config, path = self.settings, f"datasets.{self.NAME}"
        if self.NEEDS_FOLDER and not config.folder:
            raise DataError(f"{path}.folder is not given; set it to the folder of the shards {config.shards}")
        if not config.shards:
            raise DataError(f"{path}.shards is not given; set e.g. {path}.shards='/data/{{00000..00099}}.tar'")
        train = self.DATASET(
            self.NAME, shard_names(config.shards, config.folder, f"{path}.shards"), caption_key=config.caption_key,
            shuffle_window=config.shuffle_window, max_bad_fraction=config.max_bad_fraction, **self.processors("train"),
        )  # fmt: skip
        return {"train": train}


@registry.register_builder("ccs14m")
class Ccs14mBuilder(ImageShardsBuilder):
    """CC3M + CC12M + SBU with BLIP's synthetic captions, in the 1,256 shards of the EVLGen paper."""

    NAME, NEEDS_FOLDER = "ccs14m", True
    DATASET_CONFIG_DICT = {"default": str(CONFIG_FOLDER / "ccs14m.yaml")}


@registry.register_builder("laion115m")
class Laion115mBuilder(ImageShardsBuilder):
    """The 115M pairs of LAION-400M with BLIP's synthetic captions, in the 10,489 shards of the EVLGen paper."""

    NAME, NEEDS_FOLDER = "laion115m", True
    DATASET_CONFIG_DICT = {"default": str(CONFIG_FOLDER / "laion115m.yaml")}


@registry.register_builder("video_shards")
class VideoShardsBuilder(ImageShardsBuilder):
    """As image_shards, of clips."""

    NAME, DATASET = "video_shards", VideoShards
    DATASET_CONFIG_DICT = {"default": str(CONFIG_FOLDER / "video_shards.yaml")}
