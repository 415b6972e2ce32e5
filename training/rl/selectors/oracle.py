"""A selection that knows the true pass rates: the upper limit that other rules are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from depo_gateway.estimator.arrays import Array
from depo_gateway.training.rl.candidates import Candidates
from depo_gateway.training.rl.group_labels import GroupLabel
from depo_gateway.training.rl.pass_rate_belief import nonzero_advantage
from depo_gateway.training.rl.selectors.pass_rates import PassRates, pass_rates_from
from depo_gateway.training.rl.selectors.rule import Selection, SelectionRule


class Oracle(SelectionRule):
    """Keeps a prompt if its rollouts are more likely to differ than not.

    Args:
        pass_rates: of the current policy by row, or a function that measures them.
        refresh: generations after which the rates are read again.
    """

    settings = ("group_size",)

    def __init__(self, pass_rates: PassRates, group_size: int = 8, refresh: int = 32) -> None:
        self.pass_rates, self.group_size, self.refresh = pass_rates, group_size, refresh
        self.steps = self.size = 0
        self.rates_P: Array = np.zeros(0)

    def select(self, need: int, candidates: Candidates) -> Selection:
        if not self.size:
            self.size = len(candidates.prompts)
            self._read()
        worth_P = nonzero_advantage(self.rates_P, self.group_size)
        return Selection(candidates.draw_where(lambda row: bool(worth_P[row] >= 0.5), need))

    def predicted(self, rows: Sequence[int]) -> Sequence[float]:
        rates: list[float] = self.rates_P[list(rows)].tolist()
        return rates

    def learn(self, labels: Sequence[GroupLabel]) -> Mapping[str, float]:
        self.steps += 1
        if self.size and self.steps % self.refresh == 0:
            self._read()
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "rates": self.rates_P.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.rates_P = state["steps"], np.array(state["rates"])
        self.size = len(self.rates_P)

    def _read(self) -> None:
        self.rates_P = pass_rates_from(self.pass_rates, self.size)
