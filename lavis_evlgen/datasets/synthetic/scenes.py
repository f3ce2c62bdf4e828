"""`scenes`: captioned pictures of coloured shapes, drawn when asked for: data for first runs and tests."""

from dataclasses import dataclass
from typing import Literal

from lavis.common.registry import registry
from PIL import Image

from lavis_evlgen.config.keys import key
from lavis_evlgen.config.limits import LARGEST
from lavis_evlgen.datasets.base import CaptionDataset, CaptionedImage
from lavis_evlgen.datasets.builder import CONFIG_FOLDER, SPLITS, BuilderSettings, CaptionDatasetBuilder
from lavis_evlgen.datasets.synthetic.scene_drawing import draw_scene
from lavis_evlgen.datasets.synthetic.scene_language import CAPTIONS_PER_SCENE, captions_of
from lavis_evlgen.datasets.synthetic.scene_specs import KINDS, Scene, sample_scene
from lavis_evlgen.media.errors import DataError

DRAWING = 2  # part of the fingerprint: raise it when the same scene is to look different


class ScenesDataset(CaptionDataset):
    """`size` drawn scenes of one split. Scene i depends on (seed, split, i) and `kinds` only."""

    def __init__(self, split: str, size: int, *, seed: int = 0, image_size: int = 224,
                 captions_per_image: int = 1, kinds: dict[str, float] | None = None, **kwargs):
        """`kinds`: weights of the kinds of scene (None: all alike). `kwargs` go to CaptionDataset."""
        self.seed, self.image_size = seed, image_size
        kinds = dict.fromkeys(KINDS, 1) if kinds is None else kinds
        self.kinds = {kind: float(kinds.get(kind) or 0) for kind in KINDS}
        check_drawing("datasets.scenes", size, image_size, kinds, self.kinds)
        if not 1 <= captions_per_image <= CAPTIONS_PER_SCENE:
            asked = f"datasets.scenes.captions_per_image={captions_per_image}"
            raise DataError(f"{asked} must be 1 to {CAPTIONS_PER_SCENE}")
        items = (self._item(split, index) for index in range(size))
        definition = [DRAWING, seed, image_size, self.kinds]
        super().__init__(
            "scenes", split, items, captions_per_image=captions_per_image, definition=definition, **kwargs
        )

    def _item(self, split: str, index: int) -> CaptionedImage:
        captions = captions_of(sample_scene(self.seed, split, index, self.kinds))
        return CaptionedImage(index, f"{split}-{index:06d}", captions)

    def scene(self, index: int) -> Scene:
        """What the picture of row `index` shows."""
        return sample_scene(self.seed, self.split, self.annotation[index]["image"], self.kinds)

    def _load(self, row: dict) -> Image.Image:
        return draw_scene(sample_scene(self.seed, self.split, row["image"], self.kinds), self.image_size)


def check_drawing(config_path: str, size: int, image_size: int, given: dict, kinds: dict[str, float]):
    """Raises DataError for kinds `given` that are not of `kinds`, weights that are none, and nothing to draw."""
    if unknown := set(given) - set(kinds):
        raise DataError(f"{config_path}.kinds.{min(unknown)} is unknown; kinds are {', '.join(kinds)}")
    if min(kinds.values()) < 0 or sum(kinds.values()) <= 0:
        raise DataError(f"{config_path}.kinds={kinds} must be weights, none below 0 and one above")
    if image_size < 16:
        raise DataError(f"{config_path}.image_size={image_size} is too small to draw in; give 16 or more")
    if size < 1:
        raise DataError(f"{config_path}.sizes has a split of {size} pictures; give 1 or more")


@dataclass(kw_only=True)
class DrawnSettings(BuilderSettings):
    """Keys of all drawn data sets."""

    seed: int = key(
        "another seed draws others; which combinations belong to which split stays", at_least=0, at_most=4 * 10**9
    )
    sizes: dict[Literal[SPLITS], int | None] = key(
        "pictures (or clips: even) per split: {train: N, val: N, test: N}; 0 or null leaves a split away", at_least=0,
        at_most=10**8,
    )  # fmt: skip
    image_size: int = key("side of the drawing in pixels", at_least=16, at_most=LARGEST["image_size"])


@dataclass(kw_only=True)
class ScenesSettings(DrawnSettings):
    captions_per_image: int = key(
        "training captions of each picture, from 1 (the canonical one)", at_least=1, at_most=CAPTIONS_PER_SCENE
    )
    kinds: dict[Literal[tuple(KINDS)], float | None] = key(
        "weights of the kinds of scene: {single: W, pair: W, count: W}", at_least=0.0, at_most=1e9
    )


@registry.register_builder("scenes")
class ScenesBuilder(CaptionDatasetBuilder):
    """Builds the splits of drawn scenes; needs no files."""

    NAME = "scenes"
    train_dataset_cls = eval_dataset_cls = ScenesDataset
    DATASET_CONFIG_DICT = {"default": str(CONFIG_FOLDER / "scenes.yaml")}
    Settings = ScenesSettings

    def build(self) -> dict[str, ScenesDataset]:
        settings = self.settings
        return {
            split: ScenesDataset(
                split, size, seed=settings.seed, image_size=settings.image_size,
                captions_per_image=settings.captions_per_image, kinds=settings.kinds,
                max_bad_fraction=settings.max_bad_fraction, **self.processors(split),
            )
            for split in SPLITS if (size := settings.sizes.get(split))
        }
