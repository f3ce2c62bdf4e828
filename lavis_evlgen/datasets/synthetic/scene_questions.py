"""`scene_questions`: the drawn pictures of `scenes`, and several questions about each with different answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lavis.common.registry import registry
from PIL import Image

from lavis_evlgen.config.keys import key
from lavis_evlgen.datasets.builder import CONFIG_FOLDER, SPLITS, CaptionDatasetBuilder
from lavis_evlgen.datasets.questions import AskedImage, Question, QuestionDataset
from lavis_evlgen.datasets.synthetic.scene_answers import ASKED, questions_of
from lavis_evlgen.datasets.synthetic.scene_drawing import draw_scene
from lavis_evlgen.datasets.synthetic.scene_specs import KINDS, Scene, sample_scene
from lavis_evlgen.datasets.synthetic.scenes import DRAWING, DrawnSettings, check_drawing
from lavis_evlgen.media.errors import DataError

NAME = "scene_questions"


class SceneQuestionsDataset(QuestionDataset):
    """Questions about `size` drawn scenes of one split, the scenes of `scenes` with the same seed and kinds."""

    def __init__(self, split: str, size: int, *, seed: int = 0, image_size: int = 224,
                 kinds: dict[str, float] | None = None, asked: Sequence[str] = ASKED, **kwargs):
        """`kinds`: weights of the kinds of scene (None: all alike); `asked`: kinds of question. `kwargs` go to
        QuestionDataset."""
        self.seed, self.image_size = seed, image_size
        kinds = dict.fromkeys(KINDS, 1) if kinds is None else kinds
        self.kinds_of_scene = {kind: float(kinds.get(kind) or 0) for kind in KINDS}
        check_drawing(f"datasets.{NAME}", size, image_size, kinds, self.kinds_of_scene)
        self.asked_kinds = tuple(kind for kind in ASKED if kind in asked)
        if not self.asked_kinds or set(asked) - set(ASKED):
            raise DataError(f"datasets.{NAME}.asked={list(asked)} must name some of {', '.join(ASKED)}")
        definition = [DRAWING, seed, image_size, self.kinds_of_scene]
        items = (item for index in range(size) if (item := self._item(split, index)).questions)
        super().__init__(NAME, split, items, definition=definition, **kwargs)

    def _item(self, split: str, index: int) -> AskedImage:
        image_id = f"{split}-{index:06d}"
        found = [asked for asked in questions_of(self._scene(split, index)) if asked.kind in self.asked_kinds]
        questions = (
            Question(asked.question, (asked.answer,), f"{image_id}-{number}", asked.kind)
            for number, asked in enumerate(found)
        )
        return AskedImage(index, image_id, tuple(questions))

    def _scene(self, split: str, index: int) -> Scene:
        return sample_scene(self.seed, split, index, self.kinds_of_scene)

    def scene(self, row: int) -> Scene:
        """What the picture of row `row` shows."""
        return self._scene(self.split, self.annotation[row]["image"])

    def _load(self, row: dict) -> Image.Image:
        return draw_scene(self._scene(self.split, row["image"]), self.image_size)


@dataclass(kw_only=True)
class SceneQuestionsSettings(DrawnSettings):
    kinds: dict[Literal[tuple(KINDS)], float | None] = key(
        "weights of the kinds of scene: {single: W, pair: W, count: W}", at_least=0.0, at_most=1e9
    )
    asked: list[Literal[ASKED]] = key(f"kinds of question: {', '.join(ASKED)}")


@registry.register_builder(NAME)
class SceneQuestionsBuilder(CaptionDatasetBuilder):
    """Builds the splits of questions about drawn scenes; needs no files."""

    NAME = NAME
    train_dataset_cls = eval_dataset_cls = SceneQuestionsDataset
    DATASET_CONFIG_DICT = {"default": str(CONFIG_FOLDER / "scene_questions.yaml")}
    Settings = SceneQuestionsSettings

    def build(self) -> dict[str, SceneQuestionsDataset]:
        settings = self.settings
        return {
            split: SceneQuestionsDataset(
                split, size, seed=settings.seed, image_size=settings.image_size, kinds=settings.kinds,
                asked=settings.asked, max_bad_fraction=settings.max_bad_fraction, **self.processors(split),
            )
            for split in SPLITS if (size := settings.sizes.get(split))
        }
