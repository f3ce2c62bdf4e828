"""Caption and VQA metrics, blind scores and run cards. Knows no model.

`lavis_evlgen.evaluation.plots` is imported by its own name, because it brings matplotlib.
"""

from lavis_evlgen.evaluation.blind import BlindScores, blind_scores, score_with_blind
from lavis_evlgen.evaluation.caption_metrics import CaptionScores, score_captions
from lavis_evlgen.evaluation.order import order_accuracy
from lavis_evlgen.evaluation.run_card import run_card, write_run_card
from lavis_evlgen.evaluation.vqa_metrics import AnswerScores, score_answers

__all__ = [
    "AnswerScores",
    "BlindScores",
    "CaptionScores",
    "blind_scores",
    "order_accuracy",
    "run_card",
    "score_answers",
    "score_captions",
    "score_with_blind",
    "write_run_card",
]
