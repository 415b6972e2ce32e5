"""A policy simulated by the recorded outcomes of many models on real questions.

Shapes: N questions, M models, D embedding width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from depo_gateway.training.evaluation.routing_metrics import auroc
from depo_gateway.training.rl.pass_rate_belief import nonzero_advantage

Array = NDArray[np.float64]
SPLIT = 11  # a stream of random numbers


@dataclass(frozen=True, slots=True)
class Domain:
    """Questions with outcomes (N, M) of models from the weakest to the strongest."""

    questions: tuple[str, ...]
    sources: tuple[str, ...]
    outcomes_NM: Array
    models: tuple[str, ...]

    def rates(self, strength: float, width: float) -> Array:
        """The policy's pass rate (N,) of each question. `width`: the Gaussian's deviation, in ranks."""
        count = len(self.models)
        weights_M = np.exp(-0.5 * ((np.arange(count) - strength * (count - 1)) / width) ** 2)
        return np.asarray(self.outcomes_NM @ (weights_M / weights_M.sum())).clip(0.0, 1.0)

    def part(self, rows: Sequence[int]) -> Domain:
        return Domain(
            tuple(self.questions[row] for row in rows),
            tuple(self.sources[row] for row in rows),
            self.outcomes_NM[list(rows)],
            self.models,
        )

    def split(self, share: float, seed: int) -> tuple[Domain, Domain]:
        """(training questions, held-out questions), `share` of them held out."""
        order = np.random.default_rng([seed, SPLIT]).permutation(len(self.questions)).tolist()
        held_out = round(share * len(order))
        return self.part(order[held_out:]), self.part(order[:held_out])


def read(paths: Sequence[Path]) -> Domain:
    """The questions of the files with the models that answered all of them. Raises ValueError for unusable files."""
    records = []
    for path in paths:
        try:
            records += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON lines: {error}") from None
    shared = sorted(set.intersection(*(set(record["correct"]) for record in records))) if records else []
    if len(shared) < 2:
        raise ValueError(f"no two models answered every question of {', '.join(map(str, paths))}")
    outcomes_NM = np.array([[record["correct"][model] for model in shared] for record in records], dtype=np.float64)
    ranked = np.argsort(outcomes_NM.mean(0), kind="stable")
    return Domain(
        tuple(record["question"] for record in records),
        tuple(record["source"] for record in records),
        outcomes_NM[:, ranked],
        tuple(shared[i] for i in ranked),
    )


def expected_auroc(score: Array, probability: Array) -> float:
    """AUROC of scores (N,) for events with probabilities (N,): all pairs, weighted by their probability.

    The limit of drawing every question's group again and again; NaN if all is certain.
    """
    above = (score[:, None] > score[None, :]) + 0.5 * (score[:, None] == score[None, :])
    weight = probability[:, None] * (1.0 - probability[None, :])
    np.fill_diagonal(weight, 0.0)
    total = weight.sum()
    return float((above * weight).sum() / total) if total > 1e-9 else float("nan")


def auroc_of(score: Array, positive: Array) -> float:
    return auroc(score, positive > 0) if 0 < (positive > 0).sum() < len(positive) else float("nan")


def text_limits(domain: Domain, embeddings_ND: Array, width: float, group_size: int) -> list[dict[str, Any]]:
    """Upper limits of predicting from a question's text whether its group will be informative: AUROCs by strength.

    Ridge regression of the probability on standardised embeddings, fitted on four of five folds with exact labels, more
    than a run ever sees. Of three penalties the best one counts, so the figure is optimistic.
    """
    x_ND = (embeddings_ND - embeddings_ND.mean(0)) / (embeddings_ND.std(0) + 1e-9) / embeddings_ND.shape[1] ** 0.5
    folds_N = np.random.default_rng(SPLIT).permutation(len(x_ND)) % 5
    sources = sorted(set(domain.sources))
    rows: list[dict[str, Any]] = []
    for strength in (0.1, 0.3, 0.5, 0.8):
        truth_N = nonzero_advantage(domain.rates(strength, width), group_size)
        row = {"strength": strength, "informative share": float(truth_N.mean())}
        row["ridge on embeddings"] = max(
            expected_auroc(crossfit(x_ND, truth_N, folds_N, penalty), truth_N) for penalty in (0.3, 1.0, 3.0)
        )
        row["length"] = expected_auroc(np.array([float(len(question)) for question in domain.questions]), truth_N)
        if len(sources) > 1:
            row["set"] = expected_auroc(np.array([float(of == sources[-1]) for of in domain.sources]), truth_N)
        rows.append({**row, "truth": expected_auroc(truth_N, truth_N)})
    return rows


def crossfit(x_ND: Array, y_N: Array, folds_N: NDArray[np.int64], penalty: float) -> Array:
    """Ridge predictions (N,), each by a fit without its fold."""
    predicted_N = np.zeros(len(y_N))
    for fold in np.unique(folds_N):
        shown = folds_N != fold
        x, mean = x_ND[shown], float(y_N[shown].mean())
        weights_D = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ (y_N[shown] - mean))
        predicted_N[~shown] = mean + x_ND[~shown] @ weights_D
    return predicted_N
