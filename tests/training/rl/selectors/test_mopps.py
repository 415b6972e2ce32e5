"""MoPPS's posterior, against values worked by hand."""

import pytest

from depo_gateway.training.rl.group_labels import GroupLabel
from depo_gateway.training.rl.selection_config import SelectionConfig
from depo_gateway.training.rl.selector import Selector
from depo_gateway.training.rl.selectors.mopps import Mopps


def label(row: int, passed: int, size: int = 8) -> GroupLabel:
    return GroupLabel(row, passed / size, float(0 < passed < size), None, 1.0, size)


def test_mopps_updates_its_posterior_and_takes_the_draws_nearest_to_a_half() -> None:
    made = Selector([""] * 4, SelectionConfig("mopps", warmup_steps=0, options={"candidates": 2.0}))
    mopps = made.rule
    assert isinstance(mopps, Mopps)
    mopps.learn([label(0, 6)])
    assert mopps.posteriors[0] == (7.0, 3.0)  # 0.5 * 1 + 0.5 * 1 + 6; the same + 2
    mopps.learn([label(0, 8)])
    assert mopps.posteriors[0] == (12.0, 2.0)  # 3.5 + 0.5 + 8; 1.5 + 0.5 + 0
    mopps.posteriors = {0: (1e6, 1e6), 1: (1.0, 1e6), 2: (1e6, 1e6), 3: (1.0, 1e6)}
    tickets = made.take(2)
    assert sorted(ticket.row for ticket in tickets) == [0, 2]
    assert [ticket.predicted for ticket in tickets] == pytest.approx([0.5, 0.5])


def test_more_candidates_than_prompts_are_no_obstacle() -> None:
    made = Selector([""] * 6, SelectionConfig("mopps", warmup_steps=0))  # would rank 16
    assert len({ticket.row for ticket in made.take(4)}) == 4
