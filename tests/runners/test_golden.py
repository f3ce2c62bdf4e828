"""Twenty steps of the tiny config against the losses they gave before: any change of the computation shows.

When a change is meant: `python -m tests.runners.test_golden` writes the trace anew. Say in the commit why it moved. The
tolerance leaves room for other processors and library versions, not for another computation. transformers 5 has a trace
of its own: it loads a ViT without drawing random numbers, so that what is drawn afterwards differs from 4.
"""

import json
import tempfile
from pathlib import Path

import pytest
import transformers

from tests.run_tools import Runs, losses, save_parts

MAJOR = int(transformers.__version__.partition(".")[0])
TRACE = Path(__file__).with_name("golden_trace.json" if MAJOR == 4 else f"golden_trace_transformers{MAJOR}.json")
TOLERANCE = 2e-3  # relative


def trace(parts: dict[str, str], folder: Path) -> dict[int, float]:
    runs = Runs(parts, folder, max_iters=20, iters_per_inner_epoch=20, warmup_steps=5, batch_size_train=4)
    runs.train()
    return losses(runs.output())


def test_twenty_steps_lose_what_they_lost_before(parts, tmp_path):
    expected = {int(step): loss for step, loss in json.loads(TRACE.read_text()).items()}
    assert trace(parts, tmp_path) == pytest.approx(expected, rel=TOLERANCE)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = trace(save_parts(Path(folder) / "parts"), Path(folder))
    TRACE.write_text(json.dumps({step: round(loss, 6) for step, loss in found.items()}, indent=1) + "\n")
