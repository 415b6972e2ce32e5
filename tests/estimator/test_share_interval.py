"""The printed interval of a share holds as often as it says."""

import numpy as np
import pytest

from depo_gateway.estimator.share_interval import effective_count, share_interval, share_text


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("count", [50, 200, 700])
def test_it_holds_in_about_95_of_100_samples(share: float, count: int) -> None:
    drawn = np.random.default_rng(0).binomial(count, share, 4000) / count
    holds = [low <= share <= high for low, high in (share_interval(float(one), count) for one in drawn)]
    assert 0.92 <= np.mean(holds) <= 0.98


def test_ends_and_none() -> None:
    assert share_interval(0.0, 100)[0] == 0.0
    assert share_interval(0.0, 100)[1] == pytest.approx(0.037, abs=1e-3)
    for count in range(1, 1000):
        assert share_interval(0.0, count)[0] == 0.0
        assert share_interval(1.0, count)[1] == 1.0
    assert share_interval(0.5, 0) == (0.0, 1.0)
    assert share_text(0.5, 700) == "50% [46, 54]"


def test_weights_count_as_fewer_prompts() -> None:
    assert effective_count(np.ones(10)) == pytest.approx(10)
    assert effective_count(np.array([1.0, 1.0, 0.0, 0.0])) == pytest.approx(2)
    assert effective_count(np.zeros(3)) == 0.0


def test_it_is_the_interval_of_the_literature() -> None:
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I
    assert share_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert share_interval(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
