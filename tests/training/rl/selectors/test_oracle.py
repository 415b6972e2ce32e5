"""The oracle, and the pass rates that rules are given from outside."""

from pathlib import Path

import pytest

from depo_gateway.training.rl.selection_config import SelectionConfig
from depo_gateway.training.rl.selector import Selector
from depo_gateway.training.rl.selectors.oracle import Oracle
from depo_gateway.training.rl.selectors.pass_rates import pass_rates_from


def test_the_oracle_keeps_prompts_more_likely_than_not_to_be_informative() -> None:
    rates = [1.0, 0.0, 1 / 8, 7 / 8]  # 1 - (7/8)^8 - (1/8)^8 = 0.66
    made = Selector([""] * 4, SelectionConfig("oracle"), rule=Oracle(lambda: rates, 8, refresh=1))
    made.steps = 100  # past the warm-up
    tickets = made.take(2)
    assert sorted(ticket.row for ticket in tickets) == [2, 3]
    assert sorted(ticket.predicted for ticket in tickets) == [1 / 8, 7 / 8]
    for ticket in tickets:
        made.report(ticket, (1.0, 0.0) * 4)
    rates[2], rates[0] = 1.0, 0.5
    made.step()
    assert sorted(ticket.row for ticket in made.take(2)) == [0, 3]


def test_pass_rates_come_from_numbers_a_function_or_its_import_path(tmp_path: Path) -> None:
    (tmp_path / "measured.py").write_text("def rates():\n    return [0.0, 0.5]\n")
    for source in ([0.0, 0.5], lambda: [0.0, 0.5], f"{tmp_path}/measured.py:rates"):
        assert pass_rates_from(source, 2).tolist() == [0.0, 0.5]
    for wrong in ([0.5], [0.5, 1.5], [0.5, float("nan")]):
        with pytest.raises(ValueError, match="pass_rates must be 2 numbers between 0 and 1"):
            pass_rates_from(wrong, 2)
