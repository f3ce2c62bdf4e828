"""What a user sees of a run: the start-up table, a progress line with ETA, log.jsonl and trackers, loss.png."""

from __future__ import annotations

import io
import json
import logging
import math
import resource
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from lavis_evlgen import distributed
from lavis_evlgen.models.facts import ModelFacts, facts_of
from lavis_evlgen.models.lengths import of_histogram
from lavis_evlgen.reporting.json_lines import drop_rows_after, read_json_lines
from lavis_evlgen.reporting.plots import loss_plot
from lavis_evlgen.runners.trackers import Trackers

TASK_VALUES = ("reward", "reward_greedy", "entropy", "length")  # of a task with its own loss, in the log
COUNTERS = ("skipped_steps",)  # values that count up over the run: a window shows the last, not the mean


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process in GB: on the GPU where there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def part_rows(model: torch.nn.Module) -> list[tuple]:
    """(part, parameters, trainable, lr_scale, dtypes, bytes) for each part of the model."""
    facts, known = facts_of(model), isinstance(model, ModelFacts)  # other models name no parts
    parts: dict[str, list] = {}
    for name, parameter in model.named_parameters():
        part = facts.part_of(name) if known and parameter.requires_grad else name.split(".")[0]
        row = parts.setdefault(part, [0, 0, set(), 0])
        row[0] += parameter.numel()
        row[1] += parameter.numel() * parameter.requires_grad
        row[2].add(str(parameter.dtype).removeprefix("torch."))
        row[3] += parameter.numel() * parameter.element_size()
    return [(part, n, t, facts.lr_scale.get(part, 1.0), sorted(d), size) for part, (n, t, d, size) in parts.items()]


def startup_table(model: torch.nn.Module, facts: dict[str, str]) -> str:
    """What is frozen, what trains, and the facts of the run, as text."""
    table = Table(title="EVLGen: what is frozen, what trains", title_justify="left")
    for column in ("part", "parameters", "trains", "lr ×", "dtype", "memory"):
        table.add_column(column, justify="left" if column in ("part", "dtype") else "right")
    rows = part_rows(model)
    for part, total, trainable, scale, dtypes, size in rows:
        trains, rate = (f"{trainable / 1e6:.2f}M", f"{scale:g}") if trainable else ("frozen", "")
        table.add_row(part, f"{total / 1e6:.2f}M", trains, rate, ", ".join(dtypes), f"{size / 1e9:.2f} GB")
    totals = [sum(row[i] for row in rows) for i in (1, 2, 5)]
    table.add_section()
    table.add_row("total", f"{totals[0] / 1e6:.2f}M", f"{totals[1] / 1e6:.2f}M", "", "", f"{totals[2] / 1e9:.2f} GB")
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table)
    width = max(map(len, facts))
    return console.export_text() + "\n".join(f"  {key:<{width}}  {value}" for key, value in facts.items())


class Progress:
    """Collects tensors in the hot loop and reads them only when a line is due."""

    def __init__(self, folder: Path, max_steps: int, images_per_step: int, device, label: str = ""):
        """label: in front of every line of the log. `trackers` is set where there are some."""
        self.label = label
        self.folder, self.max_steps, self.images_per_step, self.device = folder, max_steps, images_per_step, device
        self.file = folder / "log.jsonl"
        self.trackers: Trackers | None = None
        self.sums: dict[str, torch.Tensor] = {}
        self.count, self.waited, self.started = 0, 0.0, time.perf_counter()
        self.paused = 0.0
        self.skipped = 0  # steps up to this window whose gradient was not finite
        self.seconds_per_step = None
        self.flops_per_image = None  # of training, once a batch has been counted

    def resume_at(self, step: int):
        """Drop log lines after `step`: those steps will be run again (0: all, of an earlier run in this folder)."""
        drop_rows_after(self.file, step)

    def update(self, waited: float, **values: torch.Tensor):
        """Add one step's values (tensors on the device; nothing is read) and its wait for data in seconds."""
        self.waited += waited
        self.count += 1
        for key, value in values.items():
            value = value.detach().float()
            self.sums[key] = self.sums[key] + value if key in self.sums and key not in COUNTERS else value

    def share(self):
        """Average the window's values over ranks, which each counted their own; every rank calls it."""
        if distributed.initialized() and self.sums:
            values = list(self.sums.values())
            means = distributed.sum_over_ranks(torch.cat([value.flatten() for value in values]))
            parts = (means / distributed.world_size()).split([value.numel() for value in values])
            self.sums = {key: part.view_as(value) for (key, value), part in zip(self.sums.items(), parts, strict=True)}
        if not distributed.is_main():
            self._restart()

    def pause(self, seconds: float):
        """Time that was not training (evaluation, saving) does not count in images/s and ETA."""
        self.paused += seconds

    def line(self, step: int, lr: float) -> dict:
        """Close the window at `step`: log, append to log.jsonl and trackers, start a new window."""
        lengths = self.sums.pop("prompt_lengths", None)
        means = {k: (v if k in COUNTERS else v / self.count).item() for k, v in self.sums.items()}
        row = {"step": step, **means, **({} if lengths is None else of_histogram(lengths)), "lr": lr}
        elapsed = max(time.perf_counter() - self.started - self.paused, 1e-9)
        self.seconds_per_step = elapsed / self.count
        row["images_per_s"] = self.images_per_step * self.count / elapsed
        rate = f"{row['images_per_s']:.1f} images/s"
        if "texts_per_step" in row:
            row["texts_per_s"] = row["texts_per_step"] * self.count / elapsed
            rate += f", {row['texts_per_s']:.1f} texts/s"
        row |= {
            "data_wait": self.waited / elapsed,
            "seconds_per_step": self.seconds_per_step,
            "peak_memory_gb": peak_memory_gb(self.device),
        }
        if self.flops_per_image is not None:
            row["flops_per_image"] = self.flops_per_image
        eta = (self.max_steps - step) * self.seconds_per_step
        more = "".join(f"  {key.removeprefix('loss_')} {row[key]:.4f}" for key in row if key.startswith("loss_"))
        more += "".join(f"  {key.replace('_', ' ')} {row[key]:.3f}" for key in TASK_VALUES if key in row)
        if "across_picture_share" in row:
            more += f"  across-picture share {row['across_picture_share']:.3f}"
        if "prompt_tokens" in row:
            span = f"{row['prompt_tokens_p5']} to {row['prompt_tokens_p95']}"
            more += f"  {row['prompt_tokens']:.1f} tokens a picture ({span})"
        if skipped := round(row.get("skipped_steps", 0)) - self.skipped:
            more += f"  {skipped} of {self.count} steps skipped (gradient not finite)"
            self.skipped += skipped
        logging.info(
            "%sstep %d/%d  loss %.4f  lr %.2e%s  %s  data wait %.0f%%  peak %.1f GB  ETA %s",
            self.label, step, self.max_steps, row["loss"], lr, more, rate,
            100 * row["data_wait"], row["peak_memory_gb"], _clock(eta),
        )  # fmt: skip
        self.write(row)
        self._restart()
        return row

    def _restart(self):
        self.sums, self.count, self.waited, self.paused = {}, 0, 0.0, 0.0
        self.started = time.perf_counter()

    def write(self, row: dict):
        """Append a row to log.jsonl (null where a number is not finite) and to the trackers."""
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with open(self.file, "a") as file:
            file.write(json.dumps(row) + "\n")
        self.track(row)

    def track(self, row: dict):
        """Send a row to the trackers alone."""
        if self.trackers is not None:
            self.trackers.log(row)

    def history(self) -> list[dict]:
        return read_json_lines(self.file)

    def draw(self, title: str):
        """loss.png of the run so far."""
        history = self.history()
        if any("loss" in row or "val_loss_right" in row for row in history):
            loss_plot(self.folder / "loss.png", history, title)


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
