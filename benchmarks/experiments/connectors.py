"""Which connector, decided on the same photos: TomeFormer as released and with what it can add, pooling, Q-Former.

    python -m benchmarks.experiments.connectors --images DIR --captions FILE --steps 300 --language lora

projects/evlgen/flickr8k.yaml without crops and flips, so that the frozen ViT runs once (run.cache_features): all
connectors see the same tokens, photos, order and steps. `--language frozen` leaves the language model as it is. Average
pooling has TomeFormer's 29 tokens, and the 50 that cost as many MACs as TomeFormer with its 29. The loss is over all
five captions of each test photo; differences from pooling with 50 tokens are of the same photos, with the interval of
`evlgen compare --paired` over photos and seeds. A run that was cut off goes on, a finished one is not run again. Writes
benchmarks/results/connectors-LANGUAGE.json and that language model's table in docs/results/connectors.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

from benchmarks.common.result_pages import put_between, spread
from benchmarks.common.training_runs import (
    ROOT,
    Run,
    last_card,
    less_than_first,
    photo_options,
    run_folder,
    scores,
    train,
    training_seconds,
    with_other_seeds,
)
from lavis_evlgen.reporting.provenance import provenance
from lavis_evlgen.reporting.run_card import write_run_card
from lavis_evlgen.reporting.tables import markdown
from lavis_evlgen.tools.compare import read_runs

CONFIG = "projects/evlgen/flickr8k.yaml"
SAME = [
    "run.num_beams=1", "run.cache_precision=bf16", "model.skip=null",
    *(f"datasets.image_captions.vis_processor.train.{key}" for key in ("min_scale=1.0", "flip=false")),
]  # fmt: skip
TOMEFORMER = "TomeFormer, 29"
ARMS = {  # name: (what the table calls it, options); the first is what others are compared with
    "pooling50": ("average pooling, 50", ["model.connector=avgpool", "model.num_query_token=50"]),
    "pooling29": ("average pooling, 29", ["model.connector=avgpool"]),
    "tomeformer": (TOMEFORMER, []),
    "skip": (f"{TOMEFORMER}, pooled skip", ["model.skip=pooled"]),
    "first": (f"{TOMEFORMER}, merge first", ["model.merge_at=input"]),
    "readout": (f"{TOMEFORMER}, group readout", ["model.readout=group"]),
    "first_skip": (f"{TOMEFORMER}, merge first, skip", ["model.merge_at=input", "model.skip=pooled"]),
    "all": (f"{TOMEFORMER}, all three", ["model.merge_at=input", "model.skip=pooled", "model.readout=group"]),
    "qformer": ("Q-Former, one stage, 32", ["model.connector=qformer"]),
    "linear": ("linear, 257", ["model.connector=linear"]),
}
LANGUAGE = {"lora": [], "frozen": ["model.llm_train=null"]}


def plan(args, arm: str, seed: int) -> Run:
    options = [*photo_options(args.images, args.captions), *SAME, *LANGUAGE[args.language], *ARMS[arm][1]]
    options += [f"run.cache_features={args.folder / 'features'}", f"run.seed={seed}", f"run.max_iters={args.steps}"]
    name = f"{args.language}_{arm}_steps{args.steps}_seed{seed}"
    return Run(CONFIG, name, [*options, f"run.iters_per_inner_epoch={args.steps}", *args.set])


def measured(folder: Path, name: str, seed: int, steps: int) -> dict:
    """What a finished run's card and log say; macs: of training, without the ViT, whose tokens are stored."""
    card = last_card(folder, name, "test")
    return {
        "name": name, "seed": seed, "steps": steps, **scores(card), "trains": card["model"]["trainable_parameters"],
        "macs": read_runs([run_folder(folder, name)])[0].rows[-1]["macs"],
        "seconds": training_seconds(folder, name, steps),
    }  # fmt: skip


def table(found: dict[str, list[dict]], folder: Path) -> str:
    """A row for each connector: means over seeds (least to most), and its loss less that of the first."""
    rows = []
    for (arm, runs), less in zip(found.items(), less_than_first(folder, found), strict=True):
        columns = [spread([run[key] for run in runs]) for key in ("loss_right", "cider", "blind_cider")]
        cost = [f"{runs[0]['trains'] / 1e6:.1f}M", f"{runs[0]['macs'] / 1e12:.0f} T"]
        cost.append(f"{mean(run['seconds'] for run in runs) / 60:.0f} min")
        seeds = ", ".join(str(run["seed"]) for run in runs)
        rows.append((ARMS[arm][0], columns[0], less, *columns[1:], *cost, str(runs[0]["steps"]), seeds))
    first = ARMS[next(iter(found))][0]
    header = ("connector, tokens", "loss, right picture", f"less {first} (95 %)", "CIDEr", "blind CIDEr", "trains",
              "MACs, training", "time", "steps", "seeds")  # fmt: skip
    return markdown(header, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of the photos")
    parser.add_argument("--captions", type=Path, required=True, help="with the official split, as Karpathy's file has")
    parser.add_argument("--language", choices=LANGUAGE, default="lora", help="what of the language model learns (lora)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of every run (300)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2, help="runs beside each other (2)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further options for every run")
    parser.add_argument("--folder", type=Path, default=Path("output/connectors"), help="where the runs go")
    parser.add_argument("--out", type=Path, default=None, help="benchmarks/results/connectors-LANGUAGE.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/results/connectors.md")
    args = parser.parse_args()
    args.folder = args.folder.absolute()
    out = args.out or ROOT / f"benchmarks/results/connectors-{args.language}.json"
    plans = {(arm, seed): plan(args, arm, seed) for seed in args.seeds for arm in args.arms}
    first, *others = plans.values()
    train([first], args.folder)  # fills the cache for the others
    train(others, args.folder, args.jobs)
    found = {
        arm: [measured(args.folder, plans[arm, seed].name, seed, args.steps) for seed in args.seeds]
        for arm in args.arms
    }
    setting = {"config": CONFIG, "language": args.language, "steps": args.steps, "set": args.set}
    found = with_other_seeds(found, out, setting)
    found = {arm: found[arm] for arm in ARMS if arm in found}  # those of the file in their places too
    write_run_card(out, {**setting, "results": found, **provenance()})
    put_between(args.page, [table(found, args.folder)], args.language)


if __name__ == "__main__":
    main()
