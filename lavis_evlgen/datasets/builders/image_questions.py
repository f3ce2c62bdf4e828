"""`image_questions`: a folder of pictures and questions about them: VQAv2, OK-VQA, GQA, or one's own file."""

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lavis.common.registry import registry

from lavis_evlgen.config.keys import key
from lavis_evlgen.datasets.annotations import splits
from lavis_evlgen.datasets.annotations.files import report_problems
from lavis_evlgen.datasets.annotations.parquet import ParquetPictures, is_parquet
from lavis_evlgen.datasets.annotations.questions import QuestionRow, read_questions_file
from lavis_evlgen.datasets.builder import CONFIG_FOLDER, MOST_PICTURES, SPLITS, BuilderSettings, CaptionDatasetBuilder
from lavis_evlgen.datasets.builders.image_folder import ImageFolder, data_folder
from lavis_evlgen.datasets.questions import AskedImage, QuestionDataset, group_by_image
from lavis_evlgen.media.errors import DataError
from lavis_evlgen.media.images import decode_image


@dataclass(kw_only=True)
class QuestionsSettings(BuilderSettings):
    """Keys of all data sets of questions about images."""

    pictures: dict[Literal[SPLITS], int | None] | None = key(
        "use this many pictures of a split, spread evenly over it: {train: N, val: N, test: N} (null: all)", {},
        at_least=0, at_most=MOST_PICTURES,
    )  # fmt: skip


@dataclass(kw_only=True)
class ImageQuestionsSettings(QuestionsSettings):
    images: str | None = key("the folder that the image names start from; none for pictures inside Parquet", None)
    questions: str | None = key("one file for all splits: GQA or LAVIS JSON, JSONL, CSV, TSV or Parquet", None)
    split: Literal["from_file"] | dict[Literal[SPLITS], int | str | None] | None = key(
        "how `questions` is split: {train: N, val: N, test: N} images by sorted name, from_file, or what the file "
        "calls them: {train: NAME, val: NAME}", None, at_least=0, at_most=MOST_PICTURES,
    )  # fmt: skip
    annotations: dict[Literal[SPLITS], str | list[str] | None] | None = key(
        "instead of `questions`: {train: FILE, val: FILE, test: FILE}, of VQAv2 and OK-VQA [QUESTIONS, ANNOTATIONS], "
        "of Parquet also several, or a glob", None,
    )  # fmt: skip
    columns: dict[str, str | None] | None = key(
        "the file's column names where they differ: {image: …, question: …, answer: …, question_id: …, answer_type: …}",
        None,
    )
    image_name: str | None = key(
        "official layouts: a picture's file name by its id (COCO_SUBTYPE_{:012d}.jpg; of GQA {}.jpg)", None
    )


class ImageQuestionDataset(ImageFolder, QuestionDataset):
    """Questions about image files of one split, in the folder `images` or inside Parquet files (`pictures`)."""

    def __init__(self, *args, images: str, pictures: ParquetPictures | None = None, **kwargs):
        super().__init__(*args, images=images, **kwargs)
        self.pictures = pictures or ParquetPictures()

    def _load(self, row: dict):
        if row["image"] in self.pictures:
            return decode_image(*self.pictures.content(row["image"]), self.vis_processor)
        return super()._load(row)

    def file_of(self, row: dict) -> str | None:
        return None if row["image"] in self.pictures else super().file_of(row)

    def iter_image_paths(self) -> Iterator[str]:
        for name in dict.fromkeys(row["image"] for row in self.annotation):
            if name not in self.pictures:
                yield self.path_of(name)


class QuestionsBuilder(CaptionDatasetBuilder):
    """What the builders of questions about image files share: which pictures of a split are used."""

    train_dataset_cls = eval_dataset_cls = ImageQuestionDataset
    Settings = QuestionsSettings

    def make(
        self, found: dict[str, list[AskedImage]], folder: str, pictures: ParquetPictures | None = None
    ) -> dict[str, ImageQuestionDataset]:
        """The data sets of the splits found, cut to the key `pictures`; pictures: those inside Parquet files."""
        config_path = f"datasets.{self.NAME}.pictures"
        wanted = self.settings.pictures
        return {
            split: ImageQuestionDataset(
                self.NAME, split, splits.spread(items, wanted.get(split), f"{config_path}.{split}"), images=folder,
                pictures=pictures, max_bad_fraction=self.settings.max_bad_fraction, **self.processors(split),
            )
            for split, items in found.items()
        }


@registry.register_builder("image_questions")
class ImageQuestionsBuilder(QuestionsBuilder):
    """Builds splits of questions about image files; relative paths start at the current folder."""

    NAME = "image_questions"
    config_path = "datasets.image_questions"
    DATASET_CONFIG_DICT = {"default": str(CONFIG_FOLDER / "image_questions.yaml")}
    Settings = ImageQuestionsSettings

    def build(self) -> dict[str, ImageQuestionDataset]:
        self.pictures = ParquetPictures()
        # medical sets ask about one picture in training and in test: that is told, not refused
        rows = splits.rows_by_split(self.settings, "questions", self.config_path, self._read, share_images=True)
        found = {split: _grouped(path, own) for split, (path, own) in rows.items()}
        splits.report_shared_images(found)
        in_folder = any(item.image not in self.pictures for items in found.values() for item in items)
        folder = data_folder(self.settings.images, self.config_path) if in_folder or self.settings.images else ""
        return self.make(found, folder, self.pictures)

    def _read(self, files: list[str]) -> list[QuestionRow]:
        files = _expanded(files)
        if all(map(is_parquet, files)):
            parts = [(file, None) for file in files]
        elif len(files) > 2:
            words = f"{self.config_path}.annotations: {files} are too many"
            raise DataError(f"{words}; give FILE or [QUESTIONS, ANNOTATIONS]")
        else:
            parts = [(files[0], files[1] if len(files) == 2 else None)]
        rows, first, settings = [], 0, self.settings
        for file, answers in parts:
            found = read_questions_file(file, answers, settings.columns, settings.image_name, first)
            report_problems(file, found, settings.max_bad_fraction, self.config_path)
            first += len(found.rows) + len(found.problems)
            rows += found.rows
            self.pictures.places |= found.pictures
        return rows


def _expanded(files: list[str]) -> list[str]:
    """The files, globs among them replaced by the files that they match."""
    return [name for file in files for name in ([file] if Path(file).exists() else sorted(glob.glob(file)) or [file])]


def _grouped(path: str, rows: list[QuestionRow]) -> list[AskedImage]:
    return group_by_image(path, ((row.image, row.image_id, row.question) for row in rows))
