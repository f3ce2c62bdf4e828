"""Evaluations on two ranks give the cards of one: captions, questions, clips, after SCST, with rows that do not split.

Both ranks evaluate one config after the other in the same processes: most of the time is importing.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.run_tools import ROOT, Runs, free_port
from tests.tiny import IMAGE_SIZE

SCRIPT = """
import argparse, sys
from lavis_evlgen import distributed, launch
stop, distributed.stop = distributed.stop, lambda: None  # the ranks stay together from config to config
for path in sys.argv[1:]:
    launch.run(argparse.Namespace(cfg_path=path, options=[]), evaluate=True)
stop()
"""


def clips_config(config: dict) -> dict:
    stages = {
        stage: {"name": f"evlgen_video_{stage}", "num_frames": 3, "image_size": IMAGE_SIZE, "mean": "half"}
        for stage in ("train", "eval")
    }
    sizes = {"train": 8, "test": 6}
    config["model"] |= {"arch": "evlgen_video", "num_frames": 3, "frame_pooling": "concat", "temporal": False}
    return {**config, "datasets": {"moving_scenes": {"sizes": sizes, "image_size": 56, "vis_processor": stages}}}


def questions_config(config: dict, folder: Path) -> dict:
    from PIL import Image

    rows = []
    for n in range(4):
        Image.new("RGB", (60, 60), (60 * n, 20, 20)).save(folder / f"{n}.png")
        rows += [{"image": f"{n}.png", "question": f"what is {w}?", "answer": ["red", "blue"][n % 2]} for w in "abc"]
    rows = rows[:-1]  # 11 on two ranks
    (folder / "q.json").write_text(json.dumps(rows))
    stages = config["datasets"]["scenes"]["vis_processor"]
    data = {"images": str(folder), "questions": str(folder / "q.json"), "split": {"test": 4}, "vis_processor": stages}
    config["run"] |= {"task": "evlgen_vqa", "max_len": 4, "blind_share": 0.7}
    for key in ("metrics", "tokenizer", "blind_shuffles"):
        config["run"].pop(key, None)
    return {**config, "datasets": {"image_questions": data}}


@pytest.fixture(scope="module")
def configs(parts, tmp_path_factory) -> dict[str, dict]:
    """By name: the config of an evaluation of trained weights, on data that two ranks cannot share evenly."""
    root = tmp_path_factory.mktemp("two")
    found = {}
    runs = Runs(parts, root / "captions", blind_shuffles=1, max_iters=2, iters_per_inner_epoch=2)
    runs.train()
    weights = runs.output() / "checkpoint_last.pth"
    # a config for each, whose output has a folder for each number of ranks
    for name in ("captions", "scst", "questions", "clips"):
        (root / name).mkdir(exist_ok=True)
        own = runs.copy(root / name, evaluate=True, test_splits=["test"])
        own.config["model"] |= {"pretrained": str(weights)}
        found[name] = own.config
    found["captions"]["run"] |= {"keep_every": 1}
    scst = Runs(
        parts, root / "rewarded", task="scst", baseline="leave_one_out", num_samples=2, max_iters=1, blind_shuffles=1,
        iters_per_inner_epoch=1, init_lr=1e-4,
    )  # fmt: skip
    scst.config["model"] |= {"pretrained": str(weights)}
    scst.train()
    found["scst"]["model"] |= {"pretrained": str(scst.output() / "checkpoint_last.pth")}
    found["scst"]["run"] |= {"task": "scst"}
    found["questions"] = questions_config(found["questions"], root / "questions")
    video = runs.copy(root / "video")
    video.config = clips_config(video.config)
    video.train()
    found["clips"] = clips_config(found["clips"])
    found["clips"]["model"] |= {"pretrained": str(video.output() / "checkpoint_last.pth")}
    return found


def evaluate(configs: dict[str, dict], folder: Path, processes: int) -> dict[str, dict]:
    """Cards and rows by name, of `processes` ranks."""
    paths = []
    for name, config in configs.items():
        config["run"]["output_dir"] = str(folder / name)
        paths.append(folder / f"{name}.yaml")
        paths[-1].write_text(yaml.safe_dump(config))
    script = folder / "evaluate_all.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command = [*launcher, f"--master_port={free_port()}", str(script), *map(str, paths)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with open(folder / "words.txt", "w+") as words:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=words, stderr=words, process_group=0)
        try:
            code = process.wait(200)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        words.seek(0)
        assert code == 0, words.read()[-4000:]
    return {
        name: {
            "card": json.loads((folder / name / "run" / "run.json").read_text()),
            "rows": json.loads((folder / name / "run" / "result" / "test_given.json").read_text())["rows"],
        }
        for name in configs
    }


@pytest.fixture(scope="module")
def one_and_two(configs, tmp_path_factory):
    return [evaluate(configs, tmp_path_factory.mktemp(f"ranks{ranks}"), ranks) for ranks in (1, 2)]


def numbers(value, prefix="") -> dict[str, float]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in numbers(item, f"{prefix}{key}.").items()}
    return {prefix: value} if isinstance(value, int | float) else {}


@pytest.mark.parametrize("name", ["captions", "scst", "questions", "clips"])
def test_two_ranks_give_the_card_of_one(one_and_two, name):
    one, two = (found[name] for found in one_and_two)
    assert two["card"]["data"] == one["card"]["data"] and two["card"]["model"] == one["card"]["model"]
    expected = numbers(one["card"]["metrics"])
    assert numbers(two["card"]["metrics"]) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert "loss_shuffled." in expected and (name == "questions" or "metrics.CIDEr." in expected)
    one, two = (sorted(found["rows"], key=lambda row: int(row["instance_id"])) for found in (one, two))
    assert len(one) == len(two) and len(one) % 2 == (name in ("captions", "scst", "questions"))
    for a, b in zip(one, two, strict=True):
        assert numbers(b) == pytest.approx(numbers(a), rel=1e-4, abs=1e-5)
        assert {k: v for k, v in a.items() if isinstance(v, str)} == {k: v for k, v in b.items() if isinstance(v, str)}
