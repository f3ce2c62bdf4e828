"""Two launchers, as on two nodes: one that dies with its process comes back, and the run goes on where it was."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.run_tools import ROOT, Runs, checkpoint, free_port, losses

STEPS, SAVED, SEEN = 200, 40, 45  # a checkpoint is due at SAVED, the node dies after SEEN


def start_node(runs: Runs, port: int, words) -> subprocess.Popen:
    """One of two nodes, started as docs/reproduce.md says."""
    command = ["bash", str(ROOT / "run_scripts" / "launch.sh"), str(runs.path()), "run.resume_ckpt_path=auto"]
    here = {"GPUS": "1", "NODES": "2", "HEAD": f"127.0.0.1:{port}", "BATCH": "2", "GLOBAL_BATCH": "4"}
    python = {"VIRTUAL_ENV": sys.prefix, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **python, **here}
    return subprocess.Popen(command, env=environment, stdout=words, stderr=subprocess.STDOUT, start_new_session=True)


def with_descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(child) for child in children.read_text().split()] if children.exists() else []
    return [pid, *(one for child in found for one in with_descendants(child))]


def listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition, process: subprocess.Popen, seconds: float = 90.0):
    """Poll until `condition()`; fails when the process ends first."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the run ended with {process.returncode} before it got there"
        assert time.monotonic() < deadline, f"the run did not get there in {seconds} s"
        time.sleep(0.01)


def kill(node: subprocess.Popen):
    for pid in with_descendants(node.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    node.wait(30)


@pytest.fixture(scope="module")
def run(parts, tmp_path_factory):
    """(run folder, its losses when a node died, exit codes, what the nodes said)."""
    runs = Runs(parts, tmp_path_factory.mktemp("nodes"), max_iters=STEPS, iters_per_inner_epoch=SAVED)
    port, nodes = free_port(), []
    with open(runs.folder / "words.txt", "w+") as words:
        try:
            nodes = [start_node(runs, port, words)]
            wait_for(lambda: listens(port), nodes[0], 300)  # on one machine HEAD is whoever comes first
            nodes.append(start_node(runs, port, words))
            wait_for(lambda: max(losses(runs.output()), default=0) > SEEN, nodes[0], 300)
            kill(nodes[1])
            before = losses(runs.output())
            nodes[1] = start_node(runs, port, words)
            codes = [node.wait(300) for node in nodes]
        finally:
            for node in nodes:
                kill(node)
        words.seek(0)
        yield runs.output(), before, codes, words.read()


def test_a_node_that_dies_comes_back(run):
    folder, before, codes, words = run
    assert codes == [0, 0], words
    content = checkpoint(folder)
    assert (content["step"], content["world_size"]) == (STEPS, 2)
    after = losses(folder)
    resumed = max(before) - max(before) % SAVED
    assert f"at step {resumed}" in words and max(before) > resumed
    assert list(after) == list(range(1, STEPS + 1))
    assert {step: after[step] for step in before} == before  # the same pictures, bit for bit
