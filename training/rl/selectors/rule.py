"""The interface of a selection rule; Selector does the rest."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from depo_gateway.training.rl.candidates import Candidates
from depo_gateway.training.rl.group_labels import GroupLabel


@dataclass(frozen=True, slots=True)
class Selection:
    """A rule's answer, rows of the data set.

    The first of `accepted` are rolled out, as many as are needed; the others are carried over to the next choice. If
    too few are accepted, the first of `rejected` fill up, then the next of the stream. Where exploration is switched
    on, a share of `rejected` is rolled out as well.
    """

    accepted: Sequence[int]
    rejected: Sequence[int] = ()  # best first
    scored: int | None = None  # for the metric depo/scored; by default the rows that the estimator scored


class SelectionRule(ABC):
    """Chooses among candidates, and learns from the groups rolled out.

    A subclass needs select() alone. Its constructor's arguments are the rule's options in YAML. Selector does the rest:
    tickets, carrying over, exploring, locking, saving, and that all processes of a run choose alike (so a rule takes
    random numbers from `candidates.rng` only).
    """

    heads: ClassVar[tuple[str, ...]] = ()  # the estimator's heads that it reads: (), ("policy",), ("policy", "spread")
    settings: ClassVar[tuple[str, ...]] = ()  # fields of SelectionConfig that are arguments of the constructor
    # other fields that it uses: "explore" if it returns rejected rows, "refill_cap" if it calls candidates.limit();
    # a setting that the rule does not name is refused
    reads: ClassVar[tuple[str, ...]] = ()
    selective: ClassVar[bool] = True  # False: it leaves no prompt out, and there is nothing to measure

    @abstractmethod
    def select(self, need: int, candidates: Candidates) -> Selection:
        """Choose `need` of the candidates, or more; fewer if there are no more good ones."""

    def predicted(self, rows: Sequence[int]) -> Sequence[float]:
        """The mean rewards that a rule without an estimator predicts; NaN: no prediction."""
        return [math.nan] * len(rows)

    def learn(self, labels: Sequence[GroupLabel]) -> Mapping[str, float]:
        """Learn from the groups of one generation. Returns metrics, which are logged as depo/NAME."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What the rule has learned, as values for JSON.

        JSON turns integer keys into text and tuples into lists: store a dict by row as a list of [row, ...], as Greso
        does.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027  a rule that remembers nothing
        """Continue from state_dict()."""
