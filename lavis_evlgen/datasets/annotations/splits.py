"""Rows into train, val and test: by counts of pictures in the order of file names, or as the file says."""

import logging
from collections.abc import Callable, Mapping, Sequence

from lavis_evlgen.datasets.annotations.files import image_ids
from lavis_evlgen.datasets.builder import SPLITS
from lavis_evlgen.media.errors import DataError

# Names of splits in the wild; Karpathy's restval is COCO val that he adds to training, MSR-VTT has validate.
_SPLIT_NAMES = {"train": "train", "restval": "train", "val": "val", "valid": "val", "validation": "val",
                "validate": "val", "dev": "val", "test": "test"}


def rows_by_split(
    settings, name: str, config_path: str, read: Callable[[list[str]], list], share_images: bool = False
) -> dict[str, tuple[str, list]]:
    """{split: (its files, for errors; its rows)} of a section that has either the key `name`, a file or a list, with
    `split`, or `annotations`, each split's. read(files): their rows. share_images: as split_rows. The rows come with
    the id of their image (image_ids). Raises DataError.
    """
    whole, annotations = getattr(settings, name), settings.annotations
    if bool(whole) == bool(annotations):
        raise DataError(
            f"{config_path} has {'both' if whole else 'neither'} of `{name}` (one file, with `split`) and "
            "`annotations` (a file per split); give one of the two"
        )
    if annotations:
        files = {split: listed(annotations[split]) for split in SPLITS if annotations.get(split)}
        paths = {split: " and ".join(own) for split, own in files.items()}
        return {split: (path, _identified(path, read(files[split]))) for split, path in paths.items()}
    path = " and ".join(listed(whole))
    found = split_rows(path, config_path, read(listed(whole)), settings.split, share_images)
    return {split: (path, rows) for split, rows in found.items()}


def listed(files: str | list[str] | None) -> list[str]:
    """The files that a key names, which takes one or a list."""
    return [files] if isinstance(files, str) else list(files or [])


def split_rows(path: str, config_path: str, rows: Sequence, split, share_images: bool = False) -> dict[str, list]:
    """The rows (with `.image`, `.image_id`, `.split`) of each split that has any; `config_path`: the config's section.

    `split`: counts of images {train: N, …}; "from_file", which reads `.split` of the rows; or what the file calls them,
    {train: NAME, …}. share_images: the file may put rows of one image into several splits. The rows come with the id
    of their image (image_ids). Raises DataError.
    """
    if not split:
        raise DataError(
            f"{path} holds all splits: say how to split it, with {config_path}.split.train=N (val, test), or with "
            "split=from_file where the file has a split column"
        )
    rows = _identified(path, rows)
    if split == "from_file":
        return _from_file(path, rows, None, share_images, config_path)
    if isinstance(split, str):
        raise DataError(f"{config_path}.split={split} is not known; give counts, or from_file")
    check_split_names(f"{config_path}.split", split)
    given = {name: value for name, value in split.items() if value is not None}
    if not any(isinstance(value, str) for value in given.values()):
        return _by_counts(path, config_path, rows, given)
    if not all(isinstance(value, str) for value in given.values()):
        raise DataError(f"{config_path}.split={given} mixes counts with names of the file's splits; give one of them")
    return _from_file(path, rows, given, share_images, config_path)


def _identified(path: str, rows: Sequence) -> list:
    """The rows with the id of their image (image_ids)."""
    ids = image_ids(path, ((row.image, row.image_id) for row in rows))
    return [row._replace(image_id=ids[row.image]) for row in rows]


def _by_counts(path: str, config_path: str, rows: list, counts: Mapping[str, int]) -> dict[str, list]:
    images, found, start = sorted({row.image for row in rows}), {}, 0
    counts = {split: counts.get(split) or 0 for split in SPLITS}
    if any(not isinstance(count, int) or count < 0 for count in counts.values()):
        raise DataError(f"{config_path}.split takes how many each split gets, not {counts}")
    if sum(counts.values()) > len(images):
        tenth = max(len(images) // 10, 1)
        fitting = f"{{train: {max(len(images) - 2 * tenth, 1)}, val: {tenth}, test: {tenth}}}"
        asked = f"{config_path}.split asks for {counts}, but {path} has {len(images)}"
        raise DataError(f"{asked}; set the three together, e.g. '{config_path}.split={fitting}'")
    rows = sorted(rows, key=lambda row: row.image)
    for split, count in counts.items():
        if count:
            own = set(images[start:start + count])
            found[split] = [row for row in rows if row.image in own]
        start += count
    if start < len(images):
        logging.info("%s: %d of %d are in no split, unused", path, len(images) - start, len(images))
    return found


def _from_file(path: str, rows: list, names: Mapping[str, str] | None, share_images: bool, config_path: str):
    """names: what the file calls the splits; None: what files usually call them (_SPLIT_NAMES)."""
    known = _SPLIT_NAMES if names is None else {name.strip().lower(): split for split, name in names.items()}

    def split_of(row) -> str:
        name = str(row.split).strip().lower()
        return known.get(name, name if names is None else f"'{name}'")  # quoted: it is none of train, val, test

    of_images: dict[str, str] = {}
    for row in rows:
        if row.split is None:
            continue
        first, split = of_images.setdefault(row.image, split_of(row)), split_of(row)
        if first != split and not share_images:
            raise DataError(f"{path} puts {row.image} into both {first} and {split}")
    found: dict[str, list] = {}
    for row in rows:
        if row.split is None and (share_images or row.image not in of_images):
            raise DataError(f"{path} names no split for {row.image}; set columns.split, or split by counts")
        # rows without a split, of a second captions file, follow those of the same image
        found.setdefault(of_images[row.image] if row.split is None else split_of(row), []).append(row)
    for split, name in (names or {}).items():
        if split not in found:
            known = ", ".join(sorted({str(row.split) for row in rows if row.split is not None}))
            raise DataError(f"{config_path}.split.{split}={name}: {path} has no such split; it has {known}")
    if other := {split.strip("'"): len({row.image for row in own}) for split, own in found.items()
                 if split not in SPLITS}:  # fmt: skip
        logging.warning("%s: rows of other splits are not used: %s", path, other)
    return {split: found[split] for split in SPLITS if split in found}


def check_split_names(config_path: str, given):
    """Raises DataError unless `given`, found at `config_path` in the config, is a mapping whose keys are splits."""
    if not hasattr(given, "keys"):
        raise DataError(f"{config_path}={given} must be a mapping of {', '.join(SPLITS)}")
    for name in given:
        if name not in SPLITS:
            raise DataError(f"{config_path}.{name} is unknown; there are {', '.join(SPLITS)}")


def report_shared_images(found: dict[str, list]):
    """Warn of pictures that are in training and in a split that is scored."""
    names = {split: {item.image for item in items} for split, items in found.items()}
    for split in ("val", "test"):
        if shared := len(names.get(split, set()) & names.get("train", set())):
            logging.warning("%d of %s are also in train: its scores will flatter", shared, split)


def spread(items: list, count: int | None, config_path: str) -> list:
    """`count` of the items (None: all), spread evenly over their order. Raises DataError for more than there are."""
    if count is None:
        return items
    if not isinstance(count, int) or not 1 <= count <= len(items):
        raise DataError(f"{config_path}={count} must be a number from 1 to {len(items)}, or null for all")
    return [items[i * len(items) // count] for i in range(count)]
