import math

import pytest

from depo_gateway.training.rl.group_labels import is_binary, quality_of, spread_of, token_confidence_of

NAN = float("nan")


def test_quality_is_the_mean_over_the_rollouts_that_have_a_reward() -> None:
    assert quality_of((1, 0, 0, 1, 1, 1, 0, 1)) == 5 / 8
    assert quality_of((1, NAN, 0, NAN)) == 0.5
    assert quality_of((NAN, NAN)) is None


def test_quality_is_scaled_from_the_range_of_rewards_and_kept_in_it() -> None:
    assert quality_of((-1, 1, 1, 1), low=-1, high=1) == 0.75
    assert quality_of((3.0, 5.0)) == 1.0


@pytest.mark.parametrize(
    ("rewards", "spread"),
    [
        ((1, 1, 1, 1), 0.0),
        ((0, 0), 0.0),
        ((0, 1), 1.0),
        ((1, 0, 0, 0), 2 * math.sqrt(0.25 * 0.75)),
        ((0.4, 0.6), 0.2),
        ((1, NAN, NAN), 0.0),
        ((NAN,), 0.0),
    ],
)
def test_spread_is_twice_the_standard_deviation(rewards: tuple[float, ...], spread: float) -> None:
    assert spread_of(rewards) == pytest.approx(spread)


def test_binary_rewards_stand_at_the_two_ends() -> None:
    assert is_binary((0, 1, NAN, 1.0))
    assert is_binary((-1, 1), low=-1, high=1)
    assert not is_binary((0, 0.5))


def test_token_confidence_is_clipped_as_in_the_paper() -> None:
    assert token_confidence_of((-0.1, -0.3)) == pytest.approx(math.exp(-0.2))
    assert token_confidence_of((-50.0,)) == 1e-4
    assert token_confidence_of((0.0, 0.0)) == 1 - 1e-4
    assert token_confidence_of((NAN,)) is None
    assert token_confidence_of(()) is None
