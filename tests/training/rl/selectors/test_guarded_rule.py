"""A rule's mistakes are one sentence that names the rule; a sloppy answer that is clear is put in order."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from depo_gateway.training.rl.metrics import DEPO_METRICS, LOST_REWARDS, PARTS
from depo_gateway.training.rl.selection_config import SelectionConfig
from depo_gateway.training.rl.selector import Selector
from depo_gateway.training.rl.selectors.guarded_rule import TAKEN_METRICS, SelectionRuleError
from depo_gateway.training.rl.selectors.rule import Selection, SelectionRule


class Plain(SelectionRule):
    """A rule whose methods a test replaces."""

    def select(self, need: int, candidates: Any) -> Any:
        return Selection(candidates.draw(need))


def selector(**methods: Callable[..., Any]) -> Selector:
    kind = type("Mine", (Plain,), methods)
    return Selector(["text"] * 32, SelectionConfig("mine.py:Mine", group_size=2), rule=kind())


def generation(made: Selector) -> dict[str, float]:
    for ticket in made.take(4):
        made.report(ticket, (1.0, 0.0))
    return made.step()


@pytest.mark.parametrize(
    ("method", "function", "message"),
    [
        ("select", lambda self, need, c: c.draw(need), r"select\(\) must return a Selection, not list"),
        ("select", lambda self, need, c: Selection(["a"]), r"select\(\) raised TypeError: 'str' object"),
        ("select", lambda self, need, c: {}["gone"], r"select\(\) raised KeyError: 'gone'$"),
        ("select", lambda self, need, c: Selection([31, 30]), r"select\(\) chose row 30, which is no candidate"),
        ("select", lambda self, need, c: c.pass_rates(c.draw(need)), r"scores need an estimator: .* name its heads"),
        ("predicted", lambda self, rows: [0.5], r"predicted\(\) must return one number a row: 4, not 1"),
        ("learn", lambda self, labels: None, r"learn\(\) must return a mapping of metrics, not NoneType"),
        ("learn", lambda self, labels: {"x": "high"}, r"learn\(\) raised ValueError: could not convert"),
        ("learn", lambda self, labels: {"kept": 1.0}, "a metric 'kept', but depo/kept exists already; rename it"),
        ("learn", lambda self, labels: {"loss_mine": 1.0}, "depo/loss_mine exists already"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_rule(method: str, function: Callable[..., Any], message: str) -> None:
    made = selector(**{method: function})
    with pytest.raises(SelectionRuleError, match=f"^the selection rule Mine: .*{message}") as raised:
        generation(made)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"rates": {3: 0.5}},
            r"has the key 3 in \['rates'\], which JSON turns into text; store a dict by row as a list",
        ),
        ({3: 0.5}, "has the key 3, which JSON"),
        ({"rows": [1, np.int64(2)]}, r"has a value of type int64 in \['rows'\]\[1\], which is none of JSON's"),
        ([], r"must return a dict, not list"),
    ],
)
def test_a_state_that_json_would_change_is_refused_before_the_run_and_at_each_save(state: Any, message: str) -> None:
    with pytest.raises(SelectionRuleError, match=message):
        selector(state_dict=lambda self: state)
    later: list[Any] = [{}]
    made = selector(state_dict=lambda self: later[-1])
    made.state_dict()
    later.append(state)
    with pytest.raises(SelectionRuleError, match=message):
        made.state_dict()


def test_a_row_that_is_accepted_and_rejected_or_named_twice_gets_one_ticket() -> None:
    def select(self: SelectionRule, need: int, candidates: Any) -> Selection:
        a, b, c, d = candidates.draw(4)
        return Selection([a, a, b, c, d], [a, b, b, a])

    def made(explore: float) -> Selector:
        config = SelectionConfig("mine", group_size=2, explore=explore)
        return Selector(["text"] * 32, config, rule=type("Mine", (Plain,), {"select": select})())

    assert len({ticket.row for ticket in made(explore=1.0).take(3)}) == 3
    few = made(explore=0.0)
    few.take(2)
    assert len(few.state_dict()["carried"]) == 2  # c, d


def test_numpys_integers_are_rows() -> None:
    made = selector(select=lambda self, need, candidates: Selection(np.array(candidates.draw(need))))
    made.take(3)
    assert json.loads(json.dumps(made.state_dict()))["tickets"]["out"]


def test_every_metric_of_depos_own_is_taken() -> None:
    shown = {name.removeprefix("depo/") for name in (*DEPO_METRICS, *PARTS, *LOST_REWARDS)}
    assert shown <= TAKEN_METRICS
    made = Selector(["text"] * 32, SelectionConfig("mopps", group_size=2))
    assert {name.removeprefix("depo/") for name in generation(made)} <= TAKEN_METRICS


def test_savings_are_only_estimated_for_rules_that_have_rejects() -> None:
    for name, shown in (("mopps", True), ("greso", False)):
        made = Selector(["text"] * 32, SelectionConfig(name, group_size=2))
        assert ("depo/rollouts_saved_estimate" in generation(made)) == shown
