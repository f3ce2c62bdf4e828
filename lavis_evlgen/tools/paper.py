"""Results that the EVLGen paper reports, for printing beside runs of the same recipe. None was measured here."""

from __future__ import annotations

from typing import NamedTuple


class PaperRow(NamedTuple):
    """COCO val CIDEr (1.0 is 100 in the paper) and hours on 8 A100-80G; None where the paper gives none.

    laion: whether LAION-115M was in the training data, beside CCS-14M and COCO.
    """

    name: str
    llm: str
    connector: str
    num_layers: int | None
    steps: int
    laion: bool
    cider: float
    hours: float | None


# EVLGen, tables 1 and 5: global batch 1600, EVA-CLIP-g
ROWS = (
    PaperRow("BLIP-2, stage 2 after 250k steps of stage 1", "opt-2.7b", "qformer", None, 80_000, True, 1.377, 234),
    PaperRow("EVLGen, 55M", "opt-2.7b", "tomeformer", 6, 90_000, True, 1.340, 47),
    PaperRow("EVLGen, 11M pairs", "opt-2.7b", "tomeformer", 12, 150_000, False, 1.351, 80),
    PaperRow("EVLGen", "opt-2.7b", "tomeformer", 12, 150_000, True, 1.370, 80),
    PaperRow("EVLGen", "opt-2.7b", "tomeformer", 12, 250_000, True, 1.391, 133),
    PaperRow("EVLGen", "vicuna-7b", "tomeformer", None, 90_000, True, 1.378, None),
    PaperRow("EVLGen, 11M pairs", "vicuna-7b", "tomeformer", 12, 150_000, False, 1.380, None),
    PaperRow("EVLGen", "vicuna-7b", "tomeformer", 12, 150_000, True, 1.379, None),
    PaperRow("EVLGen", "vicuna-7b", "tomeformer", 12, 250_000, True, 1.391, None),
)


def paper_row(config: dict, steps: int) -> PaperRow | None:
    """The row of the run with this config (`model`, `datasets`) and number of steps, or None."""
    model, data = config["model"], config.get("datasets") or {}
    llm = str(model.get("llm_model") or model.get("opt_model") or "").lower()
    if "ccs14m" not in data:
        return None
    for row in ROWS:
        same = row.llm in llm and row.connector == model.get("connector") and row.steps == steps
        if same and row.num_layers in (None, model.get("num_layers")) and row.laion == ("laion115m" in data):
            return row
    return None
