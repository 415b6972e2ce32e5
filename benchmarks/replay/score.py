"""Scores of a checkpoint on questions it never saw, with embeddings made once, because the encoder is frozen.

Shapes: N questions, D encoder width, W windows, K pools (small, large).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray

from benchmarks.replay.questions import POOLS, Question
from depo_gateway.estimator import calibration, checkpoint
from depo_gateway.estimator.learner import Item, Learner, LearnerConfig
from depo_gateway.estimator.model import ModelConfig, create_model
from depo_gateway.estimator.records.types import Example
from depo_gateway.estimator.text import TextConfig
from depo_gateway.training.evaluation.routing_metrics import apgr, calibration_error

Array = NDArray[np.float64]
CHANCE_DRAWS = 100


class Scorer:
    """Checkpoints on the default encoder; questions are embedded once and cached in a file."""

    def __init__(self, questions: Sequence[Question], cache: Path) -> None:
        model, tokenizer = create_model(ModelConfig(POOLS, TextConfig()))
        self._learner = Learner(model, tokenizer, LearnerConfig(average=0))
        examples = [Example(question.text, {}) for question in questions]
        self._items = self._read(examples, cache)
        self._row = {question.text: row for row, question in enumerate(questions)}

    def quality(self, place: Path, questions: Sequence[Question]) -> Array:
        """Calibrated quality (N, K) by the checkpoint at `place`, as its runtime would give it."""
        _, files = checkpoint.load_checkpoint(place)
        state = safetensors.torch.load(files[checkpoint.WEIGHTS])
        self._learner.model.load_state_dict(state, strict=False)
        logits, _ = self._learner.predict([self._items[self._row[question.text]] for question in questions])
        stage = calibration.loads(files[checkpoint.CALIBRATION]).stages["full"]
        return calibration.calibrate_quality(stage, logits)

    def _read(self, examples: Sequence[Example], cache: Path) -> list[Item]:
        if cache.exists():
            embeddings = torch.from_numpy(np.load(cache))
            if len(embeddings) == len(examples):
                return self._learner.items(examples, embeddings=list(embeddings))
        items = self._learner.items(examples)
        embedded = [item.embedding for item in items if item.embedding is not None]
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.save(cache, torch.stack(embedded).numpy())
        return items


def outcomes(questions: Sequence[Question]) -> Array:
    """(N, K)."""
    return np.array([question.right for question in questions], float).reshape(-1, len(POOLS))


def measured(quality: Array, observed: Array, lengths: Array) -> dict[str, float]:
    """APGR of the gain and of prompt length; calibration errors, and those that a perfect model has by chance."""
    gain = quality[:, 1] - quality[:, 0]
    errors = calibration_errors(quality, observed)
    chance = chance_errors(quality, observed)
    return {
        "apgr": apgr(gain, observed[:, 0], observed[:, 1]),
        "length": apgr(lengths, observed[:, 0], observed[:, 1]),
        "questions": float(len(observed)),
        **{f"ece_{name}": value for name, value in errors.items()},
        **{f"chance_{name}": value for name, value in chance.items()},
    }


def calibration_errors(quality: Array, observed: Array) -> dict[str, float]:
    """In 10 equally full bins: of each pool's quality and of the gain."""
    found = {pool: calibration_error(quality[:, k], observed[:, k])["ece"] for k, pool in enumerate(POOLS)}
    found["gain"] = calibration_error(quality[:, 1] - quality[:, 0], observed[:, 1] - observed[:, 0])["ece"]
    return found


def chance_errors(quality: Array, observed: Array, draws: int = CHANCE_DRAWS) -> dict[str, float]:
    """The mean errors of a perfect model: outcomes are drawn from its own predictions.

    Both pools' outcomes of a question are correlated as in the table: the joint probabilities have the predicted
    margins and are nearest to the observed correlation.
    """
    generator = np.random.default_rng(0)
    residual = observed - quality
    spread = np.sqrt((quality * (1 - quality)).prod(1)).mean()
    correlation = float((residual[:, 0] * residual[:, 1]).mean() / spread) if spread > 0 else 0.0
    small, large = quality.T
    both = small * large + correlation * np.sqrt(small * (1 - small) * large * (1 - large))
    both = np.clip(both, np.maximum(0, small + large - 1), np.minimum(small, large))
    found: list[dict[str, float]] = []
    for _ in range(draws):
        first, second = generator.random((2, len(quality)))
        drawn_small = first < small
        given = np.where(drawn_small, both / np.maximum(small, 1e-9), (large - both) / np.maximum(1 - small, 1e-9))
        drawn = np.stack([drawn_small, second < given], 1).astype(float)
        found.append(calibration_errors(quality, drawn))
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


@dataclass(frozen=True, slots=True)
class Served:
    """One answered request as the client saw it."""

    phase: str  # before or after the switch of traffic
    first: bool  # asked with its reference, for the first time, so that no version had learned it
    question: Question
    id: str
    pool: str
    reason: str
    version: str


def advantage(served: Sequence[Served]) -> float:
    """Mean quality of the served answers minus that of random routing at the same share of each pool."""
    observed = outcomes([one.question for one in served])
    large = np.array([one.pool == "large" for one in served])
    share = large.mean()
    routed = np.where(large, observed[:, 1], observed[:, 0]).mean()
    return float(routed - (share * observed[:, 1].mean() + (1 - share) * observed[:, 0].mean()))


def windows(large: NDArray[np.bool_], size: int) -> Array:
    """The share of True in every sliding window of `size`, (W,); none where there are fewer."""
    total = np.concatenate([[0], np.cumsum(large)])
    return np.asarray((total[size:] - total[:-size]) / size if len(large) >= size else np.zeros(0), float)


def share_errors(served: Sequence[Served], target: float, size: int = 2000) -> dict[str, Any]:
    """Largest deviation of a window's large share from the target: before, across and after the switch."""
    large = np.array([one.pool == "large" for one in served])
    after = np.array([one.phase == "after" for one in served])
    share, late = windows(large, size), windows(after, size)
    where = {"before": late == 0, "across": (late > 0) & (late < 1), "after": late == 1}
    return {
        name: float(np.abs(share[rows] - target).max()) if len(share) and rows.any() else None
        for name, rows in where.items()
    }
