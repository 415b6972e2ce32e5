"""Epochs of SGD: batches of equal size."""

import numpy as np
import pytest

from depo_gateway.training.fitting.epoch_fit import equal_batches


@pytest.mark.parametrize("count", [1, 127, 128, 129, 257, 769])
def test_no_batch_is_much_smaller_than_the_others(count: int) -> None:
    batches = equal_batches(count, 128, np.random.default_rng(0))
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= 128
    assert max(sizes) - min(sizes) <= 1
    assert sorted(np.concatenate(batches).tolist()) == list(range(count))
