"""MoPPS (arXiv 2507.04632): a Beta posterior of each prompt's pass rate; Thompson draws nearest to one half win."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from depo_gateway.training.rl.candidates import Candidates
from depo_gateway.training.rl.group_labels import GroupLabel
from depo_gateway.training.rl.selectors.rule import Selection, SelectionRule

PRIOR = (1.0, 1.0)


class Mopps(SelectionRule):
    """Draws a pass rate from each candidate's posterior and takes those nearest to `target`.

    After s of k rollouts pass: a <- d a + (1 - d) a0 + s, b <- d b + (1 - d) b0 + k - s, with a0 = b0 = 1.
    """

    reads = ("explore",)

    def __init__(self, decay: float = 0.5, candidates: float = 4.0, target: float = 0.5) -> None:
        self.decay, self.candidates, self.target = decay, candidates, target
        self.posteriors: dict[int, tuple[float, float]] = {}  # row -> a, b

    def select(self, need: int, candidates: Candidates) -> Selection:
        rows = candidates.draw_where(lambda row: True, round(need * self.candidates))
        a_P, b_P = np.array([self.posteriors.get(row, PRIOR) for row in rows]).reshape(-1, 2).T
        distance_P = (candidates.rng.beta(a_P, b_P) - self.target) ** 2
        ranked = [rows[place] for place in np.argsort(distance_P, kind="stable")]
        return Selection(ranked[:need], ranked[need:])

    def predicted(self, rows: Sequence[int]) -> Sequence[float]:
        posteriors = (self.posteriors.get(row, PRIOR) for row in rows)
        return [a / (a + b) for a, b in posteriors]

    def learn(self, labels: Sequence[GroupLabel]) -> Mapping[str, float]:
        for label in labels:
            a, b = self.posteriors.get(label.row, PRIOR)
            passed, decay = label.quality * label.count, self.decay
            self.posteriors[label.row] = (
                decay * a + (1 - decay) * PRIOR[0] + passed,
                decay * b + (1 - decay) * PRIOR[1] + label.count - passed,
            )
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"posteriors": [[row, *posterior] for row, posterior in self.posteriors.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.posteriors = {row: (a, b) for row, a, b in state["posteriors"]}
