"""Timing that a comparison can stand on: what is compared runs in turn in one process; medians and quartiles.

Other work on the machine then slows both sides alike, so that ratios are fairer than seconds. On a GPU the clock is
CUDA's events, read after the device has finished; on one CPU thread it is the processor time of this process, which
does not run while others have the core; on several threads, the wall clock.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from lavis_evlgen.reporting.provenance import provenance
from lavis_evlgen.reporting.run_card import write_run_card

RESULTS = Path(__file__).resolve().parents[1] / "results"
LEAST = 0.01  # seconds that one measurement lasts; what is shorter is repeated within it
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def seconds_of(call: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Seconds of one `call()`, the mean over `times` in a row."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / times
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    for _ in range(times):
        call()
    return (clock() - started) / times


def alternate(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    repetitions: int,
    seconds: float = float("inf"),
    least: float = LEAST,
) -> dict[str, dict]:
    """{name: {"median", "low", "high" (quartiles), all in seconds, "repetitions"}} of each of `calls`.

    Every repetition runs all of them, beginning one further on each time. Two passes go before, for caches, kernels
    and compilation. After `seconds` no further repetition is begun, but three are always made.
    """
    names = list(calls)
    for name in names:
        seconds_of(calls[name], device)
    times = {name: max(1, round(least / max(seconds_of(calls[name], device), 1e-9))) for name in names}
    found: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    for n in range(repetitions):
        if n >= 3 and time.perf_counter() - started > seconds:
            break
        for name in names[n % len(names) :] + names[: n % len(names)]:
            found[name].append(seconds_of(calls[name], device, times[name]))
    return {name: spread(values) for name, values in found.items()}


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles; of fewer than two values all three are the same."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "low": low, "high": high, "repetitions": len(values)}


def backward_of(output) -> None:
    """A backward pass from a tensor, or a sequence of them, of any size: the mean square of each."""
    outputs = [output] if isinstance(output, torch.Tensor) else output
    sum(out.float().square().mean() for out in outputs).backward()


def held_gb(call: Callable, there: Iterable[torch.Tensor]) -> float:
    """GB that one call holds at most beside `there`, what was in memory before: storages counted while they live."""
    from lavis_evlgen.tools.cost.step_memory import Alive  # which imports LAVIS

    with Alive() as alive:
        for tensor in there:
            alive.add(tensor)
        before = alive.now
        call()
    return (alive.most - before) / 1e9


def hardware_name(device: torch.device) -> str:
    """nvidia-h200, cpu: what a results file is named after."""
    return gpu_slug(torch.cuda.get_device_name(device)) if device.type == "cuda" else "cpu"


def gpu_slug(name: str) -> str:
    """A GPU's name as it stands in the name of a results file."""
    return "-".join(name.lower().split())


def parser(doc: str, repetitions: int, seconds: float) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    made.add_argument("--repetitions", type=int, default=repetitions, help=f"of each measurement ({repetitions})")
    made.add_argument("--seconds", type=float, default=seconds, help=f"begin none after that many ({seconds:g})")
    made.add_argument("--out", type=Path, help="results file (benchmarks/results/NAME-HARDWARE.json)")
    return made


def write(name: str, args: argparse.Namespace, rows: list[dict], **more) -> Path:
    """Write `rows` of benchmark `name`, with settings, hardware, versions, commit and date; returns the file."""
    device = torch.device(args.device)
    path = args.out or RESULTS / f"{name}-{hardware_name(device)}.json"
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    settings.pop("out")
    machine = {"threads": torch.get_num_threads(), "load_average": os.getloadavg()[0], "device": device.type}
    card = {"benchmark": name, "settings": settings, "machine": machine, "rows": rows, **more, **provenance()}
    print(f"-> {write_run_card(path, card)}")
    return path
