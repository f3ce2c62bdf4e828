"""The `evlgen` command: what LAVIS has no script for."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from lavis_evlgen.demo import command as demo
from lavis_evlgen.launch import build_data, config_errors, explanation, one_line
from lavis_evlgen.tools import keys
from lavis_evlgen.tools.cost import estimate, macs
from lavis_evlgen.tools.load_trained import load, run_config
from lavis_evlgen.tools.sweeps import ablate
from lavis_evlgen.tools.tokens import command

_MODEL_OPTIONS = "keys of the bundle's config, e.g. model.tome_r=16 model.llm_model=facebook/opt-2.7b"


def main(argv=None):
    """Entry of `evlgen`; errors that the user can mend are one line, exit code 2."""
    args = _parser().parse_args(argv)
    try:
        with config_errors():
            code = args.run_command(args)
            sys.stdout.flush()  # here, where a full disk behind it is one line
    except BrokenPipeError:  # `evlgen keys | head`
        _forget_output()
        raise SystemExit(1) from None
    except Exception as error:
        words = explanation(error)
        if words is None:
            raise
        _forget_output()
        print(f"evlgen {args.command}: {words}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(code)


def _forget_output():
    """What is still to be written to a full disk or closed pipe would end the process in another error."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


EPILOG = """a first hour:
  evlgen doctor projects/evlgen/quickstart.yaml               is all there that training needs?
  evlgen macs projects/evlgen/quickstart.yaml                 what will it cost?
  evlgen estimate projects/evlgen/quickstart.yaml --gpu a10   will it fit, and how long will it take?
  python train.py --cfg-path projects/evlgen/quickstart.yaml
  evlgen caption photo.jpg --run output/evlgen/quickstart/…   what does it say?
  evlgen tokens photo.jpg --run output/evlgen/quickstart/…    what does it look at?
  evlgen demo --run output/evlgen/quickstart/…                both, in the browser, with questions
  evlgen ablate projects/evlgen/quickstart.yaml --sweep run.init_lr=1e-3,2e-3 --seeds 3    what would be better?
each command's arguments: evlgen COMMAND --help;  every config key: evlgen keys"""


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="evlgen", description="Tools around EVLGen runs: before training, on trained models, over many runs.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    c = commands.add_parser("caption", help="caption pictures (a video model: clips) with the model of a run folder")
    c.add_argument("images", nargs="+", metavar="IMAGE", help="picture files; clips for a video model")
    c.add_argument("--run", required=True, metavar="DIR", help="run folder (holds a checkpoint), or a bundle's folder")
    c.add_argument("--checkpoint", help="which checkpoint (default: best, else last)")
    c.add_argument("--prompt", help="text that captions begin with (default: the run's)")
    c.add_argument("--num-beams", type=_positive, help="beams (default: the run's)")
    c.add_argument("--device", default="cpu", choices=("cpu", "cuda", "auto"), help="default: cpu")
    c.set_defaults(run_command=caption)

    d = commands.add_parser("doctor", help="check data, weights and memory of a run config before training")
    d.add_argument("cfg_path", metavar="CFG", help="run config, e.g. projects/evlgen/opt.yaml")
    d.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="as for train.py")
    d.add_argument("--limit", type=int, help="look at this many pictures of each split (default: all)")
    d.set_defaults(run_command=doctor)

    m = commands.add_parser("compare", help="runs side by side: a table and a picture of loss and CIDEr against cost")
    m.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    m.add_argument("--out", type=Path, default=Path("compare.png"), metavar="PNG", help="the picture (compare.png)")
    m.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    m.set_defaults(run_command=compare)

    ablate.add_command(commands)
    demo.add_command(commands, load)
    estimate.add_command(commands)
    macs.add_command(commands)
    command.add_command(commands, load)

    e = commands.add_parser("export", help="make a bundle (weights, config, model card) of a run folder")
    e.add_argument("run", metavar="RUN", help="run folder (holds a checkpoint)")
    e.add_argument("out", metavar="OUT", help="folder to write")
    e.add_argument("--checkpoint", help="which checkpoint (default: best, else last)")
    e.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help=_MODEL_OPTIONS)
    e.set_defaults(run_command=export)

    v = commands.add_parser("convert", help="released checkpoint -> bundle, or back")
    v.add_argument("source", metavar="SOURCE", help="released .pth; with --to released, a bundle's folder")
    v.add_argument("out", metavar="OUT", help="folder to write; with --to released, a .pth file")
    v.add_argument("--to", default="bundle", choices=("bundle", "released"), help="default: bundle")
    v.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help=_MODEL_OPTIONS)
    v.add_argument("--allow-unknown", action="store_true", help="keep unknown tensors aside instead of refusing")
    v.set_defaults(run_command=convert)

    s = commands.add_parser("shards", help="write tar shards from a folder of pictures and a captions file")
    s.add_argument("out", metavar="OUT", help="folder to be made")
    s.add_argument("--images", required=True, metavar="DIR", help="folder that the file's image names start from")
    s.add_argument("--captions", required=True, metavar="FILE", help="COCO, Karpathy or LAVIS JSON, JSONL, CSV, TSV")
    s.add_argument("--columns", nargs="+", default=[], metavar="COLUMN=NAME", help="the file's names: image=file ...")
    s.add_argument("--split", help="only images of this split, of a file that names splits, e.g. train")
    s.add_argument("--per-shard", type=_positive, default=1000, help="samples in a shard (default: 1000)")
    s.add_argument("--seed", type=int, default=0, help="of the order in which images are written (default: 0)")
    s.add_argument("--max-bad-fraction", type=float, default=0.01, help="of images and rows (default: 0.01)")
    s.set_defaults(run_command=shards)

    keys.add_command(commands)
    return p


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def caption(args) -> int:
    """Print `path<TAB>caption` for each picture; exit code 1 when one could not be read."""
    import torch

    from lavis_evlgen.datasets import UnreadableImage

    model, vis, decoding, device, _ = load(args)
    decoding |= {"num_beams": args.num_beams} if args.num_beams else {}
    failed = 0
    for path in args.images:
        try:
            image = _pixels(vis, path)[None].to(device)
        except UnreadableImage as error:
            print(f"evlgen caption: {error}", file=sys.stderr)
            failed += 1
            continue
        samples = {"image": image} | ({} if args.prompt is None else {"prompt": args.prompt})
        with torch.inference_mode():
            text = model.generate(samples, **decoding)[0]
        print(f"{path}\t{' '.join(text.split())}")  # a line a picture, whatever an untrained model says
    return int(failed > 0)


def _pixels(vis, path: str):
    """(3, H, W) of a picture or, by a video processor, (3, T, H, W) of a clip; raises UnreadableImage."""
    from lavis_evlgen.datasets import UnreadableImage
    from lavis_evlgen.media.images import open_image
    from lavis_evlgen.media.video import takes_clips

    if not takes_clips(vis):
        return vis(open_image(path, vis))
    if not Path(path).is_file():
        raise UnreadableImage(path, "no such file")
    try:
        return vis(path)
    except (RuntimeError, OSError, ValueError) as error:
        raise UnreadableImage(path, f"the model captions clips, and as a clip: {one_line(error)}") from error


def export(args) -> int:
    """Write a bundle of a run's checkpoint."""
    from lavis_evlgen.tools.export import export_run

    cfg, checkpoint = run_config(Path(args.run), args.checkpoint)
    print(export_run(cfg, checkpoint, args.out, _model_options(args.options)))
    return 0


def convert(args) -> int:
    """Released checkpoint -> bundle, or back; every key is reported."""
    from lavis.common.registry import registry

    from lavis_evlgen.tools.convert import from_released, to_released
    from lavis_evlgen.weights import bundle

    cls = registry.get_model_class("evlgen")
    if args.to == "released":
        lines = to_released.write_released(args.source, args.out, cls)
    else:
        options = _model_options(args.options)
        weights, config, extra, report = from_released.from_released(args.source, cls, options, args.allow_unknown)
        bundle.write_bundle(args.out, weights, config, extra=extra)
        lines = report.lines()
    print("\n".join([*lines, f"written: {args.out}"]))
    return 0


def _model_options(options: list[str]) -> dict:
    """`model.KEY=VALUE` options as a dict of the model section."""
    from omegaconf import OmegaConf

    from lavis_evlgen.config import ConfigError

    wrong = next((option for option in options if not option.startswith("model.") or "=" not in option), None)
    if wrong is not None:
        raise ConfigError(f"--options {wrong}: give model.KEY=VALUE")
    # resolved here: a bundle holds plain values
    return OmegaConf.to_container(OmegaConf.from_dotlist(options), resolve=True).get("model", {})


def doctor(args) -> int:
    """Print a line for each check; exit code 1 when one failed."""
    from lavis_evlgen.config import EvlgenConfig
    from lavis_evlgen.datasets import ImageShards
    from lavis_evlgen.tools.doctor import check_images, check_memory, check_weights
    from lavis_evlgen.tools.doctor_shards import check_shards
    from lavis_evlgen.weights.bundle import trained_section

    cfg = EvlgenConfig(args, trained_section=trained_section)
    print(f"ok    config {args.cfg_path}: every key is known")
    findings = [*check_weights(cfg.model_cfg), check_memory(cfg.model_cfg)]
    for finding in findings:
        _show(finding)
    task, datasets = build_data(cfg)
    findings.append(_check_splits(cfg.run_cfg, datasets, task))
    _show(findings[-1])
    for name, splits in datasets.items():
        for split, dataset in splits.items():
            if isinstance(dataset, ImageShards):
                findings.append(check_shards(name, dataset, args.limit, print))
            else:
                findings.append(check_images(name, split, dataset, args.limit, print))
            _show(findings[-1])
    failed = sum(not finding.ok for finding in findings)
    print(f"{failed} of {len(findings)} checks failed" if failed else f"all {len(findings)} checks passed")
    return int(failed > 0)


def _check_splits(run, datasets: dict, task):
    """What train.py refuses before its first step."""
    from lavis_evlgen.config import ConfigError
    from lavis_evlgen.runners.preflight import check_splits
    from lavis_evlgen.tools.doctor import Finding

    try:
        check_splits(run, datasets, task)
    except ConfigError as error:
        return Finding(False, "splits", str(error))
    splits = [str(split) for key in ("train_splits", "valid_splits", "test_splits") for split in run.get(key) or []]
    return Finding(True, "splits", f"{', '.join(splits)} are there and large enough")


def shards(args) -> int:
    """Write shards; says what to put into a config, and what was left out."""
    from lavis_evlgen.config import ConfigError
    from lavis_evlgen.datasets.shards.writer import write_shards

    if wrong := [text for text in args.columns if "=" not in text]:
        raise ConfigError(f"--columns {wrong[0]}: write COLUMN=NAME, e.g. image=file")
    found = write_shards(
        args.out, args.images, args.captions, columns=dict(text.split("=", 1) for text in args.columns),
        split=args.split, per_shard=args.per_shard, seed=args.seed, max_bad_fraction=args.max_bad_fraction,
    )  # fmt: skip
    for line in [*map(str, found.unreadable), *found.problems]:
        print(f"left out: {line}", file=sys.stderr)
    left_out = f", {len(found.unreadable)} unreadable images and {len(found.problems)} rows left out"
    print(f"{found.samples} samples{left_out if found.unreadable or found.problems else ''}. In a config:")
    print(f"  datasets.image_shards.shards: {found.shards}")
    return 0


def _show(finding):
    print(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.what}: {finding.seen}")
    for line in finding.details:
        print(f"        {line}")


def compare(args) -> int:
    """Print the table, what makes scores not comparable, and where the picture is."""
    from lavis_evlgen.reporting.plots import comparison_plot
    from lavis_evlgen.tools.compare import markdown, read_runs, show, table_rows, unlike

    runs = read_runs(args.runs)
    rows = table_rows(runs)
    print(markdown(rows) if args.markdown else show(rows))
    for difference in unlike(runs):
        print(f"note: {difference}")
    path = comparison_plot(args.out, {run.name: run.rows for run in runs})
    print(f"picture: {path}")
    return 0
