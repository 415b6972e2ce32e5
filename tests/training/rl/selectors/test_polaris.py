from depo_gateway.training.rl.group_labels import GroupLabel
from depo_gateway.training.rl.selection_config import SelectionConfig
from depo_gateway.training.rl.selector import Selector
from depo_gateway.training.rl.selectors.polaris import Polaris


def label(row: int, passed: int, size: int = 8) -> GroupLabel:
    return GroupLabel(row, passed / size, float(0 < passed < size), None, 1.0, size)


def test_polaris_drops_what_passed_before_and_what_mostly_passes_within_a_stage() -> None:
    options = {"stage_steps": 2, "pass_rates": [1.0, 0.95, 0.9, 0.0, 0.0, 0.0]}
    made = Selector([""] * 6, SelectionConfig("polaris", warmup_steps=0, options=options))
    polaris = made.rule
    assert isinstance(polaris, Polaris)
    assert {ticket.row for ticket in made.take(4)} == {2, 3, 4, 5}
    polaris.learn([label(2, 7), label(3, 8)])
    assert polaris.dropped == {0, 1}
    assert polaris.learn([label(2, 8), label(3, 6)]) == {"dropped": 3.0}  # 15 of 16 = 0.94 and 14 of 16 = 0.88
    assert polaris.dropped == {0, 1, 2}


def test_polaris_goes_on_when_nothing_is_left() -> None:
    made = Selector([""] * 3, SelectionConfig("polaris", warmup_steps=0, options={"stage_steps": 1}))
    assert isinstance(made.rule, Polaris)
    made.rule.drop({0: 1.0, 1: 1.0, 2: 1.0})
    assert sorted(ticket.row for ticket in made.take(3)) == [0, 1, 2]
