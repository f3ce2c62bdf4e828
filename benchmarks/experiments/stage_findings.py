"""Four claims about staged training, each in miniature: what they are worth on real data, with seeds.

    python -m benchmarks.experiments.stage_findings --coco DIR --flickr8k IMAGES CAPTIONS --vqa-rad DIR --start FILE

attention   visual tokens see each other in both directions, or from left to right; language model frozen, and LoRA
ai          AI-generated captions against human ones of the same photos, one each, equal steps; scored on human captions
alignment   the share of the steps that goes into aligning with a frozen language model, before LoRA
radiology   VQA-RAD from the third stage of projects/stages/four_stages_mini.yaml (--start, its checkpoint_last.pth),
            and from nothing

The folders are those of run_scripts/four_stages.sh. A run that was cut off goes on, a finished one is not run again;
`--only` makes some of the four. Writes benchmarks/results/stage_findings-NAME.json and the tables of --page.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

from benchmarks.common.result_pages import put_between, spread
from benchmarks.common.training_runs import ROOT, Run, last_card, run_folder, scores, train, with_other_seeds
from lavis_evlgen.reporting.provenance import provenance
from lavis_evlgen.reporting.run_card import write_run_card
from lavis_evlgen.reporting.stage_files import stage_folders
from lavis_evlgen.reporting.tables import markdown

PHOTOS, STAGES = "projects/evlgen/flickr8k.yaml", "projects/stages/four_stages_mini.yaml"
PAGE = ROOT / "docs/results/stages.md"
SCORED = 200  # photos of COCO that are scored
ALIGN = "ln_vision.*, connector.*, llm_proj.*"
SHARES = (0.0, 0.25, 0.5, 0.75)
FROZEN, VISUAL = "model.llm_train=null", "model.prompt_attention=visual"


def photos(args, options: list[str], images: Path | None = None, **files) -> tuple[str, list[str]]:
    """The config of captions, and its options: greedy, scored once."""
    found = {"images": images or args.flickr8k[0], **(files or {"captions": args.flickr8k[1]})}
    data = [f"datasets.image_captions.{key}={value}" for key, value in found.items()]
    steps = [f"run.max_iters={args.steps}", f"run.iters_per_inner_epoch={args.steps}", "run.num_beams=1"]
    return PHOTOS, [*data, *steps, *options]


def attention(args) -> dict[str, tuple[str, list[str]]]:
    """label -> config and options of its runs, as the three below."""
    return {
        "frozen, causal": photos(args, [FROZEN]),
        "frozen, visual": photos(args, [FROZEN, VISUAL]),
        "LoRA, causal": photos(args, []),
        "LoRA, visual": photos(args, [VISUAL]),
    }


def ai(args) -> dict[str, tuple[str, list[str]]]:
    """Photos that have captions of both kinds; the last of them by name are scored on all human captions."""
    human, model = (captions_of(args.coco / name) for name in ("captions.csv", "captions_vinvl.csv"))
    both = sorted(set(human) & set(model))
    seen, scored = both[:-args.scored], both[-args.scored :]
    files = {"ai": {name: model[name][:1] for name in seen}, "human": {name: human[name][:1] for name in seen},
             "test": {name: human[name] for name in scored}}  # fmt: skip
    for name, rows in files.items():
        with open(args.folder / f"coco_{name}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "caption"])
            writer.writerows([image, caption] for image, captions in rows.items() for caption in captions)

    def of(kind: str):
        names = f"{{train: {args.folder}/coco_{kind}.csv, val: null, test: {args.folder}/coco_test.csv}}"
        options = ["datasets.image_captions.captions=null", "datasets.image_captions.split=null"]
        options += ["run.texts_per_image=1", "run.batch_size_train=8"]  # of either kind one caption a photo
        return photos(args, options, args.coco / "images", annotations=names)

    return {"AI-generated": of("ai"), "human": of("human")}


def alignment(args) -> dict[str, tuple[str, list[str]]]:
    found = {}
    for share in SHARES:
        first = round(share * args.steps)
        rest = args.steps - first
        stages = [f"{{name: captions, run: {{max_iters: {rest}, iters_per_inner_epoch: {rest}}}}}"]
        if first:
            keys = f"max_iters: {first}, iters_per_inner_epoch: {first}, test_splits: []"
            stages.insert(0, f"{{name: align, trains: [{ALIGN}], run: {{{keys}}}}}")
        found[f"{share:.0%} of the steps"] = photos(args, [f"stages=[{', '.join(stages)}]"])
    return found


def radiology(args) -> dict[str, tuple[str, list[str]]]:
    keys = f"task: evlgen_vqa, max_iters: {args.steps}, iters_per_inner_epoch: {args.steps}, init_lr: 2.5e-3"
    keys += ", prompt: 'Question: {} Short answer:', metric: auto, num_beams: 3, max_len: 8, min_len: 1"
    keys += ", length_penalty: 0, test_splits: [test]"
    images = "{train: {name: evlgen_image_eval, mean: imagenet}, eval: {name: evlgen_image_eval, mean: imagenet}}"
    data = f"{{images: {args.vqa_rad}/images, questions: {args.vqa_rad}/qa.json, split: from_file"
    data += f", vis_processor: {images}}}"
    stage = f"stages=[{{name: radiology, datasets: {{image_questions: {data}}}, run: {{{keys}}}}}]"
    start = [] if args.start is None else [f"model.pretrained={args.start}"]
    found = {"from nothing": (STAGES, [stage])}
    return found | ({"from the third stage": (STAGES, [stage, *start])} if start else {})


FINDINGS = {"attention": attention, "ai": ai, "alignment": alignment, "radiology": radiology}


def captions_of(path: Path) -> dict[str, list[str]]:
    """image -> captions of a table image,caption,..."""
    found: dict[str, list[str]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["image"], []).append(row["caption"])
    return found


def measured(folder: Path, name: str, seed: int, finding: str) -> dict[str, float]:
    """What tables show of a finished run: of its last stage, where it has stages."""
    inside = [stage.name for stage in stage_folders(run_folder(folder, name))]
    card = last_card(folder, "/".join([name, *inside[-1:]]), "test")
    if finding != "radiology":
        return {"seed": seed, **scores(card)}
    metrics = card["metrics"]
    kinds = {kind: metrics["metrics"][f"accuracy {kind}"] for kind in ("closed", "open")}
    blind = {f"blind {kind}": metrics["blind_by_kind"][kind]["accuracy"] for kind in kinds}
    return {"seed": seed, **kinds, **blind, **{key: metrics[key] for key in ("loss_right", "loss_shuffled")}}


COLUMNS = {"CIDEr": "cider", "blind CIDEr": "blind_cider", "closed": "closed", "blind closed": "blind closed",
           "open": "open", "blind open": "blind open", "loss, right picture": "loss_right"}  # fmt: skip


def table(finding: str, found: dict[str, list[dict]]) -> str:
    """One row for each label: means over seeds, least and most."""
    columns = {title: key for title, key in COLUMNS.items() if key in next(iter(found.values()))[0]}
    rows = []
    for label, runs in found.items():
        gaps = [run["loss_shuffled"] - run["loss_right"] for run in runs]
        values = [spread([run[key] for run in runs]) for key in columns.values()]
        rows.append((label, *values, spread(gaps), ", ".join(str(run["seed"]) for run in runs)))
    return markdown((finding, *columns, "gap, nats/token", "seeds"), rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coco", type=Path, required=True, help="folder of photos with captions of both kinds")
    parser.add_argument("--flickr8k", type=Path, nargs=2, required=True, help="folder of photos, captions with splits")
    parser.add_argument("--vqa-rad", type=Path, required=True, help="folder of VQA-RAD")
    parser.add_argument("--start", type=Path, help="the third stage's checkpoint; left out: only from nothing")
    parser.add_argument("--only", nargs="+", choices=FINDINGS, default=list(FINDINGS), help="default: all")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of a run (200)")
    parser.add_argument("--scored", type=int, default=SCORED, help="photos that `ai` scores (200)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs beside each other on a CPU (2); 1 on a GPU")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further options for every run")
    parser.add_argument("--folder", type=Path, default=Path("output/stage_findings"), help="where the runs go")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", help="where the JSON goes")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page whose tables are written")
    args = parser.parse_args()
    for name in ("coco", "vqa_rad", "folder"):
        setattr(args, name, getattr(args, name).absolute())
    args.flickr8k = [path.absolute() for path in args.flickr8k]
    args.start = args.start and args.start.absolute()
    args.folder.mkdir(parents=True, exist_ok=True)
    for finding in args.only:
        arms = FINDINGS[finding](args)
        names = {(label, seed): f"{finding}{n}_steps{args.steps}_seed{seed}"
                 for seed in args.seeds for n, label in enumerate(arms)}  # fmt: skip
        train(
            [Run(arms[label][0], name, [*arms[label][1], f"run.seed={seed}", *args.set])
             for (label, seed), name in names.items()],
            args.folder, args.jobs,
        )  # fmt: skip
        found = {
            label: [measured(args.folder, names[label, seed], seed, finding) for seed in args.seeds] for label in arms
        }
        path, setting = args.results / f"stage_findings-{finding}.json", {"steps": args.steps, "set": args.set}
        found = with_other_seeds(found, path, setting)
        write_run_card(path, {**setting, "results": found, **provenance()})
    made = {name: args.results / f"stage_findings-{name}.json" for name in FINDINGS}
    put_between(args.page, [table(name, json.loads(path.read_text())["results"])
                            for name, path in made.items() if path.exists()])  # fmt: skip


if __name__ == "__main__":
    main()
