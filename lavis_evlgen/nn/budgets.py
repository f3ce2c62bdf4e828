"""Budgets: the numbers of tokens that the same weights of a TomeFormer are trained to leave. docs/merging.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DRAWS = ("one", "sandwich")


@dataclass(frozen=True)
class Budgets:
    """`tome_r: {elastic: [10, 29, 65], draw: one | sandwich, beta: 1.0}`.

    tokens: the budgets, in ascending order. draw: which of them one micro-step of training takes: one, or the largest
    and one other, whose predictions are then held to those of the largest; beta: the weight of that.
    """

    tokens: tuple[int, ...]
    draw: str = "one"
    beta: float = 1.0

    @classmethod
    def of(cls, tome_r) -> Budgets | None:
        """Of a value of `tome_r`; None where it is not elastic. Raises ValueError."""
        if not isinstance(tome_r, Mapping) or "elastic" not in tome_r:
            return None
        strange = sorted(set(tome_r) - {"elastic", "draw", "beta"})
        if strange:
            raise ValueError(f"tome_r: elastic takes draw and beta beside it, not {strange[0]}; leave that out")
        tokens = sorted(int(count) for count in tome_r["elastic"])
        if not tokens:
            raise ValueError("tome_r.elastic: [] names no number of tokens; list those to train with: [10, 29, 65]")
        twice = next((one for one, following in zip(tokens, tokens[1:], strict=False) if one == following), None)
        if twice is not None:
            raise ValueError(f"tome_r.elastic: {twice} is listed twice; list each number of tokens once")
        draw, beta = tome_r.get("draw", cls.draw), float(tome_r.get("beta", cls.beta))
        if draw not in DRAWS:
            raise ValueError(f"tome_r.draw: {draw!r} is not one of {', '.join(DRAWS)}")
        if draw == "sandwich" and len(tokens) < 2:
            raise ValueError("tome_r.draw: sandwich takes the largest budget and another one, and elastic lists "
                             f"{tokens[0]} alone; list another, or take draw: one")  # fmt: skip
        if not 0 <= beta < float("inf"):
            raise ValueError(f"tome_r.beta: {beta} must be a number of at least 0")
        return cls(tuple(tokens), draw, beta)

    @property
    def largest(self) -> int:
        return self.tokens[-1]

    @property
    def draws(self) -> list[tuple[int, ...]]:
        """What a micro-step may take, the largest first, each as likely as the others."""
        if self.draw == "one":
            return [(count,) for count in self.tokens]
        return [(self.largest, count) for count in self.tokens[:-1]]
