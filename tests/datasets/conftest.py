import pytest

import lavis_evlgen  # noqa: F401  (its bridges come before LAVIS)
from tests.datasets.helpers import write_pictures


@pytest.fixture
def pictures(tmp_path):
    return write_pictures(tmp_path / "images")
