"""Which of the parameters that a model trains do so in a stage of a run: chosen by patterns of their names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from lavis_evlgen.config import ConfigError
from lavis_evlgen.config.stages import Stage
from lavis_evlgen.models.facts import facts_of
from lavis_evlgen.weights.trainable import is_kept, keep

_NEAREST = 3  # names in a message


class TrainedParts:
    """The parameters that `model` trains as it was built, of which a stage trains some.

    starts_trained: whether it was built from weights that an earlier run had trained. Otherwise a language model that
    no stage has trained yet is left out of checkpoints: it is as its files have it, and an adapter changes nothing.
    """

    def __init__(self, model: nn.Module, starts_trained: bool = False):
        self.model = model
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.from_files = set() if starts_trained else facts_of(model).from_files() & set(self.parameters)

    def names(self, stage: Stage) -> list[str]:
        """What trains in a stage. Raises ConfigError for a pattern that selects nothing."""
        if stage.trains is None:
            return list(self.parameters)
        found = set()
        for pattern in stage.trains:
            matches = [name for name in self.parameters if fnmatchcase(name, pattern)]
            if not matches:
                raise ConfigError(f"{stage.key}.trains: {self._nothing(pattern)}")
            found.update(matches)
        return [name for name in self.parameters if name in found]

    def _nothing(self, pattern: str) -> str:
        """Why a pattern selects nothing, and what to write."""
        head = pattern.partition(".")[0]
        training = {name.partition(".")[0] for name in self.parameters}
        for name, _ in self.model.named_parameters():
            part = name.partition(".")[0]
            if fnmatchcase(name, pattern) or (part == head and part not in training):
                way = {"language_model": "model.llm_train=lora or full lets it train, and trains can then choose"}
                return (f"{pattern} selects nothing that trains: parameters such as {name} are frozen; "
                        f"{way.get(part, f'{part} is frozen in every stage, so leave it out')}")  # fmt: skip
        prefixes = {name[: n + 1] + "*" for name in self.parameters for n, sign in enumerate(name) if sign == "."}
        near = difflib.get_close_matches(pattern, [*self.parameters, *sorted(prefixes)], n=_NEAREST, cutoff=0.0)
        return (f"{pattern} is the name of no parameter that trains; nearest: {', '.join(near)} (evlgen doctor CFG "
                "--parameters prints all)")  # fmt: skip

    def kept(self, trained: Sequence[Sequence[str]]) -> set[str]:
        """What checkpoints hold after stages that have `trained` these names: all but what is as its files have it."""
        ever = {name for names in trained for name in names}
        return set(self.parameters) - (set() if ever & self.from_files else self.from_files)

    def train_only(self, names: Sequence[str], kept: set[str]):
        """From here on `names` train, and checkpoints hold `kept` too."""
        chosen = set(names)
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in chosen)
            keep(parameter, name in kept)


def train_as_in(model: nn.Module, stage: Stage | None):
    """Let a model that was just built train what `stage` trains (None: all that it trains). Raises ConfigError."""
    if stage is not None and stage.trains is not None:
        parts = TrainedParts(model)
        parts.train_only(parts.names(stage), set())


def train_mode(model: nn.Module):
    """model.train(), but what a stage has frozen stays in eval mode, without dropout, as all that is frozen."""
    model.train()
    for name, module in model.named_modules():
        # a language model keeps itself in eval mode; its own flag only says that sequences are padded for a compiler
        own = [] if name.startswith("language_model") else list(module.parameters())
        if own and not any(p.requires_grad for p in own) and any(map(is_kept, own)):
            module.eval()
