"""What a user reads when a run ends early."""

import errno
import os
import resource
import sys
from contextlib import contextmanager

import pytest

from lavis_evlgen import cli
from lavis_evlgen.datasets import DataError
from lavis_evlgen.errors import explanation, one_line
from lavis_evlgen.reporting.run_card import write_run_card
from tests.processes import forked
from tests.run_tools import Runs

IN_A_WORKER = """Caught DataError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "worker.py", line 1, in _worker_loop
    data = fetcher.fetch(index)
lavis_evlgen.media.errors.DataError: image_captions: 3 images in a row: cannot be read
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


@contextmanager
def full_disk(kilobytes: int = 30):
    """Files may grow to so much and no further: every write beyond fails in its middle, as on a full disk."""
    before, keeps_none = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # of modules that are first imported within: Python would keep half a file
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        sys.dont_write_bytecode = keeps_none


def last_line(capsys, name: str) -> str:
    """What a command said at its end, which is one line."""
    words = capsys.readouterr().err
    assert "Traceback" not in words, words
    line = words.splitlines()[-1]
    assert line.startswith(f"{name}: ") and words.count(f"{name}: ") == 1, words
    return line


def output_of(kind: str, folder) -> str:
    """A folder that no run can write to."""
    if kind == "in a circle":
        (folder / "a").symlink_to(folder / "b")
        (folder / "b").symlink_to(folder / "a")
        return str(folder / "a" / "out")
    if kind == "a file":
        (folder / "file").write_text("")
        return str(folder / "file")
    return {"below a file": "/dev/null/out", "too long": str(folder / ("x" * 300))}[kind]


@pytest.mark.parametrize(
    "kind, says",
    [("in a circle", "links lead in a circle"), ("a file", "a file"), ("below a file", "Not a directory"),
     ("too long", "give a shorter name")],
)  # fmt: skip
def test_an_output_folder_that_cannot_be_written_is_one_line(runs, tmp_path, capsys, kind, says):
    folder = output_of(kind, tmp_path)
    assert runs.command(f"run.output_dir={folder}") == 2
    line = last_line(capsys, "train.py")
    assert folder[:200] in line and says in line


def test_a_disk_that_fills_up_while_a_checkpoint_is_written_is_one_line(runs, capsys):
    with full_disk():
        assert runs.command() == 2
    line = last_line(capsys, "train.py")
    assert "File too large" in line


def test_a_disk_that_fills_up_while_a_bundle_is_written_is_one_line(finished, tmp_path, capsys):
    with full_disk(8), pytest.raises(SystemExit) as end:
        cli.main(["export", str(finished.output()), str(tmp_path / "out")])
    line = last_line(capsys, "evlgen export")
    assert end.value.code == 2 and str(tmp_path / "out" / "model.safetensors") in line and "File too large" in line


def test_a_run_card_on_a_full_disk_names_its_file_and_leaves_the_old_one(tmp_path):
    card = write_run_card(tmp_path / "run.json", {"metrics": {"CIDEr": 0.5}})
    before = card.read_text()
    with full_disk(1), pytest.raises(OSError) as error:
        write_run_card(card, {"rows": ["a dog"] * 1000})
    assert explanation(error.value).startswith(f"{card}: File too large: ")
    assert card.read_text() == before and list(tmp_path.iterdir()) == [card]


@pytest.mark.parametrize("into, code", [("full disk", 2), ("closed pipe", 1)])
def test_what_is_printed_into_a_full_disk_or_a_closed_pipe(into, code, tmp_path):
    def keys():
        reads, out = os.pipe() if into == "closed pipe" else (None, os.open("/dev/full", os.O_WRONLY))
        os.dup2(out, 1)
        if reads is not None:
            os.close(reads), os.close(out)
        try:
            cli.main(["keys", "model"])
        finally:
            sys.stdout.flush()  # as Python does at its end, where an error would be of no exit code

    with forked(keys, tmp_path / "words.txt") as process:
        assert process.wait() == code and "Traceback" not in process.words, process.words
    says = [line for line in process.words.splitlines() if "Warning" not in line]
    assert not says if code == 1 else says[-1].startswith("evlgen keys: No space left on device: free space")


@pytest.mark.parametrize(
    "error, says",
    [
        (OSError(errno.ENOSPC, "No space left on device", "x.pth"), "x.pth: No space left on device: free space on"),
        (PermissionError(errno.EACCES, "Permission denied", "/data"), "/data: Permission denied: change its permiss"),
        (OSError("Caught OSError in DataLoader worker process 0.\nOriginal Traceback\nOSError: [Errno 24] Too many "
                 "open files: 'a.jpg'"), "a.jpg: Too many open files: raise the limit"),
        (RuntimeError("unable to open file </torch_1> (os error 28)"), "No space left on device: free space"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), None),
        (KeyError("x"), None),
        (RuntimeError("a bug"), None),
    ],
)  # fmt: skip
def test_what_a_user_can_change_is_told_from_a_bug(error, says):
    found = explanation(error)
    assert found is None if says is None else found.startswith(says)


def test_a_bug_met_while_the_system_refused_something_keeps_its_trace():
    try:
        try:
            raise PermissionError(errno.EACCES, "Permission denied", "/data")
        except OSError:
            raise TypeError("a bug") from None
    except TypeError as error:
        assert explanation(error) is None
