"""What `train.py` and `evaluate.py`, `evlgen train` and `evlgen evaluate` do: read the config, start the processes,
build the parts, run."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings

# before torch: thread oversubscription of several ranks on one CPU, and fork warnings of the fast tokenizers
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from lavis.common.registry import registry  # noqa: E402

from lavis_evlgen import distributed  # noqa: E402
from lavis_evlgen.config import EvlgenConfig, config_errors  # noqa: E402
from lavis_evlgen.errors import explanation  # noqa: E402
from lavis_evlgen.runners.checkpointing.stopping import signals  # noqa: E402
from lavis_evlgen.runners.determinism import be_deterministic  # noqa: E402
from lavis_evlgen.runners.stages import StagedRun  # noqa: E402
from lavis_evlgen.tasks.build import build_data  # noqa: E402
from lavis_evlgen.tasks.settings import SharedRunSettings  # noqa: E402
from lavis_evlgen.weights.bundle import trained_section  # noqa: E402

EPILOG = """examples:
  python {script} --cfg-path projects/evlgen/quickstart.yaml
  python {script} --cfg-path projects/evlgen/quickstart.yaml --options run.max_iters=600 model.tome_r=38
  python -m torch.distributed.run --nproc_per_node=8 {script} --cfg-path projects/evlgen/opt.yaml
continue a run: --options run.resume_ckpt_path=output/.../checkpoint_last.pth
every key of run, model and datasets: evlgen keys"""


def parser(script: str, purpose: str, evaluate: bool = False) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=purpose, epilog=EPILOG.format(script=script), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--cfg-path", required=True, help="run config, e.g. projects/evlgen/quickstart.yaml, or a recipe's "
                   "name (evlgen recipes)")  # fmt: skip
    p.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="override keys of the config")
    if evaluate:
        words = "of a config with stages: the stage whose task and data are used (default: the last)"
        p.add_argument("--stage", metavar="NAME", help=words)
    return p


def set_up_logging():
    """Main rank: times and messages; other ranks: warnings, with their rank."""
    level = logging.INFO if distributed.is_main() else logging.WARNING
    name = f"[rank {distributed.rank()}] " if distributed.initialized() else ""
    logging.basicConfig(level=level, format=f"%(asctime)s {name}%(message)s", datefmt="%H:%M:%S", force=True)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="timm|fairscale|torchvision")


def build(cfg: EvlgenConfig):
    """(task, data sets by name and split, model) of a config."""
    task, datasets = build_data(cfg)
    return task, datasets, task.build_model(cfg)


def run(args, evaluate: bool = False):
    """Train, or only evaluate, as the config says; returns the runner."""
    import torch

    cfg = EvlgenConfig(args, evaluate, trained_section, vars(args).get("stage"))
    with config_errors():
        settings = SharedRunSettings.read(cfg.run_cfg, "run.")
        device = distributed.start(settings.device)
    if settings.deterministic:
        be_deterministic(device)
    set_up_logging()
    if cfg.trained is not None and distributed.is_main():
        cfg.trained.log()
    # every rank builds the same weights; the runner then gives each rank its own dropout
    torch.manual_seed(settings.seed)
    job_id = distributed.from_main(time.strftime("%Y%m%d-%H%M%S"))
    runner_cls = registry.get_runner_class(cfg.run_cfg.get("runner", "runner_evlgen"))
    with config_errors():
        if cfg.stages:
            runner = StagedRun(cfg.stages, runner_cls, job_id)
        else:
            task, datasets, model = build(cfg)
            runner = runner_cls(cfg=cfg, task=task, model=model, datasets=datasets, job_id=job_id)
    runner.train()
    distributed.stop()
    return runner


def main(script: str, purpose: str, evaluate: bool = False, argv=None):
    """Entry of train.py and evaluate.py."""
    start(parser(script, purpose, evaluate).parse_args(argv), script, evaluate)


def from_command(args) -> int:
    """Entry of `evlgen train` and `evlgen evaluate`: args.cfg_path, args.options, of the latter args.stage."""
    start(args, f"evlgen {args.command}", args.command == "evaluate")
    return 0


def start(args, command: str, evaluate: bool):
    """Run; errors that the user can fix are one line, which begins with `command`, and exit code 2."""
    try:
        with signals.handled():
            run(args, evaluate)
    except distributed.FailedOnMain:  # which tells why
        distributed.stop()
        raise SystemExit(2) from None
    except Exception as error:
        words = explanation(error)
        if words is None:
            raise
        distributed.stop()
        print(f"{command}: {words}", file=sys.stderr)
        raise SystemExit(2) from None
