"""How far verdicts depend on the order of the answers."""

import random

import pytest

from depo_gateway.training.judging.order_effects import OrderEffects, order_effect


@pytest.mark.parametrize(
    ("straight", "swapped", "effect"),
    [
        ((9, 1), (2, 8), "none"),
        ((5, 5), (7, 7), "none"),
        ((9, 1), (9, 1), "first"),
        ((1, 9), (1, 9), "second"),
        ((9, 1), (5, 5), "first"),
        ((5, 5), (3, 4), "second"),
    ],
)
def test_an_order_effect_is_a_winner_that_depends_on_the_order(
    straight: tuple[float, float], swapped: tuple[float, float], effect: str
) -> None:
    assert order_effect(straight, swapped) == effect


def test_a_biased_judge_is_told_from_an_unbiased_one() -> None:
    chance = random.Random(0)
    fair, biased = OrderEffects(), OrderEffects()
    for _ in range(400):
        one, other = chance.uniform(2, 8), chance.uniform(2, 8)
        fair.add((one, other), (other, one))
        biased.add((one + 2, other), (other + 2, one))
    assert fair.flipped == 0
    assert "won 50% [45, 55]" in fair.text()
    assert "+0.0 [+0.0, +0.0] higher" in fair.text()
    assert biased.flipped > 0.4
    assert "+2.0 [+2.0, +2.0] higher" in biased.text()
    assert "use a stronger judge" in biased.text()
    assert OrderEffects().text() == ""
