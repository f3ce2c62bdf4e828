"""Long evaluations say how far they are."""

import logging
import time
from collections.abc import Iterable, Iterator

from lavis_evlgen import distributed


def watched(data_loader) -> Iterator[dict]:
    """The batches of `data_loader`; after half a minute, the main rank logs each tenth with the time left."""
    started, total = time.time(), len(data_loader)
    batches: Iterable[dict] = data_loader
    for done, batch in enumerate(batches, start=1):
        yield batch
        if time.time() - started > 30 and (done % max(1, total // 10) == 0) and distributed.is_main():
            left = (time.time() - started) / done * (total - done)
            logging.info("evaluation: %d of %d batches, %.0f s left", done, total, left)
