"""What SCST adds to a quickstart checkpoint, beside as many more steps of cross-entropy.

    python benchmarks/scst_scenes.py output/evlgen/quickstart/.../checkpoint_best.pth --seeds 42 1 2

From the same checkpoint, each seed trains SCST with either baseline, and cross-entropy for the same steps at the same
rates; finished runs of an earlier call are kept, and one cut off goes on. Writes a Markdown table and
benchmarks/results/scst_scenes.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from training_runs import ROOT, log_of, scores, train

from lavis_evlgen.evaluation.run_card import provenance, write_run_card

CONFIG = "projects/evlgen/scst_quickstart.yaml"
# keys of the scst task mean nothing to evlgen_captioning, and are refused: its arm is the quickstart at SCST's rates
RATES = ["run.init_lr=2.5e-4", "run.min_lr=2.5e-5", "run.warmup_lr=1e-6", "run.warmup_steps=10"]
ARMS = {
    "cross-entropy": ("projects/evlgen/quickstart.yaml", RATES),
    "SCST, greedy": (CONFIG, ["run.baseline=greedy", "run.num_samples=1"]),
    "SCST, leave one out of 4": (CONFIG, ["run.baseline=leave_one_out", "run.num_samples=4"]),
}
COLUMNS = ("cider", "blind_cider", "loss_right", "loss_shuffled")


def measure(number: int, config: str, options: list[str], checkpoint: Path, seed: int, steps: int, folder: Path):
    """Test scores of the last step of one arm with one seed, and its last log window."""
    name = f"{number}_seed{seed}_{steps}"
    # no validation: the last weights are tested, so that no arm is helped by choosing among checkpoints
    options = [*options, f"run.max_iters={steps}", f"run.iters_per_inner_epoch={steps}", "run.valid_splits=[]"]
    card = train(config, name, [*options, f"run.seed={seed}", f"model.pretrained={checkpoint}"], folder, "test")
    rows = log_of(folder, name)
    seconds = sum(row["seconds_per_step"] for row in rows) / len(rows)
    last = {key: rows[-1][key] for key in ("reward", "reward_greedy", "entropy", "length") if key in rows[-1]}
    return {"seed": seed, **scores(card), "seconds_per_step": seconds, **last}


def start(checkpoint: Path, folder: Path) -> dict:
    """Test scores of the checkpoint itself: as many steps as it takes to change nothing."""
    options = ["run.init_lr=0", "run.min_lr=0", "run.warmup_lr=0", "run.warmup_steps=0", "run.max_iters=1"]
    options += ["run.iters_per_inner_epoch=1", "run.valid_splits=[]", f"model.pretrained={checkpoint}"]
    return scores(train("projects/evlgen/quickstart.yaml", "start", options, folder, "test"))


def table(first: dict, results: dict[str, list[dict]]) -> str:
    """Means over seeds, and the span of CIDEr, as Markdown."""
    head = "| weights | CIDEr | from, to | blind CIDEr | loss, right | loss, shuffled | s a step |"
    lines = [head, "|---|" + "---|" * 6]
    cells = [f"{first[key]:.3f}" for key in COLUMNS]
    lines.append(f"| the checkpoint | {cells[0]} | | {' | '.join(cells[1:])} | |")
    for name, runs in results.items():
        mean = {key: sum(run[key] for run in runs) / len(runs) for key in (*COLUMNS, "seconds_per_step")}
        ciders = [run["cider"] for run in runs]
        cells = [f"{mean[key]:.3f}" for key in COLUMNS]
        span = f"{min(ciders):.3f}, {max(ciders):.3f}"
        lines.append(f"| {name} | {cells[0]} | {span} | {' | '.join(cells[1:])} | {mean['seconds_per_step']:.2f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="checkpoint_best.pth of a run of projects/evlgen/quickstart.yaml")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of each run (120)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("output/scst_scenes"), help="where the runs go")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/scst_scenes.json")
    args = parser.parse_args()
    folder, checkpoint = args.folder.absolute(), args.checkpoint.absolute()
    if not checkpoint.is_file():
        parser.error(f"{checkpoint} does not exist")
    first, results = start(checkpoint, folder), {}
    for number, (name, (config, options)) in enumerate(ARMS.items()):
        own = [measure(number, config, options, checkpoint, seed, args.steps, folder) for seed in args.seeds]
        results[name] = own
    words = table(first, results)
    print(words)
    args.out.with_suffix(".md").write_text(words + "\n")
    content = {"steps": args.steps, "start": first, "results": results, "options": ARMS, **provenance()}
    write_run_card(args.out, content)


if __name__ == "__main__":
    main()
