"""A checkpoint that cannot be written: one line, and what was there before is whole."""

import errno
import resource
import sys

import pytest

from lavis_evlgen.runners.checkpointing import checkpoints
from lavis_evlgen.weights.sources import WeightsError
from tests.faults.test_kill import content
from tests.processes import forked, on_two_ranks
from tests.run_tools import checkpoint


def test_a_full_device_leaves_the_old_checkpoint(tmp_path):
    path, temporary = tmp_path / checkpoints.LAST, tmp_path / f".{checkpoints.LAST}.tmp"
    checkpoints.write(path, content(1))
    temporary.symlink_to("/dev/full")
    with pytest.raises(WeightsError) as error:
        checkpoints.write(path, content(2))
    assert str(error.value) == (
        f"checkpoint {path} cannot be written: No space left on device; the one written before it is whole, of step 1"
    )
    assert checkpoints.read(path)["step"] == 1
    assert not (tmp_path / checkpoints.PREVIOUS).exists() and not temporary.is_symlink()
    checkpoints.write(path, content(2))
    assert checkpoints.read(path)["step"] == 2


@pytest.mark.parametrize("limit", [1, 1000, 2**20, 3 * 2**20])
def test_a_file_that_may_not_grow_leaves_the_old_checkpoint(tmp_path, limit):
    """At several places of the file: torch.save then raises errors of its own."""
    path = tmp_path / checkpoints.LAST
    checkpoints.write(path, content(1))

    def write():
        sys.dont_write_bytecode = True  # of what is first imported here: Python would keep half a file
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            checkpoints.write(path, content(2))
        except WeightsError as error:
            return 7 if "File too large" in str(error) else 8

    with forked(write, tmp_path / "words" / "words.txt") as process:
        assert process.wait() == 7
    assert checkpoints.read(path)["step"] == 1 and [file.name for file in tmp_path.glob("*.pth*")] == [checkpoints.LAST]
    assert not list(tmp_path.glob(".*tmp"))


def test_a_failed_fsync_counts_as_not_written(tmp_path, monkeypatch):
    path = tmp_path / checkpoints.LAST
    checkpoints.write(path, content(1))

    def fail(fd):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoints.os, "fsync", fail)
    with pytest.raises(WeightsError, match="cannot be written: Input/output error"):
        checkpoints.write(path, content(2))
    assert checkpoints.read(path)["step"] == 1


def test_a_run_on_a_full_disk_ends_with_one_line_on_both_ranks(whole, tmp_path, monkeypatch):
    runs = whole.copy(tmp_path, valid_splits=[])
    write = checkpoints.write

    def full_at_the_second(path, what):
        if what["step"] == 10:
            path.with_name(f".{path.name}.tmp").symlink_to("/dev/full")
        write(path, what)

    monkeypatch.setattr(checkpoints, "write", full_at_the_second)
    ranks = on_two_ranks(runs, code=2)
    lines = [line for process in ranks for line in process.words.splitlines() if line.startswith("train.py: ")]
    assert len(lines) == 1 and "No space left on device" in lines[0] and "of step 5" in lines[0]
    assert "Traceback" not in ranks[0].words + ranks[1].words
    assert checkpoint(runs.output())["step"] == 5
