"""`image_captions`: a folder of pictures and a captions file, or one captions file per split."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lavis.common.registry import registry
from PIL import Image

from lavis_evlgen.datasets.base import CaptionDataset, CaptionedImage
from lavis_evlgen.datasets.builder import COMMON_KEYS, CONFIG_FOLDER, SPLITS, CaptionDatasetBuilder
from lavis_evlgen.datasets.captions_file import CaptionRow, read_captions_file
from lavis_evlgen.datasets.errors import DataError
from lavis_evlgen.datasets.image_files import open_image

# Names of splits in the wild; Karpathy's restval is COCO val that he adds to training.
_SPLIT_NAMES = {"train": "train", "restval": "train", "val": "val", "valid": "val", "validation": "val",
                "dev": "val", "test": "test"}


class ImageCaptionDataset(CaptionDataset):
    """Captioned image files of one split, in the folder `images`."""

    def __init__(self, *args, images: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.vis_root = str(images)

    def _load(self, row: dict) -> Image.Image:
        return open_image(os.path.join(self.vis_root, row["image"]))

    def iter_image_paths(self) -> Iterator[str]:
        """The path of every image of this split, each once, in row order."""
        for name in dict.fromkeys(row["image"] for row in self.annotation):
            yield os.path.join(self.vis_root, name)

    def missing_files(self) -> list[str]:
        """Paths of the images that are not on disk; lists each folder once, not every file."""
        listings: dict[str, set[str]] = {}
        missing = []
        for path in self.iter_image_paths():
            folder, name = os.path.split(path)
            if folder not in listings:
                listings[folder] = _file_names(folder)
            if name not in listings[folder]:
                missing.append(path)
        return missing


def _file_names(folder: str) -> set[str]:
    try:
        with os.scandir(folder or ".") as entries:
            return {entry.name for entry in entries}
    except FileNotFoundError:
        return set()


@registry.register_builder("image_captions")
class ImageCaptionsBuilder(CaptionDatasetBuilder):
    """Builds splits of captioned image files; relative paths start at the current folder."""

    NAME = "image_captions"
    train_dataset_cls = eval_dataset_cls = ImageCaptionDataset
    DATASET_CONFIG_DICT = {"default": str(CONFIG_FOLDER / "image_captions.yaml")}
    CONFIG_KEYS = {
        **COMMON_KEYS,
        "images": "the folder that the image names of the captions file start from",
        "captions": "one captions file for all splits: COCO, Karpathy or LAVIS JSON, JSONL, CSV or TSV",
        "split": "how `captions` is split: {train: N, val: N, test: N} images by sorted name, or from_file",
        "annotations": "instead of `captions`: {train: FILE, val: FILE, test: FILE}",
        "columns": "the file's column names where they differ: {image: …, caption: …, image_id: …, split: …}",
    }

    def build(self) -> dict[str, ImageCaptionDataset]:
        folder = self.config.get("images")
        if not folder:
            raise DataError("the images folder is not given; set datasets.image_captions.images=FOLDER")
        if not Path(folder).is_dir():
            raise DataError(f"datasets.image_captions.images={folder} is not a folder here ({Path.cwd()})")
        datasets = {}
        for split, items in self._items_by_split().items():
            datasets[split] = ImageCaptionDataset(
                self.NAME, split, items, images=folder, max_bad_fraction=self.config.max_bad_fraction,
                **self.processors(split),
            )
        return datasets

    def _items_by_split(self) -> dict[str, list[CaptionedImage]]:
        captions, annotations = self.config.get("captions"), self.config.get("annotations")
        if bool(captions) == bool(annotations):
            raise DataError(
                f"datasets.image_captions has {'both' if captions else 'neither'} of `captions` (one file, "
                "with `split`) and `annotations` (a file per split); give one of the two"
            )
        if captions:
            return split_items(captions, self._read(captions), self.config.get("split"))
        _check_split_names("annotations", annotations)
        found = {split: group_by_image(annotations[split], self._read(annotations[split]))
                 for split in SPLITS if annotations.get(split)}
        _report_shared_images(found)
        return found

    def _read(self, path: str) -> list[CaptionRow]:
        found = read_captions_file(path, self.config.get("columns"))
        for note in found.notes:
            logging.info("%s: %s", path, note)
        total = len(found.rows) + len(found.problems)
        if found.problems:
            first = "; ".join(found.problems[:3])
            words = f"{len(found.problems)} of {total} rows of {path} cannot be used, such as {first}"
            if len(found.problems) > self.config.max_bad_fraction * total:
                limit = f"max_bad_fraction={self.config.max_bad_fraction}"
                raise DataError(f"{words}. Mend them, or raise datasets.image_captions.{limit}")
            logging.warning(words)
        return found.rows


def group_by_image(path: str, rows: list[CaptionRow]) -> list[CaptionedImage]:
    """One item per image, in file order. The id is the file's, or else the image name. Raises DataError where
    two ids name one image or one id two images."""
    captions: dict[str, list[str]] = {}
    ids: dict[str, int | str] = {}
    for row in rows:
        captions.setdefault(row.image, []).append(row.caption)
        own_id = row.image if row.image_id is None else row.image_id
        if ids.setdefault(row.image, own_id) != own_id:
            raise DataError(f"{path} gives {row.image} two image ids: {ids[row.image]!r} and {own_id!r}")
    owner: dict[int | str, str] = {}
    for image, image_id in ids.items():
        if owner.setdefault(image_id, image) != image:
            raise DataError(f"{path} gives the id {image_id!r} to two images: {owner[image_id]} and {image}")
    return [CaptionedImage(image, ids[image], tuple(texts)) for image, texts in captions.items()]


def split_items(path: str, rows: list[CaptionRow], split) -> dict[str, list[CaptionedImage]]:
    """The images of each split that has any. `split`: counts {train: N, …}, or "from_file"."""
    if not split:
        raise DataError(
            f"{path} holds all captions: say how to split it, with datasets.image_captions.split.train=N "
            "(val, test), or with split=from_file where the file has a split column"
        )
    items = group_by_image(path, rows)
    if isinstance(split, str):
        if split != "from_file":
            raise DataError(f"datasets.image_captions.split={split} is not known; give counts, or from_file")
        return _split_from_file(path, rows, items)
    return _split_by_counts(path, items, split)


def _split_by_counts(path: str, items: list[CaptionedImage], counts) -> dict[str, list[CaptionedImage]]:
    _check_split_names("split", counts)
    items, found, start = sorted(items, key=lambda item: item.image), {}, 0
    counts = {split: counts.get(split) or 0 for split in SPLITS}
    if any(not isinstance(count, int) or count < 0 for count in counts.values()):
        raise DataError(f"datasets.image_captions.split takes numbers of images, not {counts}")
    if sum(counts.values()) > len(items):
        raise DataError(f"datasets.image_captions.split asks for {counts}, but {path} has {len(items)}")
    for split, count in counts.items():
        if count:
            found[split] = items[start:start + count]
        start += count
    if start < len(items):
        logging.info("%s: %d of %d images are in no split, unused", path, len(items) - start, len(items))
    return found


def _split_from_file(path: str, rows: list[CaptionRow], items: list[CaptionedImage]) -> dict:
    split_of: dict[str, str] = {}
    for row in rows:
        if row.split is None:
            raise DataError(f"{path} names no split for {row.image}; set columns.split, or split by counts")
        split = str(row.split).strip().lower()
        split = _SPLIT_NAMES.get(split, split)
        if split_of.setdefault(row.image, split) != split:
            raise DataError(f"{path} puts the image {row.image} into both {split_of[row.image]} and {split}")
    if unused := Counter(split for split in split_of.values() if split not in SPLITS):
        logging.warning("%s: images of other splits are not used: %s", path, dict(unused))
    found = {split: [item for item in items if split_of[item.image] == split] for split in SPLITS}
    return {split: items for split, items in found.items() if items}


def _check_split_names(key: str, given):
    if not hasattr(given, "keys"):
        raise DataError(f"datasets.image_captions.{key}={given} must be a mapping of {', '.join(SPLITS)}")
    for name in given:
        if name not in SPLITS:
            raise DataError(f"datasets.image_captions.{key}.{name} is unknown; there are {', '.join(SPLITS)}")


def _report_shared_images(found: dict[str, list[CaptionedImage]]):
    names = {split: {item.image for item in items} for split, items in found.items()}
    for split in ("val", "test"):
        if shared := len(names.get(split, set()) & names.get("train", set())):
            logging.warning("%d images of %s are also in train: its scores will flatter", shared, split)
