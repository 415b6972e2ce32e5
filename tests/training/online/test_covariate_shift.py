"""Old labels weigh less after a switch of traffic, and only then."""

import numpy as np

from depo_gateway.training.online.covariate_shift import FEWEST_PROMPTS, LEAST_WEIGHT, importance_weights


def drawn(count: int, mean: float, seed: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    return np.random.default_rng(seed).normal(mean, 1.0, (count, 12))


def test_one_stream_keeps_all_its_labels() -> None:
    assert (importance_weights(drawn(1200, 0.0, 1)) == 1).all()


def test_after_a_switch_only_the_newest_count_in_full() -> None:
    weights = importance_weights(np.concatenate([drawn(900, 0.0, 1), drawn(300, 2.0, 2)]))
    assert (weights[-250:] == 1).all()
    assert weights[:900].mean() < LEAST_WEIGHT + 0.02


def test_what_looks_like_the_newest_counts_more_than_what_does_not() -> None:
    other, same, new = drawn(600, 0.0, 1), drawn(300, 3.0, 2), drawn(300, 3.0, 3)
    weights = importance_weights(np.concatenate([other, same, new]))
    assert weights[600:900].mean() > 2 * weights[:600].mean()


def test_with_few_prompts_all_weights_are_one() -> None:
    few = 4 * FEWEST_PROMPTS - 1
    assert (importance_weights(np.concatenate([drawn(few - 40, 0.0, 1), drawn(40, 5.0, 2)])) == 1).all()


def test_a_dimension_that_never_varies_is_no_harm() -> None:
    embeddings = drawn(800, 0.0, 1)
    embeddings[:, 3] = 7.0
    assert np.isfinite(importance_weights(embeddings)).all()
