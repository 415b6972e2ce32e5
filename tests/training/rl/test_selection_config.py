"""The settings of a selection."""

from dataclasses import replace

import pytest

from depo_gateway.training.rl.selection_config import SelectionConfig


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"low": 0.9}, "band is 0.9 to 0.85"),
        ({"explore": 1.5}, "explore is 1.5"),
        ({"group_size": 1}, "group_size is 1"),
        ({"reward_low": 1.0}, "reward_low is 1.0; it must be below reward_high"),
        ({"candidates": float("nan")}, "candidates is nan"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(SelectionConfig(), **change)  # type: ignore[arg-type]
