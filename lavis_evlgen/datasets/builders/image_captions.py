"""`image_captions`: a folder of pictures and a captions file, or one captions file per split."""

from dataclasses import dataclass
from typing import Literal

from lavis.common.registry import registry

from lavis_evlgen.config.keys import key
from lavis_evlgen.datasets.annotations import splits
from lavis_evlgen.datasets.annotations.captions import CaptionRow, read_captions_file
from lavis_evlgen.datasets.annotations.files import image_ids, report_problems
from lavis_evlgen.datasets.base import CaptionDataset, CaptionedImage
from lavis_evlgen.datasets.builder import CONFIG_FOLDER, MOST_PICTURES, SPLITS, BuilderSettings, CaptionDatasetBuilder
from lavis_evlgen.datasets.builders.image_folder import ImageFolder, data_folder
from lavis_evlgen.media.errors import DataError


class ImageCaptionDataset(ImageFolder, CaptionDataset):
    """Captioned image files of one split, in the folder `images`."""

    def __init__(self, *args, images: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.vis_root = str(images)


@dataclass(kw_only=True)
class CaptionsFileSettings(BuilderSettings):
    """Keys of data sets whose captions are in files."""

    captions: str | None = key(
        "one captions file for all splits: COCO, Karpathy, MSR-VTT or LAVIS JSON, JSONL, CSV or TSV; of webvid2m one "
        "of WebVid's tables, CSV or JSON: videoid, name (the caption), page_dir", None,
    )  # fmt: skip
    split: Literal["from_file"] | dict[Literal[SPLITS], int | None] | None = key(
        "how `captions` is split: {train: N, val: N, test: N} images or videos by sorted name, or from_file", None,
        at_least=0, at_most=MOST_PICTURES,
    )  # fmt: skip
    annotations: dict[Literal[SPLITS], str | None] | None = key(
        "instead of `captions`: {train: FILE, val: FILE, test: FILE}", None
    )


@dataclass(kw_only=True)
class ColumnsSettings(CaptionsFileSettings):
    columns: dict[str, str | None] | None = key(
        "the file's column names where they differ: {image: … (of clips: video), caption: …, image_id: …, split: …}",
        None,
    )


@dataclass(kw_only=True)
class ImageCaptionsSettings(ColumnsSettings):
    images: str | None = key("the folder that the image names of the captions file start from", None)


@registry.register_builder("image_captions")
class ImageCaptionsBuilder(CaptionDatasetBuilder):
    """Builds splits of captioned image files; relative paths start at the current folder."""

    NAME = "image_captions"
    MEDIA: Literal["image", "video"] = "image"  # its column in tables; as a plural, the folder's key
    train_dataset_cls = eval_dataset_cls = ImageCaptionDataset
    DATASET_CONFIG_DICT = {"default": str(CONFIG_FOLDER / "image_captions.yaml")}
    Settings = ImageCaptionsSettings

    @property
    def config_path(self) -> str:
        """The config's section."""
        return f"datasets.{self.NAME}"

    def build(self) -> dict[str, CaptionDataset]:
        name = f"{self.MEDIA}s"
        folder = data_folder(getattr(self.settings, name), self.config_path, name)
        datasets = {}
        for split, items in self._items_by_split().items():
            datasets[split] = self.train_dataset_cls(
                self.NAME, split, items, **{name: folder}, max_bad_fraction=self.settings.max_bad_fraction,
                **self.processors(split),
            )
        return datasets

    def _items_by_split(self) -> dict[str, list[CaptionedImage]]:
        captions, annotations = self.settings.captions, self.settings.annotations
        if bool(captions) == bool(annotations):
            raise DataError(
                f"{self.config_path} has {'both' if captions else 'neither'} of `captions` (one file, "
                "with `split`) and `annotations` (a file per split); give one of the two"
            )
        if captions:
            return split_items(captions, self._read(captions), self.settings.split, self.config_path)
        found = {split: group_by_image(annotations[split], self._read(annotations[split]))
                 for split in SPLITS if annotations.get(split)}
        splits.report_shared_images(found)
        return found

    def _read(self, path: str) -> list[CaptionRow]:
        found = read_captions_file(path, self.settings.columns, self.MEDIA, self.config_path)
        report_problems(path, found, self.settings.max_bad_fraction, self.config_path)
        return found.rows


def group_by_image(path: str, rows: list[CaptionRow]) -> list[CaptionedImage]:
    """One item per image, in file order. The id is the file's, or else the image name. Raises as image_ids."""
    ids = image_ids(path, ((row.image, row.image_id) for row in rows))
    captions: dict[str, list[str]] = {}
    for row in rows:
        captions.setdefault(row.image, []).append(row.caption)
    sources = {row.image: row.source for row in rows}
    return [CaptionedImage(image, ids[image], tuple(texts), sources[image]) for image, texts in captions.items()]


def split_items(
    path: str, rows: list[CaptionRow], split, config_path: str = "datasets.image_captions"
) -> dict[str, list[CaptionedImage]]:
    """The images of each split that has any. `split`: counts {train: N, …}, or "from_file"."""
    return splits.split_items(path, config_path, rows, group_by_image(path, rows), split)
