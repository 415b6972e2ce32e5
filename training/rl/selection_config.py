"""The settings of a selection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

POLICY, SPREAD = "policy", "spread"  # the estimator's heads: the policy's mean reward, the spread of its rewards


@dataclass(frozen=True, slots=True)
class SelectionConfig:
    """The defaults are the paper's, without its warm-up; each addition is off."""

    rule: str = "band"  # a name in selectors/names.py, or module:Class
    group_size: int = 8
    warmup_steps: int = 0  # the first so many generations keep every prompt
    low: float = 0.15  # band: both ends are kept
    high: float = 0.85
    # share of the rejects that are rolled out nevertheless, at most half a generation's prompts; they replace accepted
    # ones
    explore: float = 0.0
    candidates: float = 1.0  # informative: ranks so many times the prompts needed
    # scores at most so many times the prompts needed; then the best rejects fill up; 0: at most the data set once
    refill_cap: float = 0.0
    replay: int = 0  # labels kept to be learned from again
    updates: int = 1  # estimator steps a generation
    calibrate: bool = False  # predictions, on recent labels
    history_half_life: float = 0.0  # generations after which a prompt's own outcomes count half; 0: not at all
    reward_low: float = 0.0  # the rewards that count as 0 and 1 for the estimator
    reward_high: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)  # of the rule: arguments of its class

    def __post_init__(self) -> None:
        if not 0.0 <= self.low < self.high <= 1.0:
            raise ValueError(f"the band is {self.low} to {self.high}; it must lie between 0 and 1, low below high")
        if not 0.0 <= self.explore <= 1.0:
            raise ValueError(f"explore is {self.explore}; it must lie between 0 and 1")
        if not self.reward_low < self.reward_high:
            raise ValueError(f"reward_low is {self.reward_low}; it must be below reward_high, {self.reward_high}")
        for name, least in (
            ("group_size", 2), ("warmup_steps", 0), ("candidates", 1), ("refill_cap", 0), ("replay", 0), ("updates", 1),
            ("history_half_life", 0),
        ):  # fmt: skip
            if not least <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {least} or more")

    @staticmethod
    def off(group_size: int = 8) -> SelectionConfig:
        """Every prompt in its turn: GRPO, and DAPO before its own sampling."""
        return SelectionConfig("off", group_size, warmup_steps=100)  # no effect; a run resumes with equal settings only

    @staticmethod
    def faithful(group_size: int = 8) -> SelectionConfig:
        """DEPO as in the paper."""
        return SelectionConfig("band", group_size, warmup_steps=100)

    @staticmethod
    def plus(group_size: int = 8) -> SelectionConfig:
        """DEPO with all our additions; the values were chosen by benchmarks/depo."""
        return SelectionConfig(
            "informative", group_size, warmup_steps=20, explore=0.05, candidates=4.0, refill_cap=8.0, replay=512,
            updates=2, calibrate=True, history_half_life=100.0,
        )  # fmt: skip
