"""Caption and VQA metrics and their blind scores. Knows no model."""

from lavis_evlgen.evaluation.blind import BlindScores, blind_scores, score_with_blind
from lavis_evlgen.evaluation.caption_metrics import CaptionScores, score_captions
from lavis_evlgen.evaluation.order import order_accuracy
from lavis_evlgen.evaluation.vqa_metrics import AnswerScores, score_answers

__all__ = [
    "AnswerScores",
    "BlindScores",
    "CaptionScores",
    "blind_scores",
    "order_accuracy",
    "score_answers",
    "score_captions",
    "score_with_blind",
]
