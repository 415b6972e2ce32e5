"""The data of one refresh: one carrier that each stage takes and returns with more of it filled in.

Shapes: N examples, K pools cheapest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator.calibration import Calibration
from depo_gateway.estimator.learner import Item, Learner
from depo_gateway.estimator.logistic import Array
from depo_gateway.estimator.records.types import Labelled
from depo_gateway.training.online.champion import StartingPoint
from depo_gateway.training.online.cross_fit import CrossFit, Initialisation
from depo_gateway.training.online.embedding_cache import EmbeddingCache
from depo_gateway.training.online.publish_gate import Verdict
from depo_gateway.training.online.refresh_config import RefreshConfig
from depo_gateway.training.outcomes.table import Row
from depo_gateway.training.outcomes.traffic_examples import Traffic


class NothingToLearnError(Exception):
    """The labelled records give no candidate."""

    def __init__(self, reason: str, notes: tuple[str, ...] = ()) -> None:
        super().__init__(reason)
        self.reason = reason
        self.notes = notes


@dataclass(frozen=True, slots=True)
class RefreshInputs:
    """What a refresh is given: the same at every stage."""

    labelled: Sequence[Labelled]  # oldest first
    start: StartingPoint
    config: RefreshConfig
    reference: Sequence[Row]
    cache: EmbeddingCache


@dataclass(frozen=True, slots=True)
class Candidate:
    """A new estimator, and its held-out predictions by which it is judged."""

    learner: Learner  # fitted on all examples, its weights hold the joint calibration
    calibration: Calibration
    quality: Array  # (N, K) calibrated, held out
    calibrated: NDArray[np.bool_]  # (N,) the examples that it is calibrated on
    newest: NDArray[np.bool_]  # (N,) the examples that it is judged on


@dataclass(frozen=True, slots=True)
class ChampionPredictions:
    """The champion on the same examples."""

    quality: Array | None  # (N, K) as it is served; None: there is no champion
    new: NDArray[np.bool_]  # (N,) examples that it was not fitted on


@dataclass(frozen=True, slots=True)
class RefreshData:
    """What is known of one refresh so far."""

    inputs: RefreshInputs
    # select
    traffic: Traffic  # the examples, and what else is known of each
    observed: Array  # (N, K) quality, NaN: no label
    folds: NDArray[np.int64]  # (N,)
    initialisations: tuple[Initialisation, ...]
    new: NDArray[np.bool_]  # (N,) examples that no initialisation was fitted on; from cross_fit on, the chosen one
    notes: tuple[str, ...]  # what was not used, or could not be carried over
    # weigh
    weights: Array  # (N,)
    # cross_fit: the better initialisation, and the examples as it reads them
    fit: CrossFit | None = None
    items: Sequence[Item] = ()
    # calibrate
    candidate: Candidate | None = None
    # judge
    champion: ChampionPredictions | None = None
    verdict: Verdict | None = None
