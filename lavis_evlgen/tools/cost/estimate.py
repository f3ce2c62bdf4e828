"""`evlgen estimate`: will a run fit on a GPU, and how many hours will it take? docs/estimate.md."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from lavis.common.registry import registry
from omegaconf import OmegaConf

from lavis_evlgen.config import ConfigError, EvlgenConfig
from lavis_evlgen.models.activation_checkpointing import recompute_llm
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.models.precision import auto_precision, autocast_type, check_halves
from lavis_evlgen.models.trains import train_as_in
from lavis_evlgen.reporting import tables
from lavis_evlgen.runners.settings import RunSettings
from lavis_evlgen.tools.cost.hardware import CPU, HARDWARE
from lavis_evlgen.tools.cost.macs import amount, at_average, listed
from lavis_evlgen.tools.cost.step_memory import StepMemory, step_flops, step_memory
from lavis_evlgen.tools.cost.texts import Texts
from lavis_evlgen.weights.bundle import empty_model

CONTEXT, LOST = 1e9, 0.05  # bytes of CUDA's context and libraries; share that the allocator's gaps cost


@dataclass(frozen=True)
class Speed:
    """FLOPs a second in training, and where the figure comes from."""

    rate: float
    source: str
    measured: bool


@dataclass(frozen=True)
class Estimate:
    """Of one run: memory of a GPU, and time. flops: of one picture or clip with its texts, forward and
    backward."""

    memory: StepMemory
    each: float  # bytes that one more picture of a micro-batch takes
    micro_batch: int
    pictures_per_step: int
    steps: int
    gpus: int
    gpu: str
    flops: float
    speed: Speed
    texts: int = 1  # of a picture
    drawn: tuple[tuple[int, ...], ...] = ()  # numbers of visual tokens that training draws from
    mean_flops: float | None = None  # without the padding of pictures that differ in tokens

    @property
    def seconds_per_step(self) -> float:
        return self.pictures_per_step / self.gpus * self.flops / self.speed.rate

    @property
    def hours(self) -> float:
        return self.steps * self.seconds_per_step / 3600

    @property
    def needed(self) -> float:
        """Bytes of memory; on a GPU with what CUDA and the allocator take, on a CPU beside Python and its libraries."""
        return self.memory.whole if self.gpu == CPU else self.memory.whole * (1 + LOST) + CONTEXT

    def largest(self, free: float) -> int:
        """Pictures of the largest micro-batch that fits into `free` bytes; 0: none does."""
        return max(0, math.floor(self.micro_batch + (free - self.needed) / (self.each * (1 + LOST))))


def estimate(cfg: EvlgenConfig, gpu: str, gpus: int, text_tokens: int | None, results: Path, mfu: float) -> Estimate:
    """Of a run config on `gpus` of the kind `gpu` (a key of HARDWARE, or cpu). Raises ConfigError."""
    run, section = RunSettings.read(cfg.run_cfg, "run."), resolved(cfg.model_cfg, gpu)
    cls = registry.get_model_class(section.arch)
    if not (isinstance(cls, type) and issubclass(cls, EVLGen)):
        raise ConfigError(f"model.arch: evlgen estimate knows evlgen and evlgen_video, not {section.arch}")
    settings = cls.Settings.read(section)
    amp = auto_on(gpu) if run.amp == "auto" else run.amp
    dtype = autocast_type(amp)
    check_halves(amp, settings.llm_precision)
    batch, accumulated = run.batch_size_train, run.accum_grad_iters

    def model():
        empty = empty_model(cls, section)
        train_as_in(empty, cfg.stage)
        recompute_llm(empty, run.llm_grad_checkpoint)
        return empty

    made = model()
    length = text_tokens or made.language_model.max_txt_len
    frames = (settings.num_frames,) if section.arch == "evlgen_video" else ()
    image = (3, *frames, settings.image_size, settings.image_size)
    texts = Texts.of(cfg)
    average, mean_flops = at_average(section, made), None
    flops = step_flops(made, (1, *image), length, texts)
    if average is not None:
        unpadded = empty_model(cls, average)
        train_as_in(unpadded, cfg.stage)
        mean_flops = step_flops(unpadded, (1, *image), length, texts)
    few, many = max(1, batch // 2), max(2, batch)
    less, most = (step_memory(model(), (n, *image), length, dtype, accumulated > 1, texts) for n in (few, many))
    each = (most.working - less.working) / (many - few)
    memory = most if batch > 1 else less
    speed = speed_of(gpu, "fp32" if dtype is None else "half", flops, results, mfu)
    steps, pictures = run.max_iters, batch * accumulated * gpus
    drawn = tuple(made.token_draws())
    return Estimate(
        memory, each, batch, pictures, steps, gpus, gpu, flops, speed, texts.count, drawn, mean_flops,
    )  # fmt: skip


def auto_on(gpu: str) -> str:
    """What `auto` means on this kind of GPU, or on this processor."""
    if gpu == CPU:
        return auto_precision()
    return "bf16" if HARDWARE[gpu].bf16 else "fp32"


def resolved(model_cfg, gpu: str):
    """The model section with `auto` precisions as they will be on `gpu`."""
    auto = {key: auto_on(gpu) for key in ("vit_precision", "llm_precision") if model_cfg.get(key) == "auto"}
    return OmegaConf.merge(model_cfg, auto)


def speed_of(gpu: str, precision: str, flops: float, results: Path, mfu: float) -> Speed:
    """From the measured step on this hardware whose FLOPs per picture are nearest, else `mfu` of the data sheet."""
    rows = []
    for path in sorted(results.glob("step-*.json")):
        card = json.loads(path.read_text(encoding="utf-8"))
        if not _same(gpu, card["hardware"]):
            continue
        for row in card["rows"]:
            if precision == ("fp32" if row["dtype"] == "fp32" else "half"):
                rows.append((abs(math.log(row["flops_per_image"] / flops)), path, row))
    if rows:
        _, path, row = min(rows, key=lambda one: one[0])
        rate = row["flops_per_image"] * row["batch"] / row["seconds"]["whole"]["median"]
        share = "" if gpu == CPU else f", {rate / _peak(gpu, precision):.0%} of the data sheet's peak"
        seen = f"measured: {row['scale']}, batch {row['batch']}, {row['dtype']}{share} ({path.name})"
        return Speed(rate, seen, True)
    if gpu == CPU:
        raise ConfigError(
            f"--gpu cpu: no step in {'float32' if precision == 'fp32' else 'half precision'} was measured on a "
            f"processor in {results}; python -m benchmarks.speed.step measures one"
        )
    source = f"assumed: {mfu:.0%} of the data sheet's peak; no step on one {HARDWARE[gpu].name} is measured (--mfu)"
    return Speed(mfu * _peak(gpu, precision), source, False)


def _peak(gpu: str, precision: str) -> float:
    return HARDWARE[gpu].single if precision == "fp32" else HARDWARE[gpu].half


def _same(gpu: str, hardware: dict) -> bool:
    """Whether a results file's hardware is of this kind; memory sizes of one chip are not told apart."""
    if gpu == CPU or not hardware["gpu"]:
        return gpu == CPU and not hardware["gpu"]
    return HARDWARE[gpu].is_called(hardware["gpu"])


def memory_rows(found: Estimate) -> list[tuple[str, str]]:
    """What memory goes to, in GB."""
    memory = found.memory
    rows = [
        ("frozen weights", memory.frozen),
        ("weights that train", memory.trained),
        ("AdamW's moments", memory.moments),
        (f"activations and gradients of {found.micro_batch}", memory.working),
    ]
    if found.gpu != CPU:
        rows.append((f"CUDA and the allocator's gaps (1 GB and {LOST:.0%}, assumed)", found.needed - memory.whole))
    rows.append(("sum", found.needed))
    return [(name, f"{size / 1e9:.2f} GB") for name, size in rows]


def words(found: Estimate) -> str:
    """The lines under the table."""
    lines = []
    if found.gpu != CPU:
        free = HARDWARE[found.gpu].gb * 1e9
        fits = "fits" if found.needed < free else "does not fit"
        largest = found.largest(free)
        batch = f"the largest micro-batch that does: {largest}" if largest else "no micro-batch does"
        lines.append(f"memory: {fits} into {HARDWARE[found.gpu].gb:g} GB of one {HARDWARE[found.gpu].name}; {batch}")
    texts, rate = "", f"{found.pictures_per_step / found.seconds_per_step:.3g} pictures"
    if found.texts > 1:
        texts = f" with {found.texts} texts ({amount(found.flops / found.texts)}FLOPs a text)"
        rate += f" with {found.texts} texts each"
    if found.drawn:
        lines.append(f"memory is of a step with the most visual tokens, {listed(max(found.drawn, key=sum))}; work and "
                     f"time are the mean over what is drawn: {', '.join(map(listed, found.drawn))}")  # fmt: skip
    lines += [
        f"work: {amount(found.flops)}FLOPs a picture or clip{texts}, {found.pictures_per_step} of them a step",
        *_padding(found),
        f"speed: {amount(found.speed.rate)}FLOPs a second; {found.speed.source}",
        f"time: {found.seconds_per_step:.3g} s a step, {rate} a second; {found.steps} steps in "
        f"{found.hours:.3g} hours, without evaluation and waiting for data",
    ]
    return "\n".join(lines)


def _padding(found: Estimate) -> list[str]:
    if found.mean_flops is None:
        return []
    work = amount(found.mean_flops)
    return [f"padding: {work}FLOPs with the tokens of the mean picture; all rows are as wide as the longest may be"]


def main(args) -> int:
    """Print memory and time."""
    for name in ("gpus", "text_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: give at least 1")
    if not 0 < args.mfu <= 1:
        raise ConfigError(f"--mfu {args.mfu}: a share above 0 and at most 1")
    cfg = EvlgenConfig(args)
    found = []
    for one in cfg.stages or [cfg]:
        found.append(estimate(one, args.gpu, args.gpus, args.text_tokens, args.results, args.mfu))
        if one.stage is not None:
            print(one.stage.label)
        print(tables.show(("memory", ""), memory_rows(found[-1]), left=("memory",)))
        print(words(found[-1]))
    if cfg.stages:
        most, hours = max(one.needed for one in found), sum(one.hours for one in found)
        print(f"all stages: {hours:.3g} hours; the one that needs most memory takes {most / 1e9:.2f} GB")
    return 0
