"""The `evlgen` command: training, evaluation, and what LAVIS has no script for.

Only the standard library is imported here, so that `evlgen COMMAND --help` answers at once; the module that does a
command's work is imported when the command runs.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import os
import sys
from pathlib import Path
from pkgutil import resolve_name

from lavis_evlgen.config.errors import config_errors
from lavis_evlgen.errors import explanation
from lavis_evlgen.tools.cost.hardware import ASSUMED, CPU, HARDWARE, RESULTS
from lavis_evlgen.tools.tokens import STYLES

EPILOG = """a first hour:
  evlgen recipes                                              which run configs are there?
  evlgen doctor quickstart                                    is all there that training needs?
  evlgen macs quickstart                                      what will it cost?
  evlgen estimate quickstart --gpu a10                        will it fit, and how long will it take?
  evlgen train quickstart                                     the same as train.py --cfg-path
  evlgen caption photo.jpg --run output/evlgen/quickstart/…   what does it say?
  evlgen tokens photo.jpg --run output/evlgen/quickstart/…    what does it look at?
  evlgen demo --run output/evlgen/quickstart/…                both, in the browser, with questions
  evlgen ablate quickstart --sweep run.init_lr=1e-3,2e-3 --seeds 3    what would be better?
each command's arguments: evlgen COMMAND --help;  every config key: evlgen keys"""

RUNS = ("train", "evaluate")


def main(argv=None):
    """Entry of `evlgen`; errors that the user can fix are one line, exit code 2."""
    args = parser().parse_args(argv)
    # before torch and transformers: fork warnings of the fast tokenizers
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        work = _imported(args.run_command)
        if args.command in RUNS:  # whose errors, signals and ranks are lavis_evlgen/launch.py's
            raise SystemExit(work(args))
        with config_errors():
            code = work(args)
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


def _imported(name: str):
    """The function module:function. What is imported for it stays, and is kept from the garbage collector, which would
    go through it again and again: a sixth of the time that `evlgen caption` takes."""
    gc.disable()
    try:
        return resolve_name(name)
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # libraries that count their objects at the end would call them leaked
        gc.enable()


def _forget_output():
    """What is still to be written to a full disk or closed pipe would end the process in another error."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parser() -> argparse.ArgumentParser:
    """Of `evlgen` with all its commands; `run_command` names the function that does the work, as module:function."""
    p = argparse.ArgumentParser(
        prog="evlgen", description="Train EVLGen; tools before training, on trained models, over many runs.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_train, _evaluate, _recipes, _caption, _doctor, _compare, _ablate, _demo, _estimate, _macs, _tokens,
                _export, _convert, _shards, _keys):  # fmt: skip
        add(commands)
    return p


def _train(commands):
    p = _command(commands, "train", "lavis_evlgen.launch:from_command", "train a model as a run config says")
    _config(p)
    _overrides(p)


def _evaluate(commands):
    p = _command(commands, "evaluate", "lavis_evlgen.launch:from_command",
                 "evaluate a model on the test_splits of a run config")  # fmt: skip
    _config(p)
    _overrides(p)
    p.add_argument("--stage", metavar="NAME", help="of a config with stages: the stage whose task and data are used "
                   "(default: the last)")  # fmt: skip


def _recipes(commands):
    p = _command(commands, "recipes", "lavis_evlgen.tools.recipes:main",
                 "the run configs that come with the package, which every command takes by name")  # fmt: skip
    p.add_argument("name", nargs="?", metavar="NAME", help="print this recipe's text, to be saved and changed")


def _caption(commands):
    p = _command(commands, "caption", "lavis_evlgen.tools.caption:main",
                 "caption pictures (a video model: clips) with the model of a run folder")  # fmt: skip
    p.add_argument("images", nargs="+", metavar="INPUT", help="picture files (clips for a video model); with --out "
                   "also one folder, one table (CSV, TSV, JSON lines) or tar shards ('x-{0000..0007}.tar')")
    _trained_model(p)
    _left(p)
    says = p.add_mutually_exclusive_group()
    says.add_argument("--prompt", help="text that captions begin with (default: the run's)")
    says.add_argument("--question", help="answer this in place of a caption, asked as evlgen_vqa asks by default")
    p.add_argument("--num-beams", type=_positive, help="beams (default: the run's)")
    _device(p)
    many = p.add_argument_group("many pictures at once (docs/captioning.md); the same command again continues")
    out = many.add_mutually_exclusive_group()
    out.add_argument("--out", metavar="FILE", help="write captions to this .jsonl or .csv file, in batches")
    out.add_argument("--out-shards", metavar="DIR", help="of tar shards: new shards with the captions in them")
    many.add_argument("--batch-size", type=_positive, metavar="N", help="pictures captioned together (16)")
    many.add_argument("--workers", type=_from_zero, metavar="N", help="processes that read pictures (2)")
    many.add_argument("--column", metavar="NAME", help="the table's column with picture names (image, file, path, ...)")
    many.add_argument("--images", dest="folder", metavar="DIR", help="folder that the table's names start from (the "
                      "table's own)")  # fmt: skip
    many.add_argument("--caption-key", metavar="NAME", help="key of the captions in new shards (generated_caption)")


def _doctor(commands):
    p = _command(commands, "doctor", "lavis_evlgen.tools.doctor.command:main",
                 "check data, weights and memory of a run config before training")  # fmt: skip
    _config(p)
    p.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="as for train.py")
    p.add_argument("--limit", type=int, help="look at this many pictures of each split (default: all)")
    p.add_argument("--parameters", action="store_true", help="print what the model trains by name, for trains of a "
                   "stage, and check nothing")  # fmt: skip


def _compare(commands):
    p = _command(commands, "compare", "lavis_evlgen.tools.compare:main",
                 "runs side by side: a table and a picture of loss and CIDEr against cost")  # fmt: skip
    p.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    p.add_argument("--out", type=Path, default=Path("compare.png"), metavar="PNG", help="the picture (compare.png)")
    p.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    p.add_argument("--paired", action="store_true",
                   help="instead: losses on the same pictures, each config against the first one's, with intervals; "
                        "runs that differ in run.seed alone count as one")  # fmt: skip


def _ablate(commands):
    p = _command(commands, "ablate", "lavis_evlgen.tools.sweeps.ablate:main",
                 "train a grid of config values and seeds; a table and a picture")  # fmt: skip
    _config(p)
    p.add_argument("--sweep", action="append", required=True, metavar="KEY=VALUES", dest="sweeps",
                   help="values of a config key, parted by commas: model.tome_r=10,13,16; several: all combinations")
    p.add_argument("--seeds", default="1", metavar="N|SEEDS",
                   help="how many seeds, from the config's on (3), or which (42,1,2); default: the config's alone")
    p.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="as for train.py, for every run")
    beside = p.add_mutually_exclusive_group()
    beside.add_argument("--gpus", metavar="GPUS", help="run on these at the same time, one run each: 0,1 "
                        "(default: one run after another, on what the config says)")
    beside.add_argument("--jobs", type=int, default=1, metavar="N",
                        help="on a CPU: so many runs beside each other, which share its threads (1)")
    p.add_argument("--out", type=Path, default=Path("output/ablate"), metavar="DIR",
                   help="where runs, logs and results go; the same again continues (output/ablate)")  # fmt: skip


def _demo(commands):
    p = _command(commands, "demo", "lavis_evlgen.demo.command:main",
                 "a page in the browser: caption pictures, ask about them, see their tokens")  # fmt: skip
    _trained_model(p)
    p.add_argument("--pictures", type=Path, metavar="DIR", help="pictures or clips to pick from (default: drawn ones)")
    p.add_argument("--host", default="127.0.0.1", help="address to serve on (127.0.0.1: this machine alone)")
    p.add_argument("--port", type=int, default=7860, help="default: 7860")
    p.add_argument("--max-upload", type=float, default=20.0, metavar="MB", help="largest upload (20)")
    p.add_argument("--max-pixels", type=float, default=40.0, metavar="MILLIONS",
                   help="most pixels of a picture or of one frame, in millions (40)")  # fmt: skip
    _device(p)


def _estimate(commands):
    p = _command(commands, "estimate", "lavis_evlgen.tools.cost.estimate:main",
                 "memory and hours of a run config on a GPU, before there is one")  # fmt: skip
    _config(p)
    p.add_argument("--gpu", required=True, choices=(*HARDWARE, CPU), help="the kind of GPU, or cpu")
    p.add_argument("--gpus", type=int, default=1, metavar="N", help="how many, all nodes counted (1)")
    p.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="as for train.py: model.tome_r=16")
    _text_tokens(p)
    p.add_argument("--mfu", type=float, default=ASSUMED, help="share of the data sheet's peak to assume where no step "
                   f"was measured on this hardware ({ASSUMED})")  # fmt: skip
    p.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="files of benchmarks/speed/step.py "
                   "(the project's benchmarks/results)")  # fmt: skip


def _macs(commands):
    p = _command(commands, "macs", "lavis_evlgen.tools.cost.macs:main",
                 "MACs, parameters and training FLOPs of a config, by part")  # fmt: skip
    _config(p)
    p.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="as for train.py: model.tome_r=16")
    _text_tokens(p)
    p.add_argument("--json", action="store_true", help="print all figures unrounded, as JSON")


def _tokens(commands):
    p = _command(commands, "tokens", "lavis_evlgen.tools.tokens.command:main",
                 "pictures of merged tokens: which patches each token stands for")  # fmt: skip
    p.add_argument("images", nargs="+", metavar="IMAGE", help="picture files")
    _trained_model(p)
    _left(p)
    p.add_argument("--style", default="mean", choices=STYLES,
                   help="mean: patches in the mean colour of their token; outline: regions over the photo")  # fmt: skip
    p.add_argument("--before", action="store_true", help="the connector before training beside the trained one")
    p.add_argument("--layers", action="store_true", help="also every layer: a strip and an animated GIF")
    p.add_argument("--question", action="append", default=[], metavar="WORDS", help="of a run with model.condition="
                   "question, the tokens for this question; several times: side by side")  # fmt: skip
    p.add_argument("--words", action="store_true", help="also which token each word of the caption relies on")
    p.add_argument("--out", type=Path, default=Path("tokens"), metavar="DIR", help="where pictures go (tokens)")
    _device(p)


def _export(commands):
    p = _command(commands, "export", "lavis_evlgen.tools.export:main",
                 "make a bundle (weights, config, model card) of a run folder")  # fmt: skip
    p.add_argument("run", metavar="RUN", help="run folder (holds a checkpoint)")
    p.add_argument("out", metavar="OUT", help="folder to write")
    p.add_argument("--checkpoint", help="which checkpoint (default: best, else last)")
    p.add_argument("--transformers", action="store_true", help="also for plain transformers: its code beside "
                   "the weights, and frozen models that are files of this machine")
    _model_options(p)


def _convert(commands):
    p = _command(commands, "convert", "lavis_evlgen.tools.convert.command:main",
                 "released checkpoint -> bundle, or back")  # fmt: skip
    p.add_argument("source", metavar="SOURCE", help="released .pth; with --to released, a bundle's folder")
    p.add_argument("out", metavar="OUT", help="folder to write; with --to released, a .pth file")
    p.add_argument("--to", default="bundle", choices=("bundle", "released"), help="default: bundle")
    _model_options(p)
    p.add_argument("--allow-unknown", action="store_true", help="keep unknown tensors aside instead of refusing")


def _shards(commands):
    p = _command(commands, "shards", "lavis_evlgen.tools.shards:main",
                 "write tar shards from a folder of pictures and a captions file")  # fmt: skip
    p.add_argument("out", metavar="OUT", help="folder to be made")
    p.add_argument("--images", required=True, metavar="DIR", help="folder that the file's image names start from")
    p.add_argument("--captions", required=True, metavar="FILE", help="COCO, Karpathy or LAVIS JSON, JSONL, CSV, TSV")
    p.add_argument("--columns", nargs="+", default=[], metavar="COLUMN=NAME", help="the file's names: image=file ...")
    p.add_argument("--split", help="only images of this split, of a file that names splits, e.g. train")
    p.add_argument("--per-shard", type=_positive, default=1000, help="samples in a shard (default: 1000)")
    p.add_argument("--seed", type=int, default=0, help="of the order in which images are written (default: 0)")
    p.add_argument("--max-bad-fraction", type=float, default=0.01, help="of images and rows (default: 0.01)")


def _keys(commands):
    p = _command(commands, "keys", "lavis_evlgen.tools.keys:print_keys",
                 "every config key: what it does, takes and defaults to")  # fmt: skip
    p.add_argument("section", nargs="?", choices=("run", "model", "datasets", "stages"), help="only this section")
    p.add_argument("--json-schema", action="store_true", help="print a JSON schema of run configs, for editors")


def _command(commands, name: str, function: str, purpose: str) -> argparse.ArgumentParser:
    p = commands.add_parser(name, help=purpose)
    p.set_defaults(run_command=function)
    return p


def _config(p):
    p.add_argument("cfg_path", metavar="CFG", help="run config: a YAML file, or a recipe's name (evlgen recipes)")


def _overrides(p):
    p.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="override keys of the config")


def _trained_model(p):
    p.add_argument("--run", required=True, metavar="DIR", help="run folder (holds a checkpoint), or a bundle's folder")
    p.add_argument("--checkpoint", help="which checkpoint (default: best, else last)")


def _left(p):
    p.add_argument("--tokens", type=_positive, metavar="N", help="leave so many visual tokens, as model.tokens does "
                   "(default: the run's number)")  # fmt: skip


def _device(p):
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda", "auto"), help="default: cpu")


def _model_options(p):
    words = "keys of the bundle's config, e.g. model.tome_r=16 model.llm_model=facebook/opt-2.7b"
    p.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help=words)


def _text_tokens(p):
    p.add_argument("--text-tokens", type=int, metavar="N", help="tokens of the caption, BOS and end counted "
                   "(default: max_txt_len, the longest)")  # fmt: skip


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _from_zero(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError
    return number


if __name__ == "__main__":  # python -m torch.distributed.run ... -m -- lavis_evlgen.cli
    main()
