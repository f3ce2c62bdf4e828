"""Checkpoints that are empty, cut short, altered by a bit, or of another model."""

import logging
import random
import shutil

import pytest
import torch

from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.runners.checkpointing import checkpoints
from lavis_evlgen.weights.sources import WeightsError, read_state_dict
from tests.run_tools import Runs, checkpoint, same_tensors
from tests.test_cli import evlgen

FLIPS = 60
LENGTHS = [0, 1, 100, 4096, 0.3, 0.7, -200, -20, -1]  # bytes, shares, bytes from the end


@pytest.fixture
def folder(whole, tmp_path) -> Runs:
    """That run's folder, copied: checkpoints of steps 10 and 5."""
    runs = whole.copy(tmp_path)
    shutil.copytree(whole.output(), runs.output())
    steps = [checkpoints.step_of(runs.output() / name) for name in (checkpoints.LAST, checkpoints.PREVIOUS)]
    assert steps == [10, 5]
    return runs


def cut(file, length):
    whole = file.read_bytes()
    file.write_bytes(whole[: int(length * len(whole)) if isinstance(length, float) else length])


def flip(file, bit: int):
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


@pytest.mark.parametrize("length", LENGTHS)
def test_one_that_is_cut_short_is_one_clear_error_and_auto_takes_the_one_before(folder, caplog, length):
    last, previous = (folder.output() / name for name in (checkpoints.LAST, checkpoints.PREVIOUS))
    cut(last, length)
    with pytest.raises(WeightsError, match="cannot be read") as error:
        checkpoints.read(last)
    assert str(last) in str(error.value) and str(previous) in str(error.value) and "\n" not in str(error.value)
    with caplog.at_level(logging.WARNING):
        assert checkpoints.last_readable(folder.output()) == previous
    assert str(last) in caplog.text and str(previous) in caplog.text
    assert not last.exists() and (folder.output() / checkpoints.BROKEN).exists()


def test_auto_goes_on_from_the_one_before(folder, same_as_whole, capsys):
    cut(folder.output() / checkpoints.LAST, 0)
    assert folder.command("run.resume_ckpt_path=auto") == 0
    words = capsys.readouterr().err
    assert "it is empty (0 bytes)" in words and "at step 5" in words
    same_as_whole(folder)


def test_a_broken_one_never_takes_the_place_of_the_one_before(folder):
    """Also where a run was told to go on from that one by its name."""
    cut(folder.output() / checkpoints.LAST, 0.5)
    folder.train(f"run.resume_ckpt_path={folder.output() / checkpoints.PREVIOUS}", "run.max_iters=7")
    assert checkpoints.read(folder.output() / checkpoints.PREVIOUS)["step"] == 5
    assert checkpoints.read(folder.output() / checkpoints.LAST)["step"] == 7


def test_when_all_are_broken_it_says_so_and_starts_nothing_new(folder, capsys):
    for name in (checkpoints.LAST, checkpoints.PREVIOUS):
        cut(folder.output() / name, 1000)
    assert folder.command("run.resume_ckpt_path=auto") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert checkpoints.LAST in line and checkpoints.PREVIOUS in line and "either" in line
    assert (folder.output() / checkpoints.LAST).stat().st_size == 1000


def test_a_folder_that_holds_only_the_one_before_is_a_run(folder, same_as_whole, capsys):
    """As a kill between two renames leaves it."""
    for name in (checkpoints.LAST, checkpoints.BEST):
        (folder.output() / name).unlink()
    assert folder.command() == 2
    assert f"holds the {checkpoints.PREVIOUS} of another run" in capsys.readouterr().err.splitlines()[-1]
    assert evlgen("export", folder.output(), folder.folder / "bundle") == 0
    assert folder.command("run.resume_ckpt_path=auto") == 0
    # what had been the best before is in the checkpoint that it goes on from
    same_as_whole(folder)


def test_no_flipped_bit_goes_unnoticed(folder, tmp_path):
    """Of a checkpoint and of weights alone. What it may hit without harm is padding: then all is as it was."""
    last, generator = folder.output() / checkpoints.LAST, random.Random(0)
    torch.save({"model": checkpoint(folder.output())["model"]}, tmp_path / "weights.pth")
    readers = {last: checkpoints.read, tmp_path / "weights.pth": lambda path: read_state_dict(str(path), "checkpoint")}
    refused = 0
    for file, read in readers.items():
        whole, content = file.read_bytes(), read(file)
        for _ in range(FLIPS):
            flip(file, generator.randrange(8 * len(whole)))
            try:
                assert same_tensors(read(file), content)
            except WeightsError as error:
                assert str(file) in str(error) and "\n" not in str(error)
                refused += 1
            file.write_bytes(whole)
    assert refused > FLIPS


def test_a_flipped_bit_in_a_tensor_is_told_by_all_that_read_it(folder, tmp_path, capsys):
    """Each of these took it before."""
    last = folder.output() / checkpoints.LAST
    tensor = checkpoint(folder.output())["model"]["llm_proj.weight"]
    place = last.read_bytes().find(tensor.numpy().tobytes())
    flip(last, 8 * (place + 4 * 11))  # the last bit of its twelfth number
    assert not torch.equal(checkpoint(folder.output())["model"]["llm_proj.weight"], tensor)
    for attempt in (
        lambda: folder.command(f"model.pretrained={last}", "run.test_splits=[test]", script="evaluate.py"),
        lambda: folder.command(f"run.resume_ckpt_path={last}"),
        lambda: evlgen("caption", tmp_path / "no.png", "--run", folder.output(), "--checkpoint", last),
        lambda: evlgen("export", folder.output(), tmp_path / "bundle", "--checkpoint", last),
    ):
        assert attempt() == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert str(last) in line and "damaged: the checksum of" in line


def test_a_flipped_bit_in_a_bundle(folder, tmp_path, capsys):
    bundle, generator = tmp_path / "bundle", random.Random(0)
    assert evlgen("export", folder.output(), bundle) == 0
    file = bundle / "model.safetensors"
    whole = file.read_bytes()
    EVLGen.from_pretrained(str(bundle))
    for _ in range(FLIPS):
        flip(file, generator.randrange(8 * len(whole)))
        with pytest.raises(WeightsError, match="model.safetensors is not a file of plain tensors: .*damaged, or not"):
            read_state_dict(str(bundle), "checkpoint")
        file.write_bytes(whole)
    flip(file, 8 * len(whole) - 1)
    with pytest.raises(WeightsError, match="its SHA-256 differs"):
        EVLGen.from_pretrained(str(bundle))
    assert evlgen("convert", bundle, tmp_path / "released.pth", "--to", "released") == 2
    assert "its SHA-256 differs" in capsys.readouterr().err.splitlines()[-1]


def test_a_bundle_or_checkpoint_without_digest_still_loads(folder, tmp_path):
    bundle = tmp_path / "bundle"
    assert evlgen("export", folder.output(), bundle) == 0
    config = bundle / "config.json"
    config.write_text(config.read_text().replace('"sha256"', '"another_key"'))
    EVLGen.from_pretrained(str(bundle))
    content = checkpoint(folder.output())
    torch.serialization.set_crc32_options(False)
    torch.save(content, tmp_path / "no_crc.pth")
    torch.serialization.set_crc32_options(True)
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("no_crc.pth", "old.pth"):
        assert checkpoints.read(tmp_path / name)["step"] == 10


@pytest.mark.parametrize(
    "options, says",
    [
        (["model.num_layers=1"], "have no place"),
        (["model.num_layers=3", "model.connector_init=random"], "differ in shape"),
        (["model.connector=avgpool", "model.num_query_token=13"], "have no place"),
    ],
)
def test_one_of_another_architecture_changes_nothing(folder, capsys, options, says):
    last = folder.output() / checkpoints.LAST
    before = last.read_bytes()
    for given, script in (("run.resume_ckpt_path=auto", "train.py"), (f"model.pretrained={last}", "evaluate.py")):
        assert folder.command(*options, given, "run.test_splits=[test]", script=script) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert "of another architecture" in line and says in line and checkpoints.LAST in line
    assert last.read_bytes() == before and not (folder.output() / checkpoints.BROKEN).exists()
