"""The order in which a selection goes through the data set."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class PromptStream:
    """Endless passes over `size` rows, each in a new random order; (epoch, cursor) is the position."""

    size: int
    seed: int
    epoch: int = 0
    cursor: int = 0
    _order: list[int] = field(default_factory=list)
    _ordered: int = -1  # the epoch that _order belongs to

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
