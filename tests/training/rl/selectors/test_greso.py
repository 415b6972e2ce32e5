"""GRESO's arithmetic, against values worked by hand."""

import pytest

from depo_gateway.training.rl.group_labels import GroupLabel
from depo_gateway.training.rl.selection_config import SelectionConfig
from depo_gateway.training.rl.selector import Selector
from depo_gateway.training.rl.selectors.greso import EASY, HARD, MIXED, Greso, kind_of


def label(row: int, passed: int, size: int = 8) -> GroupLabel:
    return GroupLabel(row, passed / size, float(0 < passed < size), None, 1.0, size)


def test_a_group_is_easy_hard_or_mixed() -> None:
    assert [kind_of(label(0, passed)) for passed in (0, 1, 7, 8)] == [HARD, MIXED, MIXED, EASY]


def test_greso_skips_by_the_streak_and_moves_its_exploration_to_the_target() -> None:
    greso = Greso()
    assert greso.skip_probability(0) == 0.0
    # 1 easy, 1 hard of 10: 0.1 is above the easy target 1/12 and below the hard one 1/6
    labels = [label(0, 8), label(1, 0), *(label(2, 4) for _ in range(8))]
    assert greso.learn(labels) == pytest.approx({"explore_easy": 0.49, "explore_hard": 0.51})
    greso.learn(labels)
    assert greso.skip_probability(0) == pytest.approx(1 - 0.48**2)
    assert greso.skip_probability(1) == pytest.approx(1 - 0.52**2)
    greso.learn([label(0, 3)])  # mixed: its streak is over
    assert greso.skip_probability(0) == 0.0
    assert greso.learn([]).keys() == {"explore_easy", "explore_hard"}  # a step without rewards


def test_greso_never_stalls_and_gives_skipped_prompts_a_second_chance() -> None:
    made = Selector([""] * 4, SelectionConfig("greso", warmup_steps=0))
    assert isinstance(made.rule, Greso)
    made.rule.explore = [0.0, 0.0]
    made.rule.learn([label(row, 0) for row in range(4)])
    made.rule.explore = [0.0, 0.0]
    assert sorted(ticket.row for ticket in made.take(4)) == [0, 1, 2, 3]
    half = Selector([""] * 40, SelectionConfig("greso", warmup_steps=0))
    assert isinstance(half.rule, Greso)
    half.rule.streaks = dict.fromkeys(range(40), (HARD, 1))  # each skipped with probability 0.5
    half.take(30)
    assert half.stream.epoch >= 1  # one pass has about 20
