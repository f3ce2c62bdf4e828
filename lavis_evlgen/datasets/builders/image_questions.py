"""`image_questions`: a folder of pictures and questions about them: VQAv2, OK-VQA, GQA, or one's own file."""

from dataclasses import dataclass
from typing import Literal

from lavis.common.registry import registry

from lavis_evlgen.config.keys import key
from lavis_evlgen.datasets.annotations import splits
from lavis_evlgen.datasets.annotations.files import report_problems
from lavis_evlgen.datasets.annotations.questions import QuestionRow, read_questions_file
from lavis_evlgen.datasets.builder import CONFIG_FOLDER, MOST_PICTURES, SPLITS, BuilderSettings, CaptionDatasetBuilder
from lavis_evlgen.datasets.builders.image_folder import ImageFolder, data_folder
from lavis_evlgen.datasets.questions import AskedImage, QuestionDataset, group_by_image
from lavis_evlgen.media.errors import DataError


@dataclass(kw_only=True)
class QuestionsSettings(BuilderSettings):
    """Keys of all data sets of questions about images."""

    pictures: dict[Literal[SPLITS], int | None] | None = key(
        "use this many pictures of a split, spread evenly over it: {train: N, val: N, test: N} (null: all)", {},
        at_least=0, at_most=MOST_PICTURES,
    )  # fmt: skip


@dataclass(kw_only=True)
class ImageQuestionsSettings(QuestionsSettings):
    images: str | None = key("the folder that the image names start from", None)
    questions: str | None = key("one file for all splits: GQA or LAVIS JSON, JSONL, CSV or TSV", None)
    split: Literal["from_file"] | dict[Literal[SPLITS], int | None] | None = key(
        "how `questions` is split: {train: N, val: N, test: N} images by sorted name, or from_file", None, at_least=0,
        at_most=MOST_PICTURES,
    )  # fmt: skip
    annotations: dict[Literal[SPLITS], str | list[str] | None] | None = key(
        "instead of `questions`: {train: FILE, val: FILE, test: FILE}, of VQAv2 and OK-VQA [QUESTIONS, ANNOTATIONS]",
        None,
    )
    columns: dict[str, str | None] | None = key(
        "the file's column names where they differ: {image: …, question: …, answer: …, question_id: …, …}", None
    )
    image_name: str | None = key(
        "official layouts: a picture's file name by its id (COCO_SUBTYPE_{:012d}.jpg; of GQA {}.jpg)", None
    )


class ImageQuestionDataset(ImageFolder, QuestionDataset):
    """Questions about image files of one split, in the folder `images`."""

    def __init__(self, *args, images: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.vis_root = str(images)


class QuestionsBuilder(CaptionDatasetBuilder):
    """What the builders of questions about image files share: which pictures of a split are used."""

    train_dataset_cls = eval_dataset_cls = ImageQuestionDataset
    Settings = QuestionsSettings

    def make(self, found: dict[str, list[AskedImage]], folder: str) -> dict[str, ImageQuestionDataset]:
        """The data sets of the splits found, cut to `pictures`."""
        config_path = f"datasets.{self.NAME}.pictures"
        wanted = self.settings.pictures
        return {
            split: ImageQuestionDataset(
                self.NAME, split, splits.spread(items, wanted.get(split), f"{config_path}.{split}"), images=folder,
                max_bad_fraction=self.settings.max_bad_fraction, **self.processors(split),
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
        folder = data_folder(self.settings.images, self.config_path)
        return self.make(self._items_by_split(), folder)

    def _items_by_split(self) -> dict[str, list[AskedImage]]:
        questions, annotations = self.settings.questions, self.settings.annotations
        if bool(questions) == bool(annotations):
            raise DataError(
                f"{self.config_path} has {'both' if questions else 'neither'} of `questions` (one file, with `split`) "
                "and `annotations` (a file per split); give one of the two"
            )
        if questions:
            rows, split = self._read([questions]), self.settings.split
            return splits.split_items(questions, self.config_path, rows, _grouped(questions, rows), split)
        found = {}
        for split in SPLITS:
            if files := annotations.get(split):
                files = [files] if isinstance(files, str) else files
                found[split] = _grouped(files[0], self._read(files))
        splits.report_shared_images(found)
        return found

    def _read(self, files: list[str]) -> list[QuestionRow]:
        if len(files) > 2:
            words = f"{self.config_path}.annotations: {files} are too many"
            raise DataError(f"{words}; give FILE or [QUESTIONS, ANNOTATIONS]")
        answers = files[1] if len(files) == 2 else None
        found = read_questions_file(files[0], answers, self.settings.columns, self.settings.image_name)
        report_problems(files[0], found, self.settings.max_bad_fraction, self.config_path)
        return found.rows


def _grouped(path: str, rows: list[QuestionRow]) -> list[AskedImage]:
    return group_by_image(path, ((row.image, row.image_id, row.question) for row in rows))
