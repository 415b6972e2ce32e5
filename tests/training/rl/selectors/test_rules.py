"""Rules by name and import path, their options, and that every one runs in a Selector and resumes."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from depo_gateway.training.rl.selection_config import SelectionConfig
from depo_gateway.training.rl.selector import Selector
from depo_gateway.training.rl.selectors.band import Band
from depo_gateway.training.rl.selectors.names import RULES, rule_class, rule_of
from depo_gateway.training.rl.tickets import Ticket

TOY = '''
from depo_gateway.training.rl.selectors.rule import Selection, SelectionRule


class Shortest(SelectionRule):
    """The shortest of some candidates."""

    def __init__(self, times=4):
        self.times = times

    def select(self, need, candidates):
        rows = candidates.carried() + candidates.draw(self.times * need)
        rows.sort(key=lambda row: len(candidates.prompts[row]))
        return Selection(rows[:need], rows[need:])


class Elsewhere(SelectionRule):
    def select(self, need, candidates):
        return Selection(range(need))


class Headed(Shortest):
    heads = ("spread",)


def no_rule():
    pass
'''
WITHOUT_ESTIMATOR: Mapping[str, Mapping[str, Any]] = {
    "off": {},
    "greso": {"delta": 0.1},
    "mopps": {},
    "polaris": {"stage_steps": 2, "pass_rates": [0.95, 0.5] * 24},
    "oracle": {"pass_rates": [row % 9 / 8 for row in range(48)], "refresh": 2},
}


@pytest.fixture
def toy(tmp_path: Path) -> str:
    path = tmp_path / "toys.py"
    path.write_text(TOY)
    return str(path)


def test_a_rule_has_a_name_or_an_import_path(toy: str) -> None:
    assert rule_class("band") is Band
    assert rule_class("depo_gateway.training.rl.selectors.band:Band") is Band
    assert rule_class(f"{toy}:Shortest").__name__ == "Shortest"


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("best", {}, "the selection rule 'best' is unknown; use one of off, band, informative, greso"),
        ("TOYS:Gone", {}, "has no 'Gone'"),
        ("TOYS:no_rule", {}, "no_rule is not a SelectionRule"),
        ("TOYS:Headed", {}, r"has heads \('spread',\)"),
        ("mopps", {"dekay": 0.5}, "mopps has no option 'dekay'; did you mean decay?"),
        ("band", {"low": 0.5}, "band has no option 'low'"),  # it is a setting, depo_low
        ("polaris", {}, "polaris requires the option 'stage_steps'"),
        ("polaris", {"stage_steps": 0}, "stage_steps is 0"),
    ],
)
def test_a_mistaken_rule_is_one_sentence(toy: str, rule: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule_of(SelectionConfig(rule.replace("TOYS", toy), options=options))


def run(made: Selector, steps: int) -> list[Ticket]:
    taken: list[Ticket] = []
    for _ in range(steps):
        tickets = made.take(4)
        assert len({ticket.row for ticket in tickets}) == 4
        for ticket in tickets:
            passed = ticket.row % 9
            made.report(ticket, (1.0,) * passed + (0.0,) * (8 - passed))
        made.step()
        taken += tickets
    return taken


@pytest.mark.parametrize("name", WITHOUT_ESTIMATOR)
def test_every_rule_without_an_estimator_runs_and_resumes(name: str) -> None:
    assert WITHOUT_ESTIMATOR.keys() == {name for name, kind in RULES.items() if not kind.heads}

    def make() -> Selector:
        config = SelectionConfig(name, warmup_steps=0, options=WITHOUT_ESTIMATOR[name])
        return Selector([str(row) for row in range(48)], config, seed=2)

    before, after, forgetful = make(), make(), make()
    run(before, 18)
    state = json.loads(json.dumps(before.state_dict(), allow_nan=False))
    expected = run(before, 18)
    after.load_state_dict(state)
    assert run(after, 18) == expected
    if name not in ("off", "oracle"):  # the negative control: the rule's memory and random numbers matter
        forgetful.load_state_dict(
            {**state, "rule": forgetful.rule.state_dict(), "random": forgetful._rng.bit_generator.state}
        )
        assert run(forgetful, 18) != expected


def test_a_toy_rule_is_hosted_with_warm_up_exploration_and_options(toy: str) -> None:
    config = SelectionConfig(f"{toy}:Shortest", warmup_steps=1, explore=0.5, options={"times": 3})
    prompts = ["x" * (row % 7 + 1) for row in range(70)]
    made = Selector(prompts, config, seed=1)
    assert all(ticket.propensity == 1 for ticket in made.take(4))  # the warm-up takes all in their turn
    assert made.take_metrics()["depo/kept"] == 1.0
    made.step()
    tickets = made.take(4)
    assert {len(prompts[ticket.row]) for ticket in tickets if ticket.propensity == 1} <= {1, 2, 3}
    assert any(ticket.propensity == 0.25 for ticket in tickets)  # 2 of 8 rejects at most
    metrics = made.take_metrics()
    assert metrics["depo/explored"] == 2
    assert metrics["depo/kept"] == 2 / (4 + 6)
    assert metrics["depo/scored"] == 0


def test_a_rule_that_chooses_what_is_no_candidate_is_told(toy: str) -> None:
    made = Selector(["text"] * 9, SelectionConfig(f"{toy}:Elsewhere", warmup_steps=0))
    with pytest.raises(ValueError, match="chose row 0, which is no candidate"):
        made.take(2)


def test_a_rule_with_heads_needs_an_estimator() -> None:
    with pytest.raises(ValueError, match="'informative' needs an estimator"):
        Selector(["text"], SelectionConfig.plus())


def test_modules_are_found_in_the_working_directory(toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert rule_class("toys:Shortest").__name__ == rule_class("toys.py:Shortest").__name__
    assert np.isnan(rule_of(SelectionConfig("toys:Shortest")).predicted([1])).all()
