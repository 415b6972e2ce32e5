"""What a selection rule sees when prompts are chosen: candidates to ask for, and what is known of each.

Shapes: P prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from depo_gateway.estimator.arrays import Array
from depo_gateway.training.rl.prompt_estimates import PromptEstimates
from depo_gateway.training.rl.prompt_stream import PromptStream
from depo_gateway.training.rl.selection_config import SelectionConfig


class Candidates:
    """The prompts of one choice, by row: none that has a ticket, none twice.

    `prompts`: their texts. `step`: generations learned from. `rng`: random numbers that a resumed run continues.
    """

    def __init__(
        self,
        estimates: PromptEstimates,
        config: SelectionConfig,
        stream: PromptStream,
        carried: Sequence[int],
        excluded: set[int],
        step: int,
        rng: np.random.Generator,
    ) -> None:
        self.prompts, self.config, self.step, self.rng = estimates.prompts, config, step, rng
        self.offered: dict[int, None] = {}  # every row returned so far
        self.scored: set[int] = set()
        self.drawn = 0  # rows read from the stream, repeated ones included
        self._carried = carried
        self._estimates, self._stream, self._excluded = estimates, stream, excluded

    def carried(self) -> list[int]:
        """Rows accepted by earlier choices that had enough without them."""
        rows, self._carried = self._new(self._carried), []
        return rows

    def draw(self, count: int) -> list[int]:
        """The new ones of the stream's next `count` rows."""
        self.drawn += count
        return self._new(self._stream.draw(count))

    def draw_where(self, admits: Callable[[int], bool], count: int) -> list[int]:
        """`count` rows that `admits` accepts: carried over, then the stream's, of at most two passes over the data."""
        rows = dict.fromkeys(row for row in self.carried() if admits(row))
        before = self._excluded | set(self.offered)
        for _ in range(2 * self._stream.size):
            if len(rows) >= count:
                break
            self.drawn += 1
            (row,) = self._stream.draw(1)
            if row not in before and row not in rows:
                self.offered[row] = None
                if admits(row):
                    rows[row] = None
        return list(rows)

    def limit(self, need: int) -> int:
        """The most prompts that a rule should read from the stream: refill_cap times `need`, or the data set once."""
        return round(self.config.refill_cap * need) or len(self.prompts)

    def logits(self, rows: Sequence[int]) -> Array:
        """The estimator's scores (P, 2): of the mean reward, and of its spread (NaN without such a head)."""
        if not self._estimates.heads:
            raise ValueError('scores need an estimator: the class must name its heads, such as heads = ("policy",)')
        self.scored.update(rows)
        return self._estimates.score(rows)

    def pass_rates(self, rows: Sequence[int]) -> Array:
        """The estimator's predictions (P,) of the mean reward, calibrated where that is switched on."""
        return self._estimates.pass_rates(self.logits(rows)[:, 0])

    def worth(self, rows: Sequence[int]) -> Array:
        """The predicted probability (P,) of a non-zero advantage or, of graded rewards, the spread.

        A prompt's own past outcomes count where `history_half_life` is set.
        """
        return self._estimates.worth(rows, self.logits(rows), self.step)

    def worth_threshold(self) -> float:
        """The worth from which a prompt is good enough."""
        return self._estimates.worth_threshold()

    def _new(self, rows: Sequence[int]) -> list[int]:
        new = [row for row in dict.fromkeys(rows) if row not in self._excluded and row not in self.offered]
        self.offered |= dict.fromkeys(new)
        return new
