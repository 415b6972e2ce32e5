"""Settings of how traffic is weighed: nonsense is refused."""

import pytest

from depo_gateway.training.outcomes.traffic_config import TrafficConfig


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"clip": 0.5}, "clip is 0.5 and must be at least 1"),
        ({"key_share": 0.0}, "key_share is 0 and must be between 0.01 and 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrafficConfig(**settings)
