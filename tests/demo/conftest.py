"""A page that is served, of a tiny model; skipped where the extra is absent."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

MEGABYTES = 0.2


def tiny_visitors(megabytes: float):
    """A tiny model and who may look at it."""
    from lavis_evlgen.demo.page import Visitors
    from lavis_evlgen.demo.uploads import Limits
    from lavis_evlgen.processors.images import EvlgenImageEvalProcessor
    from tests.tiny import IMAGE_SIZE, tiny_evlgen

    decoding = {"num_beams": 1, "min_length": 1, "max_length": 6}
    return Visitors(
        tiny_evlgen(max_txt_len=64).eval(), EvlgenImageEvalProcessor(IMAGE_SIZE, mean="half"), decoding,
        torch.device("cpu"), Limits(megabytes, megapixels=1),
    )  # fmt: skip


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """address, port and visitors of a page; `picture(seed)` is a new picture file."""
    pytest.importorskip("gradio", reason="gradio is not installed: uv sync --extra demo")
    from lavis_evlgen.demo.page import start
    from tests.run_tools import free_port

    folder = tmp_path_factory.mktemp("served")

    def picture(seed: int = 0):
        path = folder / f"{seed}.png"
        noise = np.random.default_rng(seed).integers(0, 255, (60, 80, 3), np.uint8)
        Image.fromarray(noise).save(path)
        return path

    visitors = tiny_visitors(MEGABYTES)
    port = free_port()
    page, address = start(visitors, "127.0.0.1", port, block=False)
    yield SimpleNamespace(address=address, port=port, visitors=visitors, picture=picture, page=page)
    page.close(verbose=False)
