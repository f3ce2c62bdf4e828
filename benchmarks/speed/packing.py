"""Several texts of a picture: the training step against their number, and an SCST step whose captions share the prompt.

    python -m benchmarks.speed.packing --scale opt-2.7b --batch 64          # on a GPU; also vicuna-7b
    OMP_NUM_THREADS=1 python -m benchmarks.speed.packing --scale quickstart --batch 4

Random weights of the given sizes, nothing is downloaded. Steps with each of --texts captions a picture run in turn, and
so do SCST's step and its drawing, with --samples captions a picture of at most --tokens tokens: as it is, and with the
prompt read once for each caption, in drawing and in the log-probabilities.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import torch

from benchmarks.common.performance_tables import SCST_PROMPTS
from benchmarks.common.random_models import Scale, add_step_arguments, build, samples, scales
from benchmarks.common.timing import alternate, parser, spread, write
from benchmarks.speed.step import in_phases
from lavis_evlgen.models.evlgen import EVLGen
from lavis_evlgen.models.language import model as language
from lavis_evlgen.runners.optim import adamw
from lavis_evlgen.runners.step import TrainingStep

SHARED, OWN = SCST_PROMPTS


def step_of(model: EVLGen, device: torch.device, dtype: str, objective=None) -> TrainingStep:
    return TrainingStep(model, adamw(model, 1e-5, 0.05, 0.999), device, {"amp": dtype}, objective=objective)


@contextlib.contextmanager
def own_prompts(model: EVLGen) -> Iterator[None]:
    """Captions that are drawn have a row of the language model each, from the prompt on."""
    before, language.cache_key = language.cache_key, lambda llm: None
    model.language_model.packs = lambda: False
    try:
        yield
    finally:
        language.cache_key = before
        del model.language_model.packs


def loss_difference(model: EVLGen, step: TrainingStep, batch: dict) -> float:
    """How far the loss of texts that share a prompt is from that of a picture for each text, as a share of it."""
    counts = batch.get("texts_per_image")
    if counts is None:
        return 0.0
    each = {"image": batch["image"].repeat_interleave(torch.tensor(counts, device=step.device), 0)}
    each["text_input"] = batch["text_input"]
    model.eval()  # without dropout
    with torch.no_grad(), step.autocast():
        ours, plain = (model(step.prepared(one))["loss"].item() for one in (batch, each))
    model.train()
    return abs(ours / plain - 1)


def training(model: EVLGen, scale: Scale, args) -> list[dict]:
    """A row for each number of texts: seconds of the whole step and of its phases."""
    device = torch.device(args.device)
    step = step_of(model, device, args.dtype)
    batches = {count: samples(scale, args.batch, device, texts=count) for count in args.texts}
    calls = {count: lambda batch=batch: step(itertools.repeat(batch)) for count, batch in batches.items()}
    seconds = alternate(calls, device, args.repetitions, args.seconds)
    laps = {count: [] for count in batches}
    for _ in range(max(3, args.repetitions // 2)):
        for count, batch in batches.items():
            laps[count].append(in_phases(model, step, batch))
    rows = []
    for count, batch in batches.items():
        phases = {name: spread([each[name] for each in laps[count]]) for name in laps[count][0]}
        row = {"part": "training", "texts": count, "seconds": seconds[count], "phases": phases}
        row["texts_per_s"] = args.batch * count / seconds[count]["median"]
        row["loss_difference"] = loss_difference(model, step, batch)
        print(f"{count} texts a picture: {row['texts_per_s']:.3g} texts/s", flush=True)
        rows.append(row)
    return rows


def scst(model: EVLGen, scale: Scale, args) -> dict:
    """The row of SCST: seconds of the step and of its drawing, either way; scoring, which has no part in it, is not
    there: captions are rewarded in turn with 1 and -1."""
    device = torch.device(args.device)
    batch = samples(scale, args.batch, device)
    drawing = {"seeds": list(range(args.batch)), "num_samples": args.samples, "max_new_tokens": args.tokens}

    def policy_gradient(model, prompt, given):
        rows = model.sample(prompt, given, **drawing)
        log_probs, _ = model.log_probs_of(prompt, given, rows)
        reward = torch.ones_like(log_probs)
        reward[::2] = -1
        return {"loss": -(reward * log_probs).mean()}

    step = step_of(model, device, args.dtype, objective=lambda micro_step: policy_gradient)
    with torch.no_grad(), step.autocast():
        prompt = model.visual_prompt(batch["image"])
        own = own_prompts(model)(lambda: model.sample(prompt, batch, **drawing))()
        same = sum(a == b for a, b in zip(model.sample(prompt, batch, **drawing), own, strict=True)) / len(own)

    def draw():
        with torch.no_grad(), step.autocast():
            model.sample(prompt, batch, **drawing)

    calls = {}
    for name, call in {"step": lambda: step(itertools.repeat(batch)), "drawing": draw}.items():
        calls |= {f"{name}, {SHARED}": call, f"{name}, {OWN}": own_prompts(model)(call)}
    seconds = alternate(calls, device, args.repetitions, args.seconds)
    print({name: f"{time['median']:.2f} s" for name, time in seconds.items()}, f"{same:.0%} drawn alike", flush=True)
    return {"part": "scst", "seconds": seconds, "same_draws": same}


def main():
    on_gpu = torch.cuda.is_available()
    args_of = parser(__doc__, repetitions=9 if on_gpu else 3, seconds=300)
    add_step_arguments(args_of)
    args_of.add_argument("--texts", type=int, nargs="+", default=[1, 2, 5], help="captions of a picture (1 2 5)")
    args_of.add_argument("--samples", type=int, default=5, help="captions drawn for a picture by SCST (5)")
    args_of.add_argument("--tokens", type=int, default=14, help="of a drawn caption, at most (14)")
    args = args_of.parse_args()
    scale = scales()[args.scale]
    model = build(scale, args.dtype, torch.device(args.device))
    write(f"packing-{args.scale}", args, [*training(model, scale, args), scst(model, scale, args)])


if __name__ == "__main__":
    main()
