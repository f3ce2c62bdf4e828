"""`run.compile`: parts of a model under torch.compile, in training steps alone.

The frozen ViT and the language model are stacks of equal blocks: each block is a region of its own, so one compilation
serves all of them. The connector is one region: every layer leaves fewer tokens than the one before, in shapes that
never change. Captions are of any length: sequences of the language model are padded on to a multiple of LENGTHS (more
for long texts), so that a few compilations, each for one shape, serve all batches. Evaluation, generation and the
counting of FLOPs run as they are written (`eager`).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from threading import Lock

import torch
from torch import nn

from lavis_evlgen.config import ConfigError

PARTS = {"vision": "visual_encoder", "connector": "connector", "llm": "language_model"}  # in the config: of the model
LENGTHS, SHAPES = 8, 6  # that many shapes for the longest text at most: torch compiles up to eight for one function


def check_parts(parts) -> list[str]:
    """`run.compile` as a list of its parts: false or empty, true (all), or names. Raises ConfigError."""
    if isinstance(parts, bool) or parts is None:
        parts = list(PARTS) if parts else []
    names = [parts] if isinstance(parts, str | int | float) else list(parts)
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise ConfigError(f"run.compile: {unknown[0]!r} is not one of {', '.join(PARTS)}; true is all of them")
    if names and not hasattr(torch.compiler, "set_stance"):
        raise ConfigError(f"run.compile needs torch 2.6 or newer, this is {torch.__version__}; leave it out")
    return list(dict.fromkeys(names))


def compile_parts(model: nn.Module, parts: Sequence[str]):
    """Have `parts` compiled when they are next called; parameters and their names stay what they are."""
    budgets = getattr(getattr(model, "connector", None), "budgets", None)
    if parts and budgets is not None:  # each number of visual tokens is a shape of its own, behind which come texts
        from torch._dynamo import config

        config.cache_size_limit = max(config.cache_size_limit, 8 * len(budgets.tokens))
    for part in parts:
        module = getattr(model, PARTS[part], None)
        if module is None:
            raise ConfigError(f"run.compile: {type(model).__name__} has no {PARTS[part]}; leave {part} out")
        if part == "llm":
            module.length_multiple = LENGTHS * -(-module.max_txt_len // (LENGTHS * SHAPES))
        for region in [module] if part == "connector" else stack_of(module):
            region.compile(dynamic=False)


def stack_of(module: nn.Module) -> list[nn.Module]:
    """The blocks of the stack that holds most of a module's weights, the module itself where there is no stack."""
    stacks = [child for child in module.modules() if isinstance(child, nn.ModuleList)]
    largest = max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()), default=())
    return list(largest) or [module]


@contextlib.contextmanager
def eager():
    """What was compiled runs as it is written; a context, or a decorator. Threads may be inside at the same time."""
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        yield  # nothing can have been compiled, and asking would import the compiler
        return
    _Inside.enter()
    try:
        yield
    finally:
        _Inside.leave()


class _Inside:
    """How many threads are in `eager`: the first sets torch's stance, which is one for all, and the last ends it."""

    lock, count, stance = Lock(), 0, contextlib.ExitStack()

    @classmethod
    def enter(cls):
        with cls.lock:
            if cls.count == 0:
                cls.stance.enter_context(torch.compiler.set_stance("force_eager"))
            cls.count += 1

    @classmethod
    def leave(cls):
        with cls.lock:
            cls.count -= 1
            if cls.count == 0:
                cls.stance.close()
