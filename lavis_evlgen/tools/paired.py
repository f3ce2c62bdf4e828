"""`evlgen compare --paired`: how far losses of runs on the same pictures differ, with an interval.

Scores of two runs vary with pictures that are hard for both. The difference on each picture does not: a bootstrap over
pictures, and over seeds where there are several, says how sure it is (Efron 1979).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lavis_evlgen.config import ConfigError
from lavis_evlgen.reporting import tables
from lavis_evlgen.runners.checkpointing.resume import MAY_CHANGE, flat
from lavis_evlgen.tools.compare import RunRecord, read_runs, unlike

RESAMPLES = 10_000
COLUMNS = ("runs", "seeds", "pictures", "nats/token", "less the first's", "95 % interval")
_OF_ONE_RUN = MAY_CHANGE | {"run.seed", "run.run_name", "run.cache_features"}


@dataclass
class Arm:
    """Runs that differ in their seeds alone: the loss (S, P) in nats of each of P pictures by each of S runs, and the
    tokens (P,) of its texts."""

    name: str
    seeds: list
    losses: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class Difference:
    """Nats a token of one arm less those of another: of all pictures, and the interval (least, most)."""

    mean: float
    least: float
    most: float


def difference(first: Arm, other: Arm, resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """`other` less `first`, with the 95 % interval of a bootstrap over pictures and seeds.

    Each resample draws P pictures and, of either arm, as many of its runs as it has; arms with the same seeds draw the
    same ones, since their runs saw the data in the same order.
    """
    draw = np.random.default_rng(seed)
    pictures = len(first.tokens)
    found = []
    for _ in range(resamples):
        weights = np.bincount(draw.integers(pictures, size=pictures), minlength=pictures)  # (P,)
        runs = draw.integers(len(first.losses), size=len(first.losses))
        same = first.seeds == other.seeds
        others = runs if same else draw.integers(len(other.losses), size=len(other.losses))
        gaps = other.losses[others].mean(0) - first.losses[runs].mean(0)  # (P,)
        found.append(weights @ gaps / (weights @ first.tokens))
    mean = (other.losses.mean(0) - first.losses.mean(0)).sum() / first.tokens.sum()
    least, most = np.percentile(found, [2.5, 97.5])
    return Difference(float(mean), float(least), float(most))


def arms_of(runs: list[RunRecord], label: Callable[[RunRecord], str] | None = None) -> list[Arm]:
    """The runs by what they were configured to do but for the seed; label: says in its place which run is of which arm.

    Raises ConfigError where they do not compare.
    """
    if notes := unlike(runs):
        raise ConfigError(f"--paired: {notes[0]}")
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault((label or _settings)(run), []).append(run)
    if len(groups) < 2:
        raise ConfigError(f"--paired: {', '.join(run.name for run in runs)} differ in nothing but seeds; give runs of "
                          "another config to compare them with")  # fmt: skip
    measured = {run.name: _by_picture(run) for run in runs}
    pictures = sorted(set.intersection(*(set(of_run) for of_run in measured.values())), key=str)
    if not pictures:
        raise ConfigError("--paired: no picture is in all of these runs; give runs that scored the same split")
    if lost := len(set().union(*measured.values())) - len(pictures):
        print(f"note: {lost} pictures are not in all runs and left out")
    arms = [_arm(group, [measured[run.name] for run in group], pictures) for group in groups.values()]
    for arm in arms:
        if not np.array_equal(arm.tokens, arms[0].tokens):
            raise ConfigError(f"--paired: {arm.name} counts other tokens than {arms[0].name}: their tokenizers differ, "
                              "and so do nats a token")  # fmt: skip
    return arms


def _settings(run: RunRecord) -> str:
    settings = {key: value for key, value in flat(run.card["config"]).items() if key not in _OF_ONE_RUN}
    start, folder = settings.get("model.pretrained"), run.card["config"].get("run", {}).get("output_dir")
    if start and folder and start.startswith(f"{folder}/"):  # of the stage before, in the run's own folder
        settings["model.pretrained"] = start.removeprefix(folder)
    return json.dumps(settings, sort_keys=True, default=str)


def _seed(run: RunRecord):
    return run.card["config"].get("run", {}).get("seed")


def _arm(runs: list[RunRecord], measured: list[dict], pictures: list) -> Arm:
    order = sorted(range(len(runs)), key=lambda n: str(_seed(runs[n])))
    losses = np.array([[measured[n][picture][0] for picture in pictures] for n in order])
    tokens = np.array([measured[0][picture][1] for picture in pictures])
    return Arm(runs[0].name, [_seed(runs[n]) for n in order], losses, tokens)


def _by_picture(run: RunRecord) -> dict:
    """{picture: (nats, tokens) of its texts}. Raises ConfigError for a run without them."""
    split, step = run.card["data"]["split"], run.card.get("step")
    path = run.folder / "result" / f"{split}_{step}.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        found: dict = {}
        for row in rows:
            if row.get("loss") is not None:
                nats, tokens = found.get(row["image_id"], (0.0, 0.0))
                found[row["image_id"]] = (nats + row["loss"], tokens + row["tokens"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"--paired: {path} has no losses of pictures ({type(error).__name__}: {error})") from error
    if not found:
        raise ConfigError(f"--paired: no row of {path} has a loss; give runs of a task that measures it")
    return found


def rows_of(arms: list[Arm]) -> list[tuple[str, ...]]:
    """Cells under COLUMNS; every arm is compared with the first."""
    rows = []
    for arm in arms:
        loss = arm.losses.mean(0).sum() / arm.tokens.sum()
        seeds = ", ".join(map(str, arm.seeds))
        cells = (arm.name, seeds, f"{len(arm.tokens):,}", f"{loss:.3f}")
        if arm is arms[0]:
            rows.append((*cells, "", ""))
        else:
            gap = difference(arms[0], arm)
            rows.append((*cells, f"{gap.mean:+.3f}", f"{gap.least:+.3f} to {gap.most:+.3f}"))
    return rows


def main(args) -> int:
    """Print the table, and what the interval is over."""
    arms = arms_of(read_runs(args.runs))
    rows = rows_of(arms)
    left = ("runs", "seeds")
    print(tables.markdown(COLUMNS, rows) if args.markdown else tables.show(COLUMNS, rows, left=left))
    several = max(len(arm.seeds) for arm in arms) > 1
    print(f"interval: bootstrap over pictures{' and seeds' if several else ', of one seed each'}; "
          "clear of zero: the difference is not of these pictures' chance alone")  # fmt: skip
    return 0
