"""`image_captions`: a folder of pictures and a captions file, or one captions file per split."""

import logging
from collections import Counter
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


@dataclass(kw_only=True)
class CaptionsFileSettings(BuilderSettings):
    """Keys of data sets whose captions are in files."""

    captions: str | list[str] | None = key(
        "one captions file for all splits, or a list: COCO, Karpathy, MSR-VTT or LAVIS JSON, JSONL, CSV or TSV; of "
        "webvid2m one of WebVid's tables, CSV or JSON: videoid, name (the caption), page_dir", None,
    )  # fmt: skip
    split: Literal["from_file"] | dict[Literal[SPLITS], int | str | None] | None = key(
        "how `captions` is split: {train: N, val: N, test: N} images or videos by sorted name, from_file, or what the "
        "file calls them: {train: NAME, val: NAME}", None, at_least=0, at_most=MOST_PICTURES,
    )  # fmt: skip
    references: str | list[str] | None = key(
        "of several `captions`, those that val and test are scored against (left out: all)", None
    )
    annotations: dict[Literal[SPLITS], str | list[str] | None] | None = key(
        "instead of `captions`: {train: FILE, val: FILE, test: FILE}, each a file or a list", None
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
        found = splits.rows_by_split(self.settings, "captions", self.config_path, self._read_all)
        found = {split: (path, self._scored(split, rows)) for split, (path, rows) in found.items()}
        items = {split: group_by_image(path, rows) for split, (path, rows) in found.items()}
        splits.report_shared_images(items)
        datasets = {}
        for split, (_, rows) in found.items():
            datasets[split] = self.train_dataset_cls(
                self.NAME, split, items[split], **{name: folder}, max_bad_fraction=self.settings.max_bad_fraction,
                **self.processors(split),
            )
            if len(files := Counter(row.file for row in rows)) > 1:
                counts = ", ".join(f"{count} of {file}" for file, count in files.items())
                datasets[split].description += f"; captions: {counts}"
        return datasets

    def _scored(self, split: str, rows: list[CaptionRow]) -> list[CaptionRow]:
        """Of val and test, the rows of the files in `references`."""
        references, files = splits.listed(self.settings.references), splits.listed(self.settings.captions)
        if unknown := set(references) - set(files):
            known = f"they are {', '.join(files)}" if files else "with `annotations`, list each split's files there"
            raise DataError(f"{self.config_path}.references: {min(unknown)} is none of `captions`; {known}")
        if split == "train" or not references:
            return rows
        kept = [row for row in rows if row.file in references]
        if lost := len({row.image for row in rows} - {row.image for row in kept}):
            logging.info("%s: %d %ss have no caption in %s, unused", split, lost, self.MEDIA, ", ".join(references))
        return kept

    def _read_all(self, files: list[str]) -> list[CaptionRow]:
        return [row for file in files for row in self._read(file)]

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
    sources: dict[str, str | None] = {}
    for row in rows:
        sources[row.image] = row.source or sources.get(row.image)
    return [CaptionedImage(image, ids[image], tuple(texts), sources[image]) for image, texts in captions.items()]


def split_items(path: str, rows: list[CaptionRow], split) -> dict[str, list[CaptionedImage]]:
    """The images of each split that has any; `split` as splits.split_rows."""
    found = splits.split_rows(path, "datasets.image_captions", rows, split)
    return {name: group_by_image(path, own) for name, own in found.items()}
