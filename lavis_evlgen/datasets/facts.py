"""What trainer, tasks and reports may ask of a data set, each with the answer for one that does not say."""

from __future__ import annotations

from typing import Any, Literal

from lavis_evlgen.compat.adapting import take_over

Media = Literal["image", "video"]


class DatasetFacts:
    """Base class of all data sets here. `adapted_sets` gives those of LAVIS the defaults."""

    media: Media = "image"  # what a sample shows
    max_bad_fraction: float = 0.0  # share of unreadable samples, 0 to 1, above which a run stops
    fingerprint: str | None = None  # sha256 hex digest of all that the samples are made of
    description: str = ""  # one line for the log
    references: dict[Any, list[str]] | None = None  # {image_id: captions} to score against; None: no captions
    answers: dict[Any, list[str]] | None = None  # {question_id: human answers}; None: no questions
    order_captions: dict[Any, str] = {}  # {image_id: caption whose order of events is right}; {}: not asked
    num_images: int  # distinct images or videos; shards do not know it

    def missing_files(self) -> list[str]:
        """Paths of the files that are not on disk, as far as that can be known without reading them."""
        return []


class LavisDataset(DatasetFacts):
    """A data set of another kind (LAVIS's own, a list of samples) with the defaults for what it does not say."""

    def __init__(self, dataset):
        self.dataset, self.num_images = dataset, len(dataset)
        take_over(self, DatasetFacts, dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        return self.dataset[index]

    def __getattr__(self, name: str):
        if name == "dataset":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)  # collater, split, annotation, ...


def adapted_sets(datasets: dict[str, dict]) -> dict[str, dict[str, DatasetFacts]]:
    """{name: {split: data set}} where every data set is a DatasetFacts."""
    return {name: {split: adapted(d) for split, d in splits.items()} for name, splits in datasets.items()}


def adapted(dataset) -> DatasetFacts:
    return dataset if isinstance(dataset, DatasetFacts) else LavisDataset(dataset)
