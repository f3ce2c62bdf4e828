"""kill -9 at any moment while a checkpoint is written leaves one that can be used."""

import os
import random
import signal
import time

import pytest
import torch

from lavis_evlgen.runners.checkpointing import checkpoints
from tests.processes import forked, run
from tests.run_tools import losses

KILLS = 40


def content(step: int) -> dict:
    """A checkpoint of about 4 MB whose numbers say which step it is of."""
    whole = {f"layer{n}": torch.full((100_000,), float(step)) for n in range(10)}
    return {"model": whole, "optimizer": {}, "rng": [], "step": step}


def test_every_kill_while_saving_leaves_a_usable_checkpoint(tmp_path):
    generator, last = random.Random(0), 0
    cut_short = 0
    folder = tmp_path
    for _ in range(KILLS):
        read_end, write_end = os.pipe()

        def save_forever(start=last, pipe=write_end):
            for step in range(start + 1, start + 10_000):
                checkpoints.write(folder / checkpoints.LAST, content(step))
                os.write(pipe, step.to_bytes(4, "little"))

        with forked(save_forever, tmp_path / "words" / "words.txt") as writer:
            writer.wait_for(lambda: (folder / checkpoints.LAST).exists())
            time.sleep(generator.uniform(0, 0.06))
            writer.send(signal.SIGKILL)
            assert writer.wait() == -signal.SIGKILL
        os.close(write_end)
        said = os.read(read_end, 1 << 16)
        os.close(read_end)
        finished = int.from_bytes(said[-4:], "little") if said else last
        cut_short += (folder / f".{checkpoints.LAST}.tmp").exists()
        saved = checkpoints.read(checkpoints.last_readable(folder))
        assert saved["step"] in (finished, finished + 1)  # killed between the rename and the word about it
        assert all((tensor == saved["step"]).all() for tensor in saved["model"].values())
        last = saved["step"]
    assert cut_short > KILLS // 4, "the kills came when nothing was being written"


@pytest.mark.parametrize("wait", [0.0, 0.003, 0.006])
def test_a_run_that_is_killed_while_saving_goes_on_bit_for_bit(whole, same_as_whole, tmp_path, wait):
    killed = whole.copy(tmp_path / "killed", save_every=1)
    temporary = killed.output() / f".{checkpoints.LAST}.tmp"
    with run(killed, "run.resume_ckpt_path=auto") as process:
        process.wait_for(lambda: len(losses(killed.output())) >= 3)
        process.wait_for(temporary.exists)
        time.sleep(wait)
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    killed.train("run.resume_ckpt_path=auto")
    same_as_whole(killed)
