"""What is known of each prompt, and how the estimator learns more from the groups that were rolled out.

Shapes: P prompts, G rollouts a group.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.heads import QUALITY
from depo_gateway.estimator.learner import Learner
from depo_gateway.estimator.logistic import sigmoid
from depo_gateway.estimator.records.types import Example
from depo_gateway.training.evaluation.routing_metrics import auroc, calibration_error
from depo_gateway.training.rl.group_labels import (
    Group,
    GroupLabel,
    GroupPrediction,
    is_binary,
    quality_of,
    spread_of,
    token_confidence_of,
)
from depo_gateway.training.rl.pass_rate_belief import WINDOW, PassRateBeliefs
from depo_gateway.training.rl.selection_config import POLICY, SPREAD, SelectionConfig
from depo_gateway.training.rl.tickets import UNSCORED, Ticket

REPLAYING = 2  # a stream of random numbers
HEAVIEST = 5.0  # limit of inverse-propensity weights: a reject explored at 5% would weigh 20 and dominate its batch


class PromptEstimates:
    """The estimator's scores, calibrated, with the prompts' own past outcomes. Without a learner only the outcomes."""

    def __init__(
        self,
        prompts: Sequence[str],
        config: SelectionConfig,
        heads: tuple[str, ...],
        learner: Learner | None,
        seed: int,
        score: Callable[[Sequence[str]], Array] | None,
    ) -> None:
        self.prompts, self.config, self.heads, self.learner, self.seed = prompts, config, heads, learner, seed
        self.beliefs = PassRateBeliefs(config.calibrate, config.history_half_life)
        self.binary = True  # until a reward is neither of the two ends
        self.replay: deque[GroupLabel] = deque(maxlen=config.replay)
        self._score = score or (learner.score if learner is not None else None)
        self._logits: dict[int, tuple[float, float]] = {}  # by row: scored since the last step, or carried over
        self._predictions: deque[GroupPrediction] = deque(maxlen=WINDOW)

    # --- what is known ---

    def score(self, rows: Sequence[int]) -> Array:
        """Logits (P, 2): of the mean reward, and of its spread (NaN where the estimator has no such head)."""
        logits_P2 = np.full((len(rows), 2), np.nan)
        if rows:
            assert self._score is not None
            scored = self._score([self.prompts[row] for row in rows])[:, :, QUALITY]
            logits_P2[:, : scored.shape[1]] = scored
        self._logits |= {row: (mean, spread) for row, (mean, spread) in zip(rows, logits_P2.tolist(), strict=True)}
        return logits_P2

    def logits(self, row: int) -> tuple[float, float]:
        """As last scored; NaN if it was not."""
        return self._logits.get(row, UNSCORED)

    def pass_rates(self, logits_P: Array) -> Array:
        """Predictions of the mean reward (P,), calibrated if there are enough labels."""
        return self.beliefs.predicted(logits_P)

    def worth(self, rows: Sequence[int], logits_P2: Array, step: int) -> Array:
        """The probability (P,) of a non-zero advantage or, of graded rewards, the spread."""
        if self.binary or SPREAD not in self.heads:
            return self.beliefs.nonzero_advantage(rows, logits_P2[:, 0], self.config.group_size, step)
        return sigmoid(logits_P2[:, 1])

    def worth_threshold(self) -> float:
        """The worth from which a prompt counts as good.

        More likely than not to have a non-zero advantage or, of graded rewards, half the usual spread.
        """
        if self.binary:
            return 0.5
        spreads = [prediction.spread for prediction in self._predictions if prediction.spread > 0]
        return 0.5 * sum(spreads) / len(spreads) if spreads else 0.5

    # --- learning ---

    def label(self, ticket: Ticket, group: Group, step: int) -> GroupLabel | None:
        """What a group teaches; None if no rollout has a reward. Also records how well it was predicted."""
        ends = self.config.reward_low, self.config.reward_high
        quality = quality_of(group.rewards, *ends)
        if quality is None:
            return None
        self.binary = self.binary and is_binary(group.rewards, *ends)
        spread = spread_of(group.rewards, *ends)
        weight = min(1.0 / ticket.propensity, HEAVIEST)
        logits_12 = np.array([ticket.logits])
        if np.isfinite(ticket.logits[0]):
            worth = float(self.worth([ticket.row], logits_12, step)[0])
            predicted = float(self.pass_rates(logits_12[:, 0])[0])
            self._predictions.append(GroupPrediction(predicted, quality, worth, spread))
        count = int(np.isfinite(group.rewards).sum())
        self.beliefs.learn(ticket.row, ticket.logits[0], quality, count, weight, step)
        return GroupLabel(ticket.row, quality, spread, token_confidence_of(group.log_probs), weight, count)

    def learn(self, labels: Sequence[GroupLabel], step: int) -> dict[str, float]:
        """Update the estimator on these labels and, with replay, as many recent ones. Returns its loss before."""
        terms: dict[str, float] = {}
        if labels and self.learner is not None:
            order = np.random.default_rng([self.seed, step, REPLAYING])
            for _ in range(self.config.updates):
                count = min(len(labels), len(self.replay))
                again = order.choice(len(self.replay), count, replace=False).tolist()
                batch = [*labels, *(self.replay[i] for i in again)]
                last = self.learner.step([self._example(label) for label in batch])
                terms = terms or last
        self.replay.extend(labels)
        self.beliefs.refit()
        return {f"depo/loss_{name}": value for name, value in terms.items()}

    def metrics(self) -> dict[str, float]:
        """How well the most recent WINDOW groups were predicted."""
        metrics: dict[str, float] = {}
        if self._predictions:
            predicted, quality, worth, spread = np.array([astuple(each) for each in self._predictions]).T
            metrics["depo/calibration_error"] = calibration_error(predicted, quality)["ece"]
            if 0 < (spread > 0).sum() < len(spread):
                metrics["depo/auroc"] = auroc(worth, spread > 0)
        return metrics

    def forget_scores(self, carried: Sequence[int]) -> None:
        """The estimator has learned: only the rows that are carried over keep their scores."""
        self._logits = {row: self._logits[row] for row in carried if row in self._logits}

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        return {
            "binary": self.binary,
            "replay": [list(astuple(label)) for label in self.replay],
            "seen": [list(astuple(prediction)) for prediction in self._predictions],
            "beliefs": self.beliefs.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], scores: Mapping[int, tuple[float, ...]]) -> None:
        """`scores`: of the rows that are carried over."""
        self._logits = {row: (mean, spread) for row, (mean, spread) in scores.items()}
        self.binary = state["binary"]
        self.replay = deque((GroupLabel(*label) for label in state["replay"]), maxlen=self.config.replay)
        self._predictions = deque((GroupPrediction(*values) for values in state["seen"]), maxlen=WINDOW)
        self.beliefs.load_state_dict(state["beliefs"])

    def _example(self, label: GroupLabel) -> Example:
        quality = {POLICY: label.quality, SPREAD: label.spread}
        return Example(
            self.prompts[label.row],
            {head: quality[head] for head in self.heads},
            {POLICY: label.token_confidence},
            label.weight,
        )
