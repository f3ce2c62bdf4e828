"""The run section of a config: what `runner_evlgen` reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lavis_evlgen.config.keys import key
from lavis_evlgen.models.compile import PARTS
from lavis_evlgen.runners.feature_cache import FeatureCacheSettings
from lavis_evlgen.runners.optim import OptimSettings
from lavis_evlgen.runners.step import StepSettings
from lavis_evlgen.runners.trackers import TrackSettings
from lavis_evlgen.tasks.settings import SharedRunSettings

_LAVIS = "accepted from LAVIS configs; torch.distributed.run decides"


@dataclass(kw_only=True)
class RunSettings(OptimSettings, StepSettings, FeatureCacheSettings, TrackSettings, SharedRunSettings):
    """None as default: training asks for the key, or nothing is done where it is left out."""

    runner: str = key("runner_evlgen", "runner_evlgen")
    task: str = key("what is done with model and data: evlgen_captioning, evlgen_vqa, scst, or a LAVIS task")
    max_iters: int | None = key("optimizer steps of the run", None, at_least=1, at_most=10**9)
    iters_per_inner_epoch: int | None = key("evaluate and save every this many steps", None, at_least=1, at_most=10**9)
    batch_size_train: int | None = key("images per rank and micro-step", None, at_least=1, at_most=10**6)
    texts_per_image: int = key(
        "texts of a picture that are learnt in one pass of it, where it has so many: batch_size_train then counts "
        "pictures (not of run.task=scst, nor of other models than EVLGen's)", 1, at_least=1, at_most=10_000,
    )  # fmt: skip
    batch_size_eval: int | None = key(
        "images per rank in evaluation; left out: batch_size_train", None, at_least=1, at_most=10**6
    )
    num_workers: int = key("data-loading processes per rank", 0, at_least=0, at_most=1000)
    compile: bool | Literal[tuple(PARTS)] | list[Literal[tuple(PARTS)]] = key(
        "parts under torch.compile in training steps: true (all), or of vision, connector, llm", False
    )
    llm_grad_checkpoint: bool = key(
        "true: the language model's activations are computed again in the backward pass: less memory, more time", False
    )
    output_dir: str = key("folder of runs, seen from where you stand")
    run_name: str | int | None = key(
        "name of this run's folder in output_dir; left out: a time stamp", None, at_least=0, at_most=10**18
    )
    resume_ckpt_path: str | None = key(
        "checkpoint of a run to continue in its folder, or auto: the newest of run_name", None
    )
    keep_every: int = key(
        "evaluate only: keep finished rows every this many batches, to go on when cut off; 0: do not", 0, at_least=0,
        at_most=10**9,
    )  # fmt: skip
    train_splits: list[Literal["train"]] = key("must be [train]", ["train"])
    train_dataset_ratios: dict[str, float] | None = key(
        "shares of micro-steps, {data set: number}; left out: by size (not with shards)", None, at_least=0.0,
        at_most=1e9,
    )  # fmt: skip
    mix_per_rank: bool = key(
        "of several training sets, true: each rank draws its own at every micro-step, as LAVIS does; false: all ranks "
        "draw the same one", False,
    )  # fmt: skip
    save_every: int | str = key(
        "save checkpoint_last.pth between evaluations too: every so many steps, or a time such as 30min, 2h; 0: at "
        "evaluations only", 0, at_least=0, at_most=10**9,
    )  # fmt: skip
    log_freq: int = key("steps between log lines", 50, at_least=1, at_most=10**9)
    sheet_pictures: int = key("pictures on captions.png", 12, at_least=0, at_most=10_000)
    world_size: int | None = key(_LAVIS, None, at_least=1, at_most=10**6)
    dist_url: str | None = key(_LAVIS, None)
    distributed: bool | None = key(_LAVIS, None)
