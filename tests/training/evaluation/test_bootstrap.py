import numpy as np
import pytest

from depo_gateway.training.evaluation.bootstrap import draw_count_matrix, draw_counts, percentile_interval


def test_each_resample_draws_as_many_units_as_there_are() -> None:
    one_by_one = np.stack(list(draw_counts(50, 200, np.random.default_rng(0))))
    at_once = draw_count_matrix(50, 200, np.random.default_rng(0))
    for counts in (one_by_one, at_once):
        assert counts.shape == (200, 50)
        assert (counts.sum(1) == 50).all()
        assert counts.mean(0) == pytest.approx(np.ones(50), abs=0.3)
        assert counts.var() == pytest.approx(1 - 1 / 50, abs=0.1)  # binomial


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = []
    for _ in range(300):
        values = generator.normal(size=100)
        low, high = percentile_interval(draw_count_matrix(100, 300, generator) @ values / 100)
        hits.append(low <= 0 <= high)
    assert 0.91 < np.mean(hits) < 0.98


def test_percentiles_and_draws_that_are_no_number() -> None:
    draws = np.arange(101.0)
    assert percentile_interval(draws) == pytest.approx((2.5, 97.5))
    assert percentile_interval(draws, tail_percent=10) == pytest.approx((10, 90))
    draws[0] = np.nan
    assert percentile_interval(draws, tail_percent=0) == (1, 100)
    assert np.isnan(percentile_interval(np.full(3, np.nan))).all()
