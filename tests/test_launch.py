"""What a user reads when a run ends early."""

import pytest

from lavis_evlgen.datasets import DataError
from lavis_evlgen.launch import one_line
from tests.run_tools import Runs

IN_A_WORKER = """Caught DataError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "worker.py", line 1, in _worker_loop
    data = fetcher.fetch(index)
lavis_evlgen.datasets.errors.DataError: image_captions: 3 images in a row: cannot be read
"""


def test_an_error_of_a_data_worker_is_one_line():
    assert one_line(DataError(IN_A_WORKER)) == "image_captions: 3 images in a row: cannot be read"
    assert one_line(DataError("a plain\nmessage")) == "a plain\nmessage"


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_that_are_not_there_are_one_line(parts, tmp_path, capsys, workers):
    runs = Runs(parts, tmp_path, num_workers=workers)
    (tmp_path / "images").mkdir()
    (tmp_path / "c.csv").write_text("image,caption\n" + "".join(f"{n}.jpg,a dog\n" for n in range(8)))
    runs.config["datasets"] = {"image_captions": {"images": str(tmp_path / "images"), "split": {"train": 8},
                                                  "captions": str(tmp_path / "c.csv")}}  # fmt: skip
    assert runs.command() == 2
    says = capsys.readouterr().err.splitlines()[-1]
    assert "image_captions train: 8 of 8 images are not there" in says and "0.jpg" in says
