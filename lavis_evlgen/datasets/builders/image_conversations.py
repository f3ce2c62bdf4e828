"""`image_conversations`: a folder of pictures and conversations about them, in LLaVA's form."""

from dataclasses import dataclass
from typing import Literal

from lavis.common.registry import registry

from lavis_evlgen.config.keys import key
from lavis_evlgen.datasets.annotations import splits
from lavis_evlgen.datasets.annotations.conversations import ConversationRow, read_conversations_file
from lavis_evlgen.datasets.annotations.files import report_problems
from lavis_evlgen.datasets.builder import CONFIG_FOLDER, MOST_PICTURES, SPLITS, BuilderSettings, CaptionDatasetBuilder
from lavis_evlgen.datasets.builders.image_folder import ImageFolder, data_folder
from lavis_evlgen.datasets.conversations import ConversationDataset
from lavis_evlgen.media.errors import DataError


class ImageConversationDataset(ImageFolder, ConversationDataset):
    """Conversations about image files of one split, in the folder `images`."""


@dataclass(kw_only=True)
class ImageConversationsSettings(BuilderSettings):
    images: str | None = key("the folder that the image names start from", None)
    conversations: str | list[str] | None = key("one file for all splits, or a list: LLaVA's JSON, or JSONL", None)
    split: Literal["from_file"] | dict[Literal[SPLITS], int | str | None] | None = key(
        "how `conversations` is split: {train: N, val: N, test: N} images by sorted name, from_file, or what the file "
        "calls them: {train: NAME, val: NAME}", None, at_least=0, at_most=MOST_PICTURES,
    )  # fmt: skip
    annotations: dict[Literal[SPLITS], str | list[str] | None] | None = key(
        "instead of `conversations`: {train: FILE, val: FILE, test: FILE}, each a file or a list", None
    )


@registry.register_builder("image_conversations")
class ImageConversationsBuilder(CaptionDatasetBuilder):
    """Builds splits of conversations about image files; relative paths start at the current folder."""

    NAME = "image_conversations"
    config_path = "datasets.image_conversations"
    train_dataset_cls = eval_dataset_cls = ImageConversationDataset
    DATASET_CONFIG_DICT = {"default": str(CONFIG_FOLDER / "image_conversations.yaml")}
    Settings = ImageConversationsSettings

    def build(self) -> dict[str, ImageConversationDataset]:
        if self.settings.text_processor:
            raise DataError(f"{self.config_path}.text_processor: conversations are learnt as they stand; leave it out")
        folder = data_folder(self.settings.images, self.config_path)
        found = splits.rows_by_split(self.settings, "conversations", self.config_path, self._read)
        splits.report_shared_images({split: rows for split, (_, rows) in found.items()})
        return {
            split: ImageConversationDataset(
                self.NAME, split, rows, images=folder,
                max_bad_fraction=self.settings.max_bad_fraction,
                vis_processor=self._processor("vis_processor", "train" if split == "train" else "eval"),
            )
            for split, (_, rows) in found.items()
        }  # fmt: skip

    def _read(self, files: list[str]) -> list[ConversationRow]:
        rows = []
        for file in files:
            found = read_conversations_file(file)
            report_problems(file, found, self.settings.max_bad_fraction, self.config_path)
            rows += found.rows
        return rows
