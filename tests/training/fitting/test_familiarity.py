"""The bounds of familiarity: weighted quantiles of held-out distances, and the pools' means."""

import numpy as np
import pytest

from depo_gateway.training.fitting.familiarity import FAR, NEAR, familiarity_of, pool_means, weighted_quantiles


def test_bounds_are_quantiles_by_weight() -> None:
    distances = np.arange(100.0)
    labels = np.column_stack([np.tile([0.0, 1.0], 50), np.full(100, np.nan)])
    even = familiarity_of(distances, labels, np.ones(100))
    assert (even.near, even.far) == (100 * NEAR - 1, 100 * FAR - 1)
    assert even.means == (0.5, 0.5)
    first = np.where(distances < 50, 1.0, 0.0)  # the others have no weight
    assert familiarity_of(distances, labels, first).far < 50
    assert weighted_quantiles(np.array([3.0]), np.array([1.0]), (0.5, 1.0)) == (3.0, 3.0)


def test_means_stay_between_0_and_1() -> None:
    labels = np.array([[1.0, 0.0], [1.0, np.nan]])
    assert pool_means(labels, np.ones(2)) == pytest.approx((0.99, 0.01))
