"""EVLGen-Video on real clips, from a model that captions photos: as it is (zero-shot), and trained on few clips.

    python -m benchmarks.experiments.real_clips --videos DIR --captions FILE --start RUN/checkpoint_last.pth

--start is a checkpoint of projects/evlgen/flickr8k.yaml. FILE names the split of each clip (train, test). Each arm
trains for --steps steps of 4 clips with 4 frames (projects/evlgen_video/clips.yaml), from the same weights, and
captions all test clips with three beams. A run that was cut off goes on, a finished one is not run again. Writes
benchmarks/results/real_clips.json and a table between the marks of --page, where it is given.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

from benchmarks.common.result_pages import put_between, spread
from benchmarks.common.training_runs import ROOT, Run, last_card, scores, train, training_seconds, with_other_seeds
from lavis_evlgen.reporting.provenance import provenance
from lavis_evlgen.reporting.run_card import write_run_card
from lavis_evlgen.reporting.tables import markdown
from lavis_evlgen.tools.compare import duration

CONFIG = "projects/evlgen_video/clips.yaml"
IMAGE_MODEL = ["model.llm_train=lora", "model.lr_scale.language_model=0.2"]  # what the checkpoint holds
NO_MIXING = ["model.temporal=false"]
ARMS = {  # name: (what the table calls it, options, trained)
    "zero_shot_mean": ("mean of prompts, zero-shot", [*NO_MIXING, "model.frame_pooling=connector_mean"], False),
    "zero_shot_concat": ("concat, zero-shot", [*NO_MIXING, "model.frame_pooling=concat"], False),
    "mean": ("mean of prompts", [*NO_MIXING, "model.frame_pooling=connector_mean"], True),
    "concat": ("concat", [*NO_MIXING, "model.frame_pooling=concat"], True),
    "gated": ("gated", ["model.residual=gated"], True),
    "convex_positions": ("convex, with positions", ["model.residual=convex", "model.temporal_positions=true"], True),
}


STANDS_STILL = ["run.init_lr=0", "run.min_lr=0", "run.warmup_lr=0", "run.warmup_steps=0"]  # one step that moves nothing


def plan(args, arm: str, seed: int) -> tuple[Run, int]:
    """The run of an arm, and its steps."""
    _, options, trained = ARMS[arm]
    data = {"videos": args.videos.absolute(), "captions": args.captions.absolute(), "split": "from_file"}
    options = [*IMAGE_MODEL, *options, f"model.pretrained={args.start.absolute()}", f"run.seed={seed}"]
    options += [f"datasets.video_captions.{key}={value}" for key, value in data.items()]
    options += ["run.valid_splits=[]", "run.test_splits=[test]"]
    steps = args.steps if trained else 1
    options += [f"run.max_iters={steps}", f"run.iters_per_inner_epoch={steps}"]
    return Run(CONFIG, f"{arm}_steps{steps}_seed{seed}", options + (STANDS_STILL if not trained else [])), steps


def measured(folder: Path, run: Run, seed: int, steps: int) -> dict:
    """What a finished run's card and log say."""
    card = last_card(folder, run.name, "test")
    return {
        "name": run.name, "seed": seed, "steps": steps, **scores(card), "clips": card["data"]["size"],
        "bleu4": card["metrics"]["metrics"]["BLEU-4"], "seconds": training_seconds(folder, run.name, steps),
    }  # fmt: skip


def table(found: dict[str, list[dict]]) -> str:
    """One row for each arm: means over seeds, least and most."""
    header = ("frames", "CIDEr", "BLEU-4", "blind CIDEr", "loss, right clip", "gap, nats/token", "training", "seeds")
    rows = []
    for arm in [arm for arm in ARMS if arm in found]:
        runs, trained = found[arm], ARMS[arm][2]
        columns = [[run[key] for run in runs] for key in ("cider", "bleu4", "blind_cider", "loss_right")]
        columns.append([run["loss_shuffled"] - run["loss_right"] for run in runs])
        took = duration(mean(run["seconds"] for run in runs)) if trained else "none"
        rows.append((ARMS[arm][0], *map(spread, columns), took, ", ".join(str(run["seed"]) for run in runs)))
    return markdown(header, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, required=True, help="folder of the clips")
    parser.add_argument("--captions", type=Path, required=True, help="their captions, with the split of each")
    parser.add_argument("--start", type=Path, required=True, help="checkpoint of the model that captions photos")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of a trained arm (100)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2], help="zero-shot arms take the first")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further options for every run")
    parser.add_argument("--folder", type=Path, default=Path("output/real_clips"), help="where the runs go")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/real_clips.json")
    parser.add_argument("--page", type=Path, help="a page whose table is written")
    args = parser.parse_args()
    folder = args.folder.absolute()
    plans = {
        (arm, seed): plan(args, arm, seed)
        for arm in args.arms for seed in (args.seeds if ARMS[arm][2] else args.seeds[:1])
    }  # fmt: skip
    plans = {key: (run._replace(options=[*run.options, *args.set]), steps) for key, (run, steps) in plans.items()}
    train([run for run, _ in plans.values()], folder)
    found: dict[str, list[dict]] = {}
    for (arm, seed), (run, steps) in plans.items():
        found.setdefault(arm, []).append(measured(folder, run, seed, steps))
    setting = {"config": CONFIG, "steps": args.steps, "set": args.set}
    found = with_other_seeds(found, args.out, setting)
    write_run_card(args.out, {**setting, "results": found, **provenance()})
    if args.page:
        put_between(args.page, [table(found)])
    else:
        print(table(found))


if __name__ == "__main__":
    main()
