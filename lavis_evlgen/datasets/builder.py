"""What our dataset builders share: no downloads, processors by name, clear errors."""

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import lavis.processors  # noqa: F401  (registers LAVIS's own processors, which our configs may name)
from lavis.common.registry import registry
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder

from lavis_evlgen.config import ConfigError
from lavis_evlgen.config.keys import Settings, key
from lavis_evlgen.media.errors import DataError

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs" / "datasets"
SPLITS = ("train", "val", "test")
MOST_PICTURES = 10**10  # of a split


@dataclass(kw_only=True)
class BuilderSettings(Settings):
    """Keys of every data set. Those without a default have one in the YAML of each data set, which LAVIS reads."""

    data_type: str = key("images or videos (LAVIS asks for it)")
    max_bad_fraction: float = key(
        "stop when more than this share of the data cannot be used", at_least=0.0, at_most=1.0
    )
    vis_processor: dict | None = key(
        "{train: {name: …}, eval: {name: …}}: image processors (of clips: video processors) and their keys", None
    )
    text_processor: dict | None = key(
        "{train: {name: …}, eval: {name: …}}: caption processors (of questions: question processors) and their keys",
        None,
    )


class CaptionDatasetBuilder(BaseDatasetBuilder):
    """Builds {"train", "val", "test"} of CaptionDatasets from data that is here; downloads nothing."""

    NAME = ""
    Settings: type[BuilderSettings] = BuilderSettings

    @cached_property
    def settings(self) -> BuilderSettings:
        """The section of this data set. Raises DataError."""
        try:
            return self.Settings.read(self.config, f"datasets.{self.NAME}.")
        except ConfigError as error:
            raise DataError(str(error)) from None

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
