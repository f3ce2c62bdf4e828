"""Keys of the run section that others than the runner read too, and those of every task that generates text."""

from dataclasses import dataclass

from lavis_evlgen.config.keys import Settings, key
from lavis_evlgen.config.limits import LARGEST


@dataclass(kw_only=True)
class SharedRunSettings(Settings):
    seed: int = key("seed of weights, order, augmentation and dropout", 42, at_least=0, at_most=4 * 10**9)
    device: str = key("auto (CUDA where present), cuda, cpu", "auto")
    deterministic: bool = key(
        "true: only algorithms that give the same bits every time, on CUDA too; slower, and attention takes more "
        "memory", False,
    )  # fmt: skip
    evaluate: bool = key("true: only evaluate test_splits", False)
    valid_splits: list[str] = key("splits evaluated during training, e.g. [val]", [])
    test_splits: list[str] = key("splits evaluated at the end with the best weights, e.g. [test]", [])


@dataclass(kw_only=True)
class DecodingSettings(Settings):
    num_beams: int = key("beams of the search", 5, at_least=1, at_most=LARGEST["num_beams"])
    max_len: int = key("most new tokens of a text", 30, at_least=1, at_most=LARGEST["max_len"])
    min_len: int = key("fewest new tokens of a text", 1, at_least=0, at_most=LARGEST["max_len"], not_above="max_len")
    length_penalty: float = key("above 0 favours longer texts in beam search", 1.0, at_least=-10.0, at_most=100.0)
    repetition_penalty: float = key(
        "above 1 discourages repeated tokens (Vicuna's answers as released: 1.5)", 1.0, at_least=0.01, at_most=100.0
    )
