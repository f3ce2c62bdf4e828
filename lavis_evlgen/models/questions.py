"""Which question each text of a batch asks, for merging that looks at it (`model.condition: question`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lavis_evlgen.datasets.annotations.conversations import IMAGE
from lavis_evlgen.models.connectors import VisualPrompt
from lavis_evlgen.models.language.chat import Message


def questions_of(samples: dict) -> str | list[str] | None:
    """The question of each text of a batch: samples["question"] (one for all, or one a text), or what the user says
    first in each of samples["conversations"]. None: the batch has none."""
    if "conversations" in samples:
        return [first_words(messages) for messages in samples["conversations"]]
    return samples.get("question")


def first_words(messages: Sequence[Message]) -> str:
    """What the user says first, without the mark of the picture; empty where that is all."""
    said = (message["content"].replace(IMAGE, " ").strip() for message in messages if message["role"] == "user")
    return next(said, "")


class AsksQuestions:
    """Of a model with `visual_tokens`, `prompt_of`, `language_model` and `reads_questions` (model.condition)."""

    def prompts_for(self, samples: dict, budget: int | None = None) -> VisualPrompt:
        """The visual prompts of a batch: of each picture, or of each text where merging looks at its question."""
        seen, condition = self.asked_in(samples)
        return self.prompt_of(seen, budget=budget, condition=condition)

    def asked_in(self, samples: dict) -> tuple[Tensor, Tensor | None]:
        """`asked` of a batch: what the ViT gives of samples["image"], for each text that has a question.

        samples["texts_per_image"]: how many texts each picture has, a picture's in a row; left out: one each.
        """
        seen, counts = self.visual_tokens(samples["image"]), samples.get("texts_per_image")
        if not self.reads_questions:
            return seen, None
        pictures = None if counts is None else [n for n, count in enumerate(counts) for _ in range(int(count))]
        return self.asked(seen, questions_of(samples), pictures)

    def asked(
        self, tokens: Tensor, questions: str | Sequence[str] | None, pictures: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """tokens (B, ...) of pictures -> those of each of N questions' pictures (N, ...), and the means of the
        questions' embeddings (N, D_l); as they are and None where merging looks at no question.

        pictures: the number of each question's picture; None: one question a picture, in order. Raises ValueError
        where there are not as many of both.
        """
        if not self.reads_questions or questions is None:
            return tokens, None
        if pictures is not None:
            tokens = tokens[torch.tensor(pictures, dtype=torch.long, device=tokens.device)]
        questions = [questions] * len(tokens) if isinstance(questions, str) else list(questions)
        if len(tokens) != len(questions):
            raise ValueError(
                f"model.condition=question: {len(questions)} questions about {len(tokens)} pictures; give one for each "
                "picture, or texts_per_image"
            )
        return tokens, self.language_model.mean_embeddings(questions)
