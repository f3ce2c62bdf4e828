"""Results that the EVLGen paper reports, for printing beside runs of the same recipe. None was measured here."""

from __future__ import annotations

from typing import NamedTuple


class PaperRow(NamedTuple):
    """COCO val CIDEr (1.0 is 100 in the paper) and hours on 8 A100-80G; None where the paper gives none."""

    name: str
    llm: str
    connector: str
    num_layers: int | None
    steps: int
    cider: float
    hours: float | None


# EVLGen, tables 1 and 2: LAION-115M + CCS-14M + COCO, global batch 1600, EVA-CLIP-g
ROWS = (
    PaperRow("BLIP-2, stage 2 after 250k steps of stage 1", "opt-2.7b", "qformer", None, 80_000, 1.377, 234),
    PaperRow("EVLGen, 55M", "opt-2.7b", "tomeformer", 6, 90_000, 1.340, 47),
    PaperRow("EVLGen, 110M", "opt-2.7b", "tomeformer", 12, 150_000, 1.370, 80),
    PaperRow("EVLGen, 110M", "opt-2.7b", "tomeformer", 12, 250_000, 1.391, 133),
    PaperRow("BLIP-2, both stages", "vicuna-7b", "qformer", None, 330_000, 1.380, None),
    PaperRow("EVLGen", "vicuna-7b", "tomeformer", None, 90_000, 1.378, None),
    PaperRow("EVLGen", "vicuna-7b", "tomeformer", 12, 150_000, 1.379, None),
    PaperRow("EVLGen", "vicuna-7b", "tomeformer", 12, 250_000, 1.391, None),
)


def paper_row(model: dict, steps: int) -> PaperRow | None:
    """The row of the run with this model config (`llm_model`, `connector`, `num_layers`) and number of steps."""
    llm = str(model.get("llm_model") or model.get("opt_model") or "").lower()
    for row in ROWS:
        layers = row.num_layers in (None, model.get("num_layers"))
        if row.llm in llm and row.connector == model.get("connector") and layers and row.steps == steps:
            return row
    return None
