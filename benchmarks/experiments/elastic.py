"""One checkpoint for five numbers of visual tokens against a model for each, on Flickr8k.

    python -m benchmarks.experiments.elastic --images DIR --captions FILE --steps 300

projects/evlgen/flickr8k.yaml (LoRA on the language model) without crops and flips, so that the frozen ViT runs once
(run.cache_features). Five models are trained with model.tome_r={target: N}, --steps steps each; one with {elastic: ...,
draw: one}, as many steps; one with draw: sandwich, as many steps as make it as dear as that one in MACs (without the
ViT). Each elastic checkpoint is evaluated at all five numbers (model.tokens). The loss is over all five captions of
each test photo; differences from the model of that number alone are of the same photos, with the interval of `evlgen
compare --paired` over photos and seeds. A run that was cut off goes on, a finished one is not run again. Writes
benchmarks/results/elastic.json and the tables in docs/results/elastic.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

from benchmarks.common.result_pages import put_between, spread
from benchmarks.common.training_runs import (
    ROOT,
    Run,
    card_of,
    less_than_first,
    log_of,
    photo_options,
    run_folder,
    scores,
    train,
    training_seconds,
    with_other_seeds,
)
from benchmarks.experiments.connectors import CONFIG, SAME
from lavis_evlgen.config import EvlgenConfig
from lavis_evlgen.reporting.json_lines import training_totals
from lavis_evlgen.reporting.provenance import provenance
from lavis_evlgen.reporting.run_card import write_run_card
from lavis_evlgen.reporting.tables import markdown
from lavis_evlgen.tools.cost.macs import cost_of
from lavis_evlgen.tools.cost.texts import Texts

BUDGETS = (10, 19, 29, 65, 137)
ONE, SANDWICH = "elastic, one", "elastic, sandwich"
DRAWS = {ONE: "one", SANDWICH: "sandwich"}


def arms_of(budgets: list[int]) -> dict[str, str]:
    """{what the table calls a training: its option}."""
    alone = {f"{count} alone": f"model.tome_r={{target: {count}}}" for count in budgets}
    listed = ", ".join(map(str, budgets))
    return alone | {arm: f"model.tome_r={{elastic: [{listed}], draw: {draw}}}" for arm, draw in DRAWS.items()}


def steps_at_equal_macs(args, arms: dict[str, str]) -> dict[str, int]:
    """Optimizer steps of each arm: --steps, and of the sandwich as many as cost what `draw: one` does with those."""

    def flops(arm: str) -> int:
        options = argparse.Namespace(cfg_path=str(ROOT / CONFIG), options=[*args.set, arms[arm]])
        cfg = EvlgenConfig(options)
        cost = cost_of(cfg.model_cfg, texts=Texts.of(cfg))
        return cost.step_flops - sum(part.flops for part in cost.parts if part.name == "vision encoder")

    fewer = max(1, round(args.steps * flops(ONE) / flops(SANDWICH)))
    return dict.fromkeys(arms, args.steps) | {SANDWICH: fewer}


def common(args, seed: int) -> list[str]:
    cache = f"run.cache_features={args.folder / 'features'}"
    return [*photo_options(args.images, args.captions), *SAME, cache, f"run.seed={seed}", *args.set]


def training(args, arm: str, option: str, steps: int, seed: int) -> Run:
    name = f"{arm.replace(', ', '_').replace(' ', '_')}_steps{steps}_seed{seed}"
    length = [f"run.max_iters={steps}", f"run.iters_per_inner_epoch={steps}"]
    return Run(CONFIG, name, [*common(args, seed), option, *length])


def evaluation(args, trained: Run, seed: int, count: int) -> Run:
    """Of an elastic training with `count` tokens; its own test at the end is that with the most."""
    if count == max(args.budgets):
        return trained
    weights = run_folder(args.folder, trained.name) / "checkpoint_last.pth"
    options = ["run.evaluate=true", f"model.pretrained={weights}", f"model.tokens={count}"]
    return Run(CONFIG, f"{trained.name}_at{count}", [*common(args, seed), *options])


def measured(args, found: Run, seed: int) -> dict:
    return {"name": found.name, "seed": seed, **scores(card_of(args.folder, found.name))}


def spent(args, found: Run, seed: int, steps: int) -> dict:
    """What a training took; macs: without the ViT, whose tokens are stored."""
    total = training_totals(log_of(args.folder, found.name))[-1]
    seconds = training_seconds(args.folder, found.name, steps)
    return {"name": found.name, "seed": seed, "steps": steps, "macs": total["macs"], "seconds": seconds}


def score_table(found: dict[str, dict[str, list[dict]]], folder: Path) -> str:
    """A row for each number of tokens and training: means over seeds (least to most), and its loss less that of the
    model of this number alone."""
    rows = []
    for count, arms in found.items():
        for (arm, runs), less in zip(arms.items(), less_than_first(folder, arms), strict=True):
            columns = [spread([run[key] for run in runs]) for key in ("loss_right", "cider", "blind_cider")]
            seeds = ", ".join(str(run["seed"]) for run in runs)
            rows.append((count, "alone" if arm not in DRAWS else arm, columns[0], less, *columns[1:], seeds))
    header = ("tokens", "trained", "loss, right picture", "less alone (95 %)", "CIDEr", "blind CIDEr", "seeds")
    return markdown(header, rows)


def cost_table(costs: dict[str, list[dict]]) -> str:
    """What the trainings took, a seed: the models of one number together, and each elastic one."""
    groups = {f"{len(costs) - len(DRAWS)} models": [arm for arm in costs if arm not in DRAWS]}
    rows = []
    for name, arms in (groups | {arm: [arm] for arm in DRAWS if arm in costs}).items():
        steps, macs, seconds = (sum(mean(run[key] for run in costs[arm]) for arm in arms)
                                for key in ("steps", "macs", "seconds"))  # fmt: skip
        rows.append((name, f"{steps:.0f}", f"{macs / 1e12:.1f} T", f"{seconds / 60:.1f}"))
    return markdown(("trained", "steps", "MACs, training", "minutes"), rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of the photos")
    parser.add_argument("--captions", type=Path, required=True, help="with the official split, as Karpathy's file has")
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS), help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of a run (300)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs beside each other (2)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further options for every run")
    parser.add_argument("--folder", type=Path, default=Path("output/elastic"), help="where the runs go")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/elastic.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/results/elastic.md")
    args = parser.parse_args()
    args.folder = args.folder.absolute()
    arms = arms_of(args.budgets)
    steps = steps_at_equal_macs(args, arms)
    runs = {(arm, seed): training(args, arm, arms[arm], steps[arm], seed) for seed in args.seeds for arm in arms}
    first, *others = runs.values()
    train([first], args.folder)  # fills the cache for the others
    train(others, args.folder, args.jobs)
    looked_at = {(arm, seed, count): evaluation(args, runs[arm, seed], seed, count)
                 for arm in DRAWS for seed in args.seeds for count in args.budgets}  # fmt: skip
    train(looked_at.values(), args.folder, args.jobs)
    results = {f"{count} alone": [measured(args, runs[f"{count} alone", seed], seed) for seed in args.seeds]
               for count in args.budgets}  # fmt: skip
    for arm in DRAWS:
        results |= {f"{arm} at {count}": [measured(args, looked_at[arm, seed, count], seed) for seed in args.seeds]
                    for count in args.budgets}  # fmt: skip
    costs = {arm: [spent(args, runs[arm, seed], seed, steps[arm]) for seed in args.seeds] for arm in arms}
    setting = {"config": CONFIG, "budgets": args.budgets, "steps": steps, "set": args.set}
    results = with_other_seeds(results, args.out, setting)
    table = {str(count): {arm: results[key] for arm, key in
                          [(f"{count} alone", f"{count} alone"), *((arm, f"{arm} at {count}") for arm in DRAWS)]}
             for count in args.budgets}  # fmt: skip
    write_run_card(args.out, {**setting, "results": results, "costs": costs, **provenance()})
    put_between(args.page, [score_table(table, args.folder), cost_table(costs)])


if __name__ == "__main__":
    main()
