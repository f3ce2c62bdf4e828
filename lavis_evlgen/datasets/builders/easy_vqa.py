"""`easy_vqa`: questions about drawn shapes, from the package easy-vqa (pip extra `quickstart`): no downloads."""

from pathlib import Path

from lavis.common.registry import registry

from lavis_evlgen.compat.environment import require
from lavis_evlgen.datasets.builder import CONFIG_FOLDER
from lavis_evlgen.datasets.builders.image_questions import ImageQuestionDataset, QuestionsBuilder
from lavis_evlgen.datasets.questions import AskedImage, Question, group_by_image
from lavis_evlgen.media.errors import DataError

PACKAGE, EXTRA = "easy_vqa", "quickstart"
VAL_EVERY = 8  # every eighth of the package's training pictures validates


@registry.register_builder("easy_vqa")
class EasyVqaBuilder(QuestionsBuilder):
    """4,000 training and 1,000 test pictures of 64 x 64 pixels with one shape, about ten questions each, 13 answers.

    The package has no validation split: every eighth training picture makes one, and does not train. Questions of
    yes and no have the kind "yes/no", the others "shape" or "colour", by their answer.
    """

    NAME = "easy_vqa"
    DATASET_CONFIG_DICT = {"default": str(CONFIG_FOLDER / "easy_vqa.yaml")}

    def build(self) -> dict[str, ImageQuestionDataset]:
        package = require(PACKAGE, EXTRA)
        folder = Path(package.__file__).parent
        train = _items(folder, "train", package.get_train_questions(), package.get_train_image_paths())
        found = {
            "train": [item for item in train if item.image_id % VAL_EVERY != VAL_EVERY - 1],
            "val": [item for item in train if item.image_id % VAL_EVERY == VAL_EVERY - 1],
            "test": _items(folder, "test", package.get_test_questions(), package.get_test_image_paths()),
        }
        return self.make(found, str(folder))


def _items(folder: Path, split: str, questions: tuple[list, list, list], paths: dict[int, str]) -> list[AskedImage]:
    """The package's (questions, answers, picture numbers) and {picture number: path} as items, by picture number."""
    rows = []
    for number, (text, answer, image_id) in enumerate(zip(*questions, strict=True)):
        if image_id not in paths:
            raise DataError(f"{PACKAGE}: {split} question {number} is about picture {image_id}, which is not there")
        image = str(Path(paths[image_id]).relative_to(folder))
        rows.append((image, image_id, Question(text, (answer,), f"{split}-{number}", _kind(answer))))
    return sorted(group_by_image(f"{PACKAGE} {split}", rows), key=lambda item: item.image_id)


def _kind(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in ("circle", "rectangle", "triangle") else "colour"
