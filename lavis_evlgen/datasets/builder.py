"""What our dataset builders share: no downloads, processors by name, clear errors."""

import logging
from pathlib import Path

import lavis.processors  # noqa: F401  (registers LAVIS's own processors, which our configs may name)
from lavis.common.registry import registry
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder

from lavis_evlgen.media.errors import DataError

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs" / "datasets"
SPLITS = ("train", "val", "test")
SPLIT_COUNTS = dict.fromkeys(SPLITS, (0, 10**10, None))  # in MAPPINGS: how many of a split

COMMON_KEYS = {
    "data_type": "images (LAVIS asks for it)",
    "max_bad_fraction": "stop when more than this share of the data cannot be used, 0 to 1",
    "vis_processor": "{train: {name: …}, eval: {name: …}}: image processors and their keys",
    "text_processor": "{train: {name: …}, eval: {name: …}}: caption processors and their keys",
}


class CaptionDatasetBuilder(BaseDatasetBuilder):
    """Builds {"train", "val", "test"} of CaptionDatasets from data that is here; downloads nothing."""

    NAME = ""
    CONFIG_KEYS: dict[str, str] = COMMON_KEYS
    # what the values may be: lavis_evlgen/config/values.py says how these tables are read
    NUMBERS: dict[str, tuple] = {"max_bad_fraction": (0.0, 1.0)}
    TEXTS: tuple[str, ...] = ("data_type",)

    def build_datasets(self) -> dict:
        datasets = self.build()
        for dataset in datasets.values():
            logging.info(dataset.description)
        return datasets

    def build(self) -> dict:
        raise NotImplementedError(f"{type(self).__name__} must build its splits")

    def processors(self, split: str) -> dict:
        """The two processors of a split, as keyword arguments of CaptionDataset."""
        stage = "train" if split == "train" else "eval"
        return {key: self._processor(key, stage) for key in ("vis_processor", "text_processor")}

    def _processor(self, key: str, stage: str):
        config = (self.config.get(key) or {}).get(stage)
        config_path = f"datasets.{self.NAME}.{key}.{stage}"
        if not config or not config.get("name"):
            raise DataError(f"{config_path} is missing; name one, such as {config_path}.name={_USUAL[key, stage]}")
        found = registry.get_processor_class(config.name)
        if found is None:
            known = ", ".join(sorted(registry.list_processors()))
            raise DataError(f"{config_path}.name={config.name} is no registered processor; known are: {known}")
        return found.from_config(config)


_USUAL = {
    ("vis_processor", "train"): "evlgen_image_train",
    ("vis_processor", "eval"): "evlgen_image_eval",
    ("text_processor", "train"): "evlgen_caption",
    ("text_processor", "eval"): "evlgen_caption",
}
