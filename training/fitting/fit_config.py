"""Settings of a fit to outcome tables."""

from __future__ import annotations

from dataclasses import dataclass, field

from depo_gateway.estimator.learner import LearnerConfig


@dataclass(frozen=True, slots=True)
class FitConfig:
    """Settings of a fit to outcome tables."""

    learner: LearnerConfig = field(default_factory=LearnerConfig)
    folds: int | None = None  # None: as many as the kind of fit and the number of examples suggest
    max_epochs: int = 200  # of SGD
    patience: int = 5  # epochs without a lower held-out loss before all folds stop
    batch_size: int = 128
    seed: int = 0
