"""What the three calls of benchmarks/gpu.sh measure, the most valuable first. Standard library only."""

from __future__ import annotations

from typing import NamedTuple


class Measurement(NamedTuple):
    """One process: `python -m MODULE OPTIONS --device DEVICE --out NAME-HARDWARE.json`, stopped after `limit` seconds.

    gpus: how many it needs; a rehearsal on a CPU needs none.
    """

    name: str
    module: str
    options: tuple[str, ...]
    limit: int = 120
    gpus: int = 1


def _measure(name: str, module: str, options: str = "", limit: int = 120, gpus: int = 1) -> Measurement:
    return Measurement(name, f"benchmarks.{module}", tuple(options.split()), limit, gpus)


def _of_scale(scale: str, name: str, module: str, options: str, limit: int, gpus: int = 1) -> Measurement:
    return _measure(f"{name.format(scale)}", module, f"--scale {scale} {options}", limit, gpus)


_STEP = "--batch 64 --dtype bf16"
_OPT, _VICUNA = "opt-2.7b", "vicuna-7b"

CALLS: dict[int, list[Measurement]] = {
    1: [
        _of_scale(_OPT, "step-{}-compiled", "speed.step", f"{_STEP} --compile vision connector --seconds 20", 200),
        _of_scale(_VICUNA, "step-{}-compiled", "speed.step", f"{_STEP} --compile vision connector --seconds 20", 200),
        _of_scale(_OPT, "step-{}", "speed.step", f"{_STEP} --seconds 30", 150),
        _of_scale(_VICUNA, "step-{}", "speed.step", f"{_STEP} --only-whole --seconds 15", 120),
        _measure("vision", "speed.vision", "--batch 32 --seconds 5", 90),
        _measure("merge", "speed.merge", "--batch 64 --seconds 1", 60),
        _measure("connector", "speed.connector", "--seconds 5", 90),
    ],
    2: [
        _of_scale(_OPT, "blip2-{}", "speed.blip2_step", f"{_STEP} --seconds 20", 120),
        _of_scale(_OPT, "numerics-{}", "speed.numerics", "--batch 16", 90),
        _of_scale(_OPT, "packing-{}", "speed.packing", f"{_STEP} --texts 1 5 --seconds 20", 150),
        _of_scale(_OPT, "generate-{}", "speed.generate", "--seconds 8", 120),
        _of_scale(_OPT, "ranks-{}", "speed.ranks", f"{_STEP} --seconds 15", 120, gpus=2),
        _of_scale(_VICUNA, "blip2-{}", "speed.blip2_step", f"{_STEP} --seconds 20", 120),
        _of_scale(_VICUNA, "generate-{}", "speed.generate", "--seconds 8", 120),
        _of_scale(_OPT, "lengths-{}", "speed.lengths", f"{_STEP} --seconds 20", 150),
        _of_scale(_OPT, "scaling-{}", "speed.scaling", "--seconds 10", 150),
    ],
    3: [_measure("miniature", "gpu.miniature", "--batch 64 --jobs 3", 570)],
}

# what a rehearsal appends: of an option given twice, scripts take the last
_TINY_SHARED = {"--scale": "tiny", "--batch": "2", "--seconds": "1"}
_TINY_MORE = {
    "speed.step": "--repetitions 1", "speed.merge": "--tokens 17 --width 8 --repetitions 1",
    "speed.vision": "--blocks 1 --repetitions 1", "speed.connector": "--batch 2 --hidden 64 --repetitions 1",
    "speed.generate": "--tokens 4 --repetitions 1", "speed.lengths": "--tokens 4 5 --repetitions 1",
    "speed.scaling": "--axes batch --batch 1 --repetitions 1", "speed.packing": "--tokens 4 --repetitions 1",
    "gpu.miniature": "--tiny",
}  # fmt: skip


def calls(number: int, tiny: bool = False) -> list[Measurement]:
    """The measurements of call `number`; tiny: the same ones at sizes for a rehearsal on any machine."""
    return [_tiny(one) for one in CALLS[number]] if tiny else CALLS[number]


def _tiny(one: Measurement) -> Measurement:
    shared = [word for key, value in _TINY_SHARED.items() if key in one.options for word in (key, value)]
    more = _TINY_MORE.get(one.module.removeprefix("benchmarks."), "--repetitions 1").split()
    return one._replace(options=(*one.options, *shared, *more), limit=1800)  # any machine may be busy
