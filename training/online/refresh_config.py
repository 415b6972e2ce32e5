"""Every setting of one refresh and of its publication. Without torch, so that learner.yaml is checked at once."""

from __future__ import annotations

from dataclasses import dataclass, field

from depo_gateway.estimator.configuration.yaml_tree import at_least, within
from depo_gateway.training.outcomes.traffic_config import TrafficConfig

REFUSALS = "refusals.jsonl"  # in --out, a line for each refresh that published nothing
NO_TEXT = "no record holds its prompt; set records.prompts: full in gateway.yaml, because learning reads the prompts"


@dataclass(frozen=True, slots=True)
class GateConfig:
    """What a candidate must show before it is published."""

    least: int = 50  # held-out examples with a label; with fewer nothing is published
    calibration_error: float = 0.05  # of each quality and of the gain, above what chance gives
    spread: float = 0.02  # of the cheapest pool's confidence, from the 5th to the 95th percentile; less hardly routes
    resamples: int = 1000

    def __post_init__(self) -> None:
        at_least(self.least, 20, "least")
        within(self.calibration_error, 0, 1, "calibration_error")
        within(self.spread, 0, 1, "spread")
        at_least(self.resamples, 100, "resamples")


@dataclass(frozen=True, slots=True)
class OwnerGate:
    """What a publish may change for live traffic without its owner's consent."""

    max_cost_increase: float = 0.1  # of all-large's cost, at the threshold or target in force; 1: no limit

    def __post_init__(self) -> None:
        within(self.max_cost_increase, 0, 1, "max_cost_increase")


@dataclass(frozen=True, slots=True)
class RefreshConfig:
    """How a refresh learns from labelled records."""

    min_labels: int = 100  # labelled prompts, without duplicates and untrusted labels; with fewer nothing is learned
    newest: int = 20_000  # records at most, the newest
    held_out: float = 0.3  # the newest share of the examples, on which a candidate is judged
    held_out_least: int = 1000  # examples at least, or all there are: with fewer, harm looks like noise
    recent: int = 300  # newest examples; calibrated on them or on the newest 1,500, whichever fits them better
    folds: int = 5
    # Fixed: with few labels a held-out loss is too noisy for early stopping, and weight decay keeps long fits in check
    epochs: int = 30
    batch_size: int = 128
    learning_rate: float = 0.15  # of linear heads
    wide_learning_rate: float = 0.05
    weight_decay: float = 0.003
    gain_weight: float = 0.0
    distillation_weight: float = 1.0
    seed: int = 0
    traffic: TrafficConfig = field(default_factory=TrafficConfig)
    gate: GateConfig = field(default_factory=GateConfig)

    def __post_init__(self) -> None:
        at_least(self.min_labels, 20, "min_labels")
        at_least(self.newest, self.min_labels, "newest")
        within(self.held_out, 0.05, 1, "held_out")
        at_least(self.held_out_least, 50, "held_out_least")
        at_least(self.recent, 50, "recent")
        within(self.folds, 2, 50, "folds")
        at_least(self.epochs, 1, "epochs")
        at_least(self.batch_size, 1, "batch_size")
        for name in ("learning_rate", "wide_learning_rate", "gain_weight", "distillation_weight", "weight_decay"):
            within(getattr(self, name), 0, 100, name)
