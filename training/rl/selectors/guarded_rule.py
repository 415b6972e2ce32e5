"""GuardedRule: checks every answer of a selection rule, which may be a user's class."""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from depo_gateway.training.rl.candidates import Candidates
from depo_gateway.training.rl.group_labels import GroupLabel
from depo_gateway.training.rl.selectors.rule import Selection, SelectionRule

log = logging.getLogger("depo")

# names of the selector's and the trainer's own metrics, after depo/; loss_* are the estimator's
TAKEN_METRICS = frozenset(
    (
        "kept", "scored", "explored", "epoch", "pass_rate", "zero_advantage_share", "zero_advantage_trained",
        "false_reject_rate", "rollouts_saved_estimate", "auroc", "calibration_error", "missing_rewards",
        "reward_timeouts", "reward_failures", "reward_references", "reward_unreadable", "rounds", "completions",
        "seconds_scoring", "seconds_rollout", "seconds_updating",
    )
)  # fmt: skip
LOSS_METRICS = "loss_"


class SelectionRuleError(ValueError):
    """The selection rule raised or gave an invalid answer; the message is one sentence that names the rule."""


class GuardedRule:
    """A rule whose mistakes are raised as SelectionRuleError. `name`: the rule's, as the user wrote it."""

    def __init__(self, rule: SelectionRule, name: str) -> None:
        self.rule, self.name = rule, name

    def select(self, need: int, candidates: Candidates) -> Selection:
        """Rows as plain integers, none twice: a row that is accepted is not among the rejected ones."""
        with self._raising("select"):
            selection = self.rule.select(need, candidates)
            if not isinstance(selection, Selection):
                raise self._error(f"select() must return a Selection, not {type(selection).__name__}")
            accepted = _distinct(selection.accepted)
            rejected = [row for row in _distinct(selection.rejected) if row not in accepted]
        if foreign := {*accepted, *rejected} - candidates.offered.keys():
            raise self._error(f"select() chose row {min(foreign)}, which is no candidate")
        return Selection([*accepted], rejected, selection.scored)

    def predicted(self, rows: Sequence[int]) -> list[float]:
        with self._raising("predicted"):
            means = [float(mean) for mean in self.rule.predicted(rows)]
        if len(means) != len(rows):
            raise self._error(f"predicted() must return one number a row: {len(rows)}, not {len(means)}")
        return means

    def learn(self, labels: Sequence[GroupLabel]) -> dict[str, float]:
        """The rule's metrics, named depo/NAME."""
        with self._raising("learn"):
            metrics = self.rule.learn(labels)
            if not isinstance(metrics, Mapping):
                raise self._error(f"learn() must return a mapping of metrics, not {type(metrics).__name__}")
            values = {str(name): float(value) for name, value in metrics.items()}
        for name in values:
            if name in TAKEN_METRICS or name.startswith(LOSS_METRICS):
                raise self._error(f"learn() returned a metric {name!r}, but depo/{name} exists already; rename it")
        return {f"depo/{name}": value for name, value in values.items()}

    def state_dict(self) -> dict[str, Any]:
        """The rule's state, which JSON returns as it was, apart from tuples."""
        with self._raising("state_dict"):
            state = self.rule.state_dict()
        if not isinstance(state, dict):
            raise self._error(f"state_dict() must return a dict, not {type(state).__name__}")
        if problem := next(_not_json(state), None):
            raise self._error(f"state_dict() {problem}")
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with self._raising("load_state_dict"):
            self.rule.load_state_dict(state)

    def _error(self, what: str) -> SelectionRuleError:
        return SelectionRuleError(f"the selection rule {self.name}: {what}")

    @contextmanager
    def _raising(self, method: str) -> Iterator[None]:
        try:
            yield
        except SelectionRuleError:
            raise
        except Exception as error:  # boundary: the user's code
            log.exception("the selection rule %s raised", self.name)
            message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise self._error(f"{method}() raised {message}") from error


def _distinct(rows: Iterable[int]) -> dict[int, None]:
    return dict.fromkeys(operator.index(row) for row in rows)  # of numpy's integers, too


def _not_json(value: Any, place: str = "") -> Iterator[str]:
    """What of a state JSON does not return as it was: sentences without a subject."""
    where = f" in {place}" if place else ""
    if isinstance(value, dict):
        for key, part in value.items():
            if not isinstance(key, str):
                yield (
                    f"has the key {key!r}{where}, which JSON turns into text; store a dict by row as a list of "
                    "[row, value]"
                )
            yield from _not_json(part, f"{place}[{key!r}]")
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _not_json(part, f"{place}[{number}]")
    elif not (value is None or isinstance(value, str | bool | int | float)):
        yield f"has a value of type {type(value).__name__}{where}, which is none of JSON's"
