"""What optimizer, trainer and reports may ask of a model, each with the answer for one that does not say."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from lavis_evlgen.compat.adapting import take_over
from lavis_evlgen.config import ConfigError


class ModelFacts:
    """Base class of our models; `facts_of` gives other models the defaults."""

    packs_texts = False  # whether batches may have `texts_per_image` (datasets/packing.py)
    reads_questions = False  # whether the visual prompt depends on the question too (model.condition)
    prompt: str = ""  # text before every caption, for the run card
    lr_scale: dict[str, float] = {}  # learning-rate factor of each part; 1 where it is not named
    calibration_pictures: int = 0  # training pictures that `calibrate` wants in front of an evaluation; 0: none

    def part_of(self, name: str) -> str:
        """The part of the model, a key of `lr_scale`, that the trainable parameter `name` belongs to."""
        return "model"

    def text_loss(self) -> dict | None:
        """Of a language model that learns, its loss on text that nobody trains on (models/language/text_loss.py)."""
        return None

    def from_files(self) -> set[str]:
        """Names of trainable parameters that start as files of others have them, or change nothing at first: until a
        stage has trained one of them, checkpoints do without them, and they may be absent as a whole at loading."""
        return set()

    def check_packing(self):
        """Of a model that packs texts: raises ValueError where its language model cannot."""

    def token_draws(self) -> list[tuple[int, ...]]:
        """What a micro-step of training may take as its numbers of visual tokens, each entry as likely as the others;
        `forward` finds it in samples["budgets"]. []: nothing is drawn."""
        return []

    def calibrate(self, images: Iterable[Tensor]):
        """Set what evaluation decides by from pictures, or their stored tokens, on every rank as many; in eval mode."""

    def check_calibrated(self):
        """Raises ValueError where an evaluation lacks what it decides by."""

    def token_counts(self) -> str | None:
        """From how many visual tokens to how many of the prompt, for the start-up table; None: no such line."""
        return None


class LavisModelFacts(ModelFacts):
    """The facts of another model, such as LAVIS's blip2_opt."""

    def __init__(self, model):
        take_over(self, ModelFacts, model)


def facts_of(model) -> ModelFacts:
    """The model itself where it has the facts, else the defaults."""
    return model if isinstance(model, ModelFacts) else LavisModelFacts(model)


def check_packing(model, asked: str):
    """Raises ConfigError where `model` cannot learn or score several texts of a picture; asked: by which key."""
    try:
        facts_of(model).check_packing()
    except ValueError as error:
        raise ConfigError(f"{asked}: {error}") from error


def check_calibrated(model):
    """Raises ConfigError where an evaluation of `model` lacks what it decides by."""
    try:
        facts_of(model).check_calibrated()
    except ValueError as error:
        raise ConfigError(str(error)) from error
