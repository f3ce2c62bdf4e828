"""Pictures into train, val and test: by counts in the order of file names, or as the file says."""

import logging
from collections import Counter
from collections.abc import Sequence

from lavis_evlgen.datasets.builder import SPLITS
from lavis_evlgen.media.errors import DataError

# Names of splits in the wild; Karpathy's restval is COCO val that he adds to training, MSR-VTT has validate.
_SPLIT_NAMES = {"train": "train", "restval": "train", "val": "val", "valid": "val", "validation": "val",
                "validate": "val", "dev": "val", "test": "test"}


def split_items(path: str, config_path: str, rows: Sequence, items: list, split) -> dict[str, list]:
    """The items (one a picture, with `.image`) of each split that has any; `config_path` is the config's section.

    `split`: counts {train: N, …}, or "from_file", which reads `.image` and `.split` of `rows`.
    """
    if not split:
        raise DataError(
            f"{path} holds all splits: say how to split it, with {config_path}.split.train=N (val, test), or with "
            "split=from_file where the file has a split column"
        )
    if isinstance(split, str):
        if split != "from_file":
            raise DataError(f"{config_path}.split={split} is not known; give counts, or from_file")
        return _from_file(path, rows, items)
    return _by_counts(path, config_path, items, split)


def _by_counts(path: str, config_path: str, items: list, counts) -> dict[str, list]:
    check_split_names(f"{config_path}.split", counts)
    items, found, start = sorted(items, key=lambda item: item.image), {}, 0
    counts = {split: counts.get(split) or 0 for split in SPLITS}
    if any(not isinstance(count, int) or count < 0 for count in counts.values()):
        raise DataError(f"{config_path}.split takes how many each split gets, not {counts}")
    if sum(counts.values()) > len(items):
        tenth = max(len(items) // 10, 1)
        fitting = f"{{train: {max(len(items) - 2 * tenth, 1)}, val: {tenth}, test: {tenth}}}"
        asked = f"{config_path}.split asks for {counts}, but {path} has {len(items)}"
        raise DataError(f"{asked}; set the three together, e.g. '{config_path}.split={fitting}'")
    for split, count in counts.items():
        if count:
            found[split] = items[start:start + count]
        start += count
    if start < len(items):
        logging.info("%s: %d of %d are in no split, unused", path, len(items) - start, len(items))
    return found


def _from_file(path: str, rows: Sequence, items: list) -> dict[str, list]:
    split_of: dict[str, str] = {}
    for row in rows:
        if row.split is None:
            raise DataError(f"{path} names no split for {row.image}; set columns.split, or split by counts")
        split = str(row.split).strip().lower()
        split = _SPLIT_NAMES.get(split, split)
        if split_of.setdefault(row.image, split) != split:
            raise DataError(f"{path} puts {row.image} into both {split_of[row.image]} and {split}")
    if unused := Counter(split for split in split_of.values() if split not in SPLITS):
        logging.warning("%s: rows of other splits are not used: %s", path, dict(unused))
    found = {split: [item for item in items if split_of[item.image] == split] for split in SPLITS}
    return {split: items for split, items in found.items() if items}


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
