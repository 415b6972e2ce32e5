"""Settings of a refresh: nonsense is refused."""

import pytest

from depo_gateway.training.online.refresh_config import GateConfig, RefreshConfig


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="min_labels is 5 and must be at least 20"):
        RefreshConfig(min_labels=5)
    with pytest.raises(ValueError, match="spread is 2 and must be between 0 and 1"):
        GateConfig(spread=2.0)
