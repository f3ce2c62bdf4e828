"""`evlgen ablate`: train a grid of config values and seeds, and show score and training time against what was swept."""

from __future__ import annotations

import signal
import sys
from itertools import groupby
from statistics import mean, stdev

from lavis_evlgen.config import ConfigError, EvlgenConfig
from lavis_evlgen.config.recipes import config_path
from lavis_evlgen.reporting import tables
from lavis_evlgen.reporting.provenance import provenance
from lavis_evlgen.reporting.run_card import write_run_card
from lavis_evlgen.reporting.sweep_plot import sweep_plot
from lavis_evlgen.tasks.settings import SharedRunSettings
from lavis_evlgen.tools.sweeps import runs as sweep_runs
from lavis_evlgen.tools.sweeps import sweep
from lavis_evlgen.tools.sweeps.sweep import Row, Trial

_PLOTTED = ("CIDEr", "accuracy", "loss, right")  # the first that there is


def main(args) -> int:
    """Run what has not been run, then show and write the results; exit code 1 when a run failed."""
    args.options, args.cfg_path = list(args.options), str(config_path(args.cfg_path))
    pairs = [sweep.parse_sweep(text) for text in args.sweeps]
    if len(dict(pairs)) < len(pairs):
        raise ConfigError("--sweep: a key is given twice; write all of its values in one")
    if args.jobs < 1:
        raise ConfigError(f"--jobs {args.jobs}: give 1 or more")
    places = sweep_runs.places_on(None if args.gpus is None else _gpus(args.gpus), args.jobs)
    seed = SharedRunSettings.read(EvlgenConfig(args).run_cfg).seed
    trials = sweep.grid(dict(pairs), sweep.parse_seeds(args.seeds, seed), args.options)
    sweep.check(args.cfg_path, trials, args.options)
    # a job queue's end is a Ctrl-C: runs save a checkpoint and this command can be given again
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        failed = sweep_runs.run_all(trials, args.cfg_path, args.out, places, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print("evlgen ablate: stopped; the same command goes on", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    found = {trial.name: sweep.finished(args.out, args.cfg_path, trial) for trial in trials}
    records = {name: content for name, content in found.items() if content is not None}
    report(args, trials, records, failed)
    return int(bool(failed))


def report(args, trials: list[Trial], records: dict[str, dict], failed: dict[str, str]):
    """Print the table; write ablation.md, ablation.json and, where there is something to draw, ablation.png."""
    rows = sweep.rows_of(trials, records)
    columns, cells = sweep.columns_of(rows), sweep.cells_of(rows)
    print(tables.show(columns, cells, left=()))
    for difference in unlike(list(records.values())):
        print(f"note: {difference}")
    for name in failed:
        print(f"failed: {name} ({args.out / 'logs' / name}.log)")
    (args.out / "ablation.md").write_text(tables.markdown(columns, cells) + "\n")
    runs = {"runs": [records[trial.name] for trial in trials if trial.name in records], "failed": failed}
    table = [{"values": row.values, "seeds": row.seeds, **_numbers(row)} for row in rows]
    about = {"config": args.cfg_path, "options": args.options, **provenance()}
    write_run_card(args.out / "ablation.json", {**about, "table": table, **runs})
    written = ["ablation.md", "ablation.json"]
    score = next((name for name in _PLOTTED if any(name in row.scores for row in rows)), None)
    if score is not None:
        sweep_plot(args.out / "ablation.png", *_curves(rows, score), score)
        written.append("ablation.png")
    print(f"results: {args.out}: {', '.join(written)}")


def unlike(records: list[dict]) -> list[str]:
    """What makes scores of these runs not comparable."""
    notes = []
    for fact in ("data", "scoring_tokenizer", "decoding", "prompt", "versions", "hardware"):
        if len({str(content["card"].get(fact)) for content in records}) > 1:
            notes.append(f"{fact.replace('_', ' ')} is not the same in all runs: compare with care")
    return notes


def _numbers(row: Row) -> dict:
    """Mean and spread (sample standard deviation; None of one) of each score and of the training seconds."""
    named = {**row.scores, "training seconds": row.seconds}
    return {
        name: {"mean": mean(values), "spread": stdev(values) if len(values) > 1 else None}
        for name, values in named.items()
        if values
    }


def _curves(rows: list[Row], score: str) -> tuple[str, dict]:
    """(first swept key, one curve for each combination of the others: name -> [(value, scores, seconds)])."""
    first = next(iter(rows[0].values))

    def others(row: Row) -> str:
        return ", ".join(f"{key}={value}" for key, value in row.values.items() if key != first)

    grouped = groupby(sorted(rows, key=others), key=others)
    return first, {
        name: [(row.values[first], row.scores.get(score, []), row.seconds) for row in group] for name, group in grouped
    }


def _gpus(text: str) -> list[str]:
    gpus = text.split(",")
    if not all(gpu.strip().isdigit() for gpu in gpus) or len(set(gpus)) < len(gpus):
        raise ConfigError(f"--gpus {text}: give numbers parted by commas, none twice, e.g. 0,1")
    return [gpu.strip() for gpu in gpus]
