"""Which prompts to roll out: the settings of a selection, what it answers, and the order prompts come in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

RULES = ("off", "band", "informative")
POLICY, SPREAD = "policy", "spread"  # the estimator's pools: the policy's mean reward, and its rewards' spread


@dataclass(frozen=True, slots=True)
class Choice:
    """Prompts for one generation, each with the mean reward predicted for it (NaN: not scored) and its propensity."""

    indices: tuple[int, ...]
    predicted: tuple[float, ...]
    propensity: tuple[float, ...]  # 1, or the rate at which rejects like it are kept
    metrics: Mapping[str, float]

    def digest(self) -> str:
        """Equal on every rank that chose the same prompts."""
        return hashlib.sha256(json.dumps([self.indices, self.propensity]).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class SelectionConfig:
    """The defaults are the paper's; each addition is off."""

    rule: str = "band"
    group_size: int = 8
    warmup_steps: int = 100  # steps 1 to so many keep every prompt
    low: float = 0.15  # band: both ends are kept
    high: float = 0.85
    explore: float = 0.0  # share of rejects kept all the same
    candidates: float = 1.0  # informative: so many times the prompts needed are ranked
    refill_cap: float = (
        0.0  # scored at most so many times the prompts needed, then the best rejects; 0: the data set once
    )
    replay: int = 0  # labels kept to be learned from again
    updates: int = 1  # estimator steps a policy step
    calibrate: bool = False  # predictions, on recent labels
    history_half_life: float = 0.0  # policy steps after which a prompt's own outcomes count half; 0: not at all
    reward_low: float = 0.0  # what counts as reward 0 and 1 for the estimator
    reward_high: float = 1.0

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"the selection rule {self.rule!r} is unknown; use one of {', '.join(RULES)}")
        if not 0.0 <= self.low < self.high <= 1.0:
            raise ValueError(f"the band is {self.low} to {self.high}; it must lie between 0 and 1, low below high")
        if not 0.0 <= self.explore <= 1.0:
            raise ValueError(f"explore is {self.explore}; it must lie between 0 and 1")
        if not self.reward_low < self.reward_high:
            raise ValueError(f"rewards from {self.reward_low} to {self.reward_high} leave no room between them")
        for name, least in (
            ("group_size", 2), ("warmup_steps", 0), ("candidates", 1), ("refill_cap", 0), ("replay", 0), ("updates", 1),
            ("history_half_life", 0),
        ):  # fmt: skip
            if not least <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {least} or more")

    @staticmethod
    def off(group_size: int = 8) -> SelectionConfig:
        """Every prompt in its turn: GRPO, and DAPO before its own sampling."""
        return SelectionConfig("off", group_size)

    @staticmethod
    def faithful(group_size: int = 8) -> SelectionConfig:
        """DEPO as in the paper."""
        return SelectionConfig("band", group_size)

    @staticmethod
    def plus(group_size: int = 8) -> SelectionConfig:
        """DEPO with everything we add; chosen by benchmarks/depo."""
        return SelectionConfig(
            "informative", group_size, warmup_steps=20, explore=0.05, candidates=4.0, refill_cap=8.0, replay=512,
            updates=2, calibrate=True, history_half_life=100.0,
        )  # fmt: skip

    @property
    def pools(self) -> tuple[str, ...]:
        """The estimator's pools under this rule."""
        return (POLICY, SPREAD) if self.rule == "informative" else (POLICY,)


@dataclass(slots=True)
class Stream:
    """Endless passes over `size` rows, each in an order of its own; (epoch, cursor) say where it stands."""

    size: int
    seed: int
    epoch: int = 0
    cursor: int = 0
    _order: list[int] = field(default_factory=list)
    _ordered: int = -1  # the epoch that _order is of

    def draw(self, count: int) -> list[int]:
        """The next `count` rows."""
        rows: list[int] = []
        while len(rows) < count:
            if self._ordered != self.epoch:
                self._order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size).tolist()
                self._ordered = self.epoch
            taken = self._order[self.cursor : self.cursor + count - len(rows)]
            rows += taken
            self.cursor += len(taken)
            if self.cursor == self.size:
                self.epoch, self.cursor = self.epoch + 1, 0
        return rows
