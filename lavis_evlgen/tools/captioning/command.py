"""`evlgen caption --out`: many pictures, on one process or on several that torch.distributed.run starts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tqdm import tqdm

from lavis_evlgen import distributed
from lavis_evlgen.config import ConfigError
from lavis_evlgen.datasets.shards.captioned import write_captioned
from lavis_evlgen.media.video import takes_clips
from lavis_evlgen.models.facts import facts_of
from lavis_evlgen.reporting.run_card import plain, run_card
from lavis_evlgen.runners.checkpointing.evaluation_resume import PartialRows, settings_digest, weights_digest
from lavis_evlgen.runners.checkpointing.stopping import signals
from lavis_evlgen.tools.captioning.batches import BATCH_SIZE, WORKERS, caption_images
from lavis_evlgen.tools.captioning.inputs import SHARDS, Files, Inputs, Shard, read_inputs
from lavis_evlgen.tools.captioning.output import FORMATS, MOST, Output
from lavis_evlgen.tools.load_trained import load
from lavis_evlgen.weights.frozen_identity import frozen_identity
from lavis_evlgen.weights.trainable import trainable_state

CAPTION_KEY = "generated_caption"
_SHOWN = 20  # unreadable pictures that a process names on the terminal; all of them are in the output


def caption_many(args) -> int:
    """Exit code 1 when a picture could not be read or a row named none; every process calls it."""
    try:
        distributed.start(args.device)
        return _caption_many(args)
    except distributed.FailedOnMain:  # which says why
        return 2
    finally:
        distributed.stop()


def _caption_many(args) -> int:
    inputs, output = distributed.on_main(lambda: _checked(args))
    model, vis, decoding, _, _ = load(args)
    decoding |= {"num_beams": args.num_beams} if args.num_beams else {}
    inputs = distributed.on_main(lambda: inputs.of(takes_clips(vis)))
    saying = {"prompt": args.prompt, "decoding": decoding, "batch_size": args.batch_size or BATCH_SIZE,
              "workers": WORKERS if args.workers is None else args.workers}  # fmt: skip
    with signals.handled(at_end=output.lock.release):
        try:
            identity, size, done = distributed.on_main(lambda: _begun(args, output, inputs, model, vis, saying))
            pieces = inputs.parts(size)
            if done is None:
                distributed.on_all(lambda: _own_pieces(output, inputs, identity, size, model, vis, saying))
                done = distributed.on_main(lambda: output.finish(pieces, inputs.problems))
        finally:
            output.lock.release()
    if distributed.is_main():
        _say(output, inputs, done)
    return int(done["unreadable"] + done["rows_left_out"] > 0)


def _checked(args) -> tuple[Inputs, Output]:
    """What is asked for, before any weights are read. Raises ConfigError, DataError."""
    shards = None if args.out_shards is None else Path(args.out_shards)
    file = shards / "captions.jsonl" if shards is not None else Path(args.out)
    if shards is None and args.caption_key is not None:
        raise ConfigError("--caption-key is for new shards: give --out-shards DIR in place of --out")
    if shards is None and (file.suffix not in FORMATS or file.is_dir()):
        raise ConfigError(f"--out {file}: give a file that ends with {' or '.join(FORMATS)}")
    caption_key = None if shards is None else args.caption_key or CAPTION_KEY
    inputs = read_inputs(args.images, args.column, args.folder, caption_key)
    if shards is not None:
        _check_targets(inputs.names, shards)
    return inputs, Output(file, shards)


def _check_targets(names: list[str], folder: Path):
    """New shards have the names of the old ones: these must differ, and lie elsewhere."""
    sources: dict[str, str] = {}
    for name in names:
        other = sources.setdefault(os.path.basename(name), name)
        if other != name:
            raise ConfigError(f"--out-shards {folder}: {other} and {name} would be written to one file; give their "
                              "folders one after another, each with an --out-shards of its own")  # fmt: skip
        if os.path.realpath(os.path.dirname(name)) == os.path.realpath(folder):
            raise ConfigError(f"--out-shards {folder} is the folder of {name}, which would be replaced: give another")


def _begun(args, output: Output, inputs: Inputs, model, vis, saying: dict) -> tuple[dict, int, dict | None]:
    """(identity, size of a piece, counts where all is done already) of the output."""
    prompt = facts_of(model).prompt if args.prompt is None else args.prompt
    config = getattr(model, "config", None)  # of a model that was put together by hand, None
    identity = {
        "model (trained weights)": weights_digest(trainable_state(model)),
        "model (frozen weights)": settings_digest(frozen_identity(model)),
        "model config": settings_digest(plain(config)),
        "image processing": {"name": type(vis).__name__, **plain(getattr(vis, "settings", {}))},
        "prompt": prompt,
        **{f"decoding, {key}": value for key, value in saying["decoding"].items()},
        "list of pictures": inputs.fingerprint(),
        "folder of pictures": inputs.folder,
        "--caption-key": inputs.caption_key,
    }
    data = {"name": inputs.told, "split": None, "fingerprint": inputs.fingerprint(),
            "size": None if inputs.kind == SHARDS else len(inputs.names)}  # fmt: skip
    used = {"run": args.run, "checkpoint": args.checkpoint, "class": type(model).__name__,
            "weights": identity["model (trained weights)"]}  # fmt: skip
    processes = distributed.world_size()
    card = run_card(
        config, prompt, saying["decoding"], data, None, {}, used, batch_size=saying["batch_size"],
        workers=saying["workers"], processes=processes,
    )  # fmt: skip
    rounds = -(-len(inputs.names) // (MOST * processes))  # as many pieces for every process
    size, done = output.begin(card, identity, max(1, -(-len(inputs.names) // (rounds * processes))))
    return identity, size, done


def _own_pieces(output: Output, inputs: Inputs, identity: dict, size: int, model, vis, saying: dict):
    """Caption this process's share: every so many pieces, those that are not done."""
    own = range(distributed.rank(), inputs.parts(size), distributed.world_size())
    with _Progress(inputs, own, size) as progress:
        for number in own:
            if output.is_done(number):
                progress.skip(sum(1 for _ in output.records(number)))
                continue
            part, kept = inputs.part(number, size), output.kept(number, identity)
            progress.skip(len(kept.rows), len(part))
            _caption_piece(part, kept, progress, model, vis, saying)
            captions = {n: row["caption"] for n, row in enumerate(kept.rows) if "caption" in row}
            if output.shards is not None and captions:
                target = output.shards / os.path.basename(part.index.path)
                write_captioned(part.index, target, captions, inputs.caption_key)
            output.finish_piece(number, kept)


def _caption_piece(part: Files | Shard, kept: PartialRows, progress: _Progress, model, vis, saying: dict):
    """Add to `kept` the rows that it lacks, a batch at a time."""
    rows = []
    for n, caption, error in caption_images(model, vis, part, start=len(kept.rows), **saying):
        rows.append(part.named(n) | ({"error": error} if caption is None else {"caption": caption}))
        progress.add(rows[-1])
        if len(rows) == saying["batch_size"]:
            kept.add(rows)
            rows = []
    if rows:
        kept.add(rows)


class _Progress:
    """A bar of the main process's share with rate and time left; of shards, as long as those seen so far make it."""

    def __init__(self, inputs: Inputs, own: range, size: int):
        self.shards, self.pieces, self.seen, self.length, self.named = inputs.kind == SHARDS, len(own), 0, 0, 0
        of = f" (1 of {distributed.world_size()} processes)" if distributed.initialized() else ""
        total = None if self.shards else sum(min(size, len(inputs.names) - n * size) for n in own)
        self.bar = tqdm(total=total, desc=f"captions{of}", unit="picture", disable=not distributed.is_main(),
                        mininterval=1.0 if sys.stderr.isatty() else 30.0, smoothing=0.02)  # fmt: skip

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error):
        self.bar.close()

    def skip(self, done: int, length: int | None = None):
        """The next piece, of which so many were done before; length: of all of it, where that is more."""
        self.seen, self.length = self.seen + 1, self.length + (done if length is None else length)
        if self.bar.disable:
            return
        self.bar.initial += done  # what was done before does not count in the rate
        self.bar.n += done
        if self.shards:
            self.bar.total = round(self.length / self.seen * self.pieces)
        self.bar.refresh()

    def add(self, row: dict):
        self.bar.update()
        if "error" in row:
            self.named += 1
            where = ":".join(row[key] for key in ("shard", "image") if row.get(key))
            if self.named <= _SHOWN:
                self.bar.write(_printable(f"evlgen caption: cannot read {where}: {row['error']}"), file=sys.stderr)


def _printable(text: str) -> str:
    """With escapes for what a terminal would obey: names in a shard are whoever's who made it."""
    return "".join(mark if mark.isprintable() else repr(mark)[1:-1] for mark in text)


def _say(output: Output, inputs: Inputs, counts: dict):
    for problem in inputs.problems[:_SHOWN]:
        print(f"evlgen caption: left out: {problem}", file=sys.stderr)
    words = [f"{counts['captions']} captions"]
    if counts["unreadable"]:
        words.append(f"{counts['unreadable']} pictures that could not be read, whose `error` says why")
    if counts["rows_left_out"]:
        words.append(f"{counts['rows_left_out']} rows without a picture left out")
    print(f"{output.file}: {', '.join(words)}; settings in {output.card.name}")
    if output.shards is not None:
        print(f"new shards in {output.shards}; in a config: datasets.image_shards.caption_key: {inputs.caption_key}")
