"""Whole runs on tiny parts saved to disk: what train.py does, in seconds.

In this process with `train(...)`, in forked ones by `tests/processes.py`. `tests/conftest.py` has the fixtures.
"""

import argparse
import copy
import json
import socket
import zlib
from pathlib import Path

import torch
import yaml
from transformers import BertConfig, BertModel

from lavis_evlgen import launch
from lavis_evlgen.models.vision.dinov2_onnx import RENAMED
from tests.tiny import IMAGE_SIZE, tiny_dinov2, tiny_llama, tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
EXIT_USER_ERROR = 2


def redraw(model: torch.nn.Module) -> torch.nn.Module:
    """Weights as a function of their names, so that they do not depend on the order in which a library draws."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for before, now in RENAMED:  # the names of transformers 4, in every version
                name = name.replace(now, before)
            if parameter.ndim > 1:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def save_parts(folder: Path) -> dict[str, str]:
    """Folders of a tiny DINOv2, BERT and LLaMA, by the config key that names them."""
    bert = BertConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32,
    )  # fmt: skip
    parts = {"vit_model": tiny_dinov2(), "connector_init": BertModel(bert), "llm_model": tiny_llama()}
    for key, model in parts.items():
        redraw(model).save_pretrained(folder / key, safe_serialization=True)
    tiny_tokenizer().save_pretrained(folder / "llm_model")
    return {key: str(folder / key) for key in parts}


def run_config(parts: dict[str, str], output: Path, **run) -> dict:
    """A run config on drawn scenes that trains in a second or two; keyword arguments replace keys of `run`."""
    processor = {"image_size": IMAGE_SIZE, "mean": "half"}
    stages = {stage: {"name": f"evlgen_image_{stage}", **processor} for stage in ("train", "eval")}
    return {
        "model": {
            "arch": "evlgen", "model_type": "quickstart", **parts, "vit_layer": None, "image_size": IMAGE_SIZE,
            "num_layers": 2, "tome_r": 4, "max_txt_len": 40,
        },
        "datasets": {
            "scenes": {
                "sizes": {"train": 12, "val": 6, "test": 5}, "image_size": 56, "vis_processor": stages,
            },
        },
        "run": {
            "runner": "runner_evlgen", "task": "evlgen_captioning", "max_iters": 4, "iters_per_inner_epoch": 4,
            "init_lr": 1e-2, "min_lr": 1e-4, "warmup_lr": 1e-5, "warmup_steps": 2, "weight_decay": 0.05,
            "batch_size_train": 2, "batch_size_eval": 4, "num_workers": 0, "amp": False, "seed": 42,
            "num_beams": 1, "max_len": 8, "metrics": ["CIDEr"], "tokenizer": "simple", "log_freq": 1,
            "output_dir": str(output), "run_name": "run", "train_splits": ["train"], "valid_splits": [],
            "test_splits": [], "device": "cpu", "tensorboard": False, **run,
        },
    }  # fmt: skip


def write_config(folder: Path, config: dict) -> Path:
    path = Path(folder) / "run.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config))
    return path


class Runs:
    """Runs of one tiny config: `folder` holds the config and the runs, each named by `run_name`."""

    def __init__(self, parts: dict[str, str], folder: Path, **run):
        self.folder = Path(folder)
        self.config = run_config(parts, self.folder / "output", **run)

    def copy(self, folder: Path, **run) -> "Runs":
        """The same runs, in another folder."""
        other = copy.copy(self)
        other.folder, other.config = Path(folder), copy.deepcopy(self.config)
        other.config["run"] |= {"output_dir": str(folder / "output"), **run}
        return other

    def path(self) -> Path:
        return write_config(self.folder, self.config)

    def output(self, name: str = "run") -> Path:
        return self.folder / "output" / name

    def train(self, *options: str, evaluate: bool = False):
        """Run in this process; the runner. Errors come as exceptions."""
        args = argparse.Namespace(cfg_path=str(self.path()), options=list(options))
        return launch.run(args, evaluate)

    def command(self, *options: str, script: str = "train.py") -> int:
        """Run in this process as the script would; its exit code."""
        argv = ["--cfg-path", str(self.path()), *(["--options", *options] if options else [])]
        try:
            launch.main(script, "", script == "evaluate.py", argv)
        except SystemExit as end:
            return end.code or 0
        return 0


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def log(folder: Path) -> list[dict]:
    """The rows of log.jsonl that are whole; none before it is there."""
    file = Path(folder) / "log.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def losses(folder: Path) -> dict[int, float]:
    """Training loss by step."""
    return {row["step"]: row["loss"] for row in log(folder) if "loss" in row}


def checkpoint(folder: Path, name: str = "checkpoint_last.pth") -> dict:
    return torch.load(Path(folder) / name, weights_only=True)


def same_tensors(a: dict, b: dict) -> bool:
    """Whether two nested dicts of tensors and plain values are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and set(a) == set(b) and all(same_tensors(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_tensors, a, b))
    return a == b
