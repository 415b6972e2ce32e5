import time
from fractions import Fraction

import pytest

from depo_gateway.training.rewards.number import Number, grade_number, number_of, numbers_in
from depo_gateway.training.rewards.verdicts import NO_REFERENCE, NOT_READABLE
from tests.training.rewards.reported_cases import misgraded


def test_the_kinds_of_fault_that_users_of_graders_report() -> None:
    assert misgraded("number") == []


@pytest.mark.parametrize(
    ("completion", "reference", "reward"),
    [
        ("3+4=7;7*9=3;3-2=1", "1", 1),
        ("3+4=7;7*9=3;3-2=2", "1", 0),
        ("3+4=7;7-3", "3", 1),  # a minus between operands is no sign
        ("so x = -3", "-3", 1),
        ("so x=-3.", "-3", 1),
        ("The answer is **1,234.50**.", "1234.5", 1),
        ("$18.00", "18", 1),
        ("#### 42", "She has 6 * 7 = <<6*7=42>>42\n#### 42", 1),
        ("no digits", "1", 0),
        ("7", "no digits", None),
        ("", "0", 0),
        ("v2 is version 3.", "3", 1),
        ("it is .5", "0.5", 1),
        ("x = -.5.", "-0.5", 1),
        ("3-.5", ".5", 1),
        ("3 and then...5", "3", 1),
    ],
)
def test_number_compares_the_last_numbers(completion: str, reference: str, reward: float | None) -> None:
    assert grade_number(completion, reference).reward == reward


def values(text: str) -> list[object]:
    return [number.value for number in numbers_in(text)]


def test_every_number_of_a_text_is_read() -> None:
    assert values("12 m/s^2, then -3 and 1,234.5 or 1 000 000") == [12, -3, Fraction("1234.5"), 1_000_000]
    assert values("H2O at v2, 10-15, 7 - 3, (-4), x_1") == [10, 15, 7, 3, -4]
    assert values("2 1/2, 3/4, 2^{10}, 6.02e23, 1.5 x 10^-3") == [
        Fraction(5, 2),
        Fraction(3, 4),
        1024,
        602 * 10**21,
        Fraction(15, 10**4),
    ]
    assert values("3:45 on 2024-05-01") == [(3, 45), (2024, 5, 1)]
    assert values("1/0, 5 2/0, 10^99999, 0^-1, 1e99999") == []


def test_a_long_number_is_exact_and_one_too_long_is_not_read() -> None:
    long = number_of("9" * 40)
    assert long is not None
    assert long.value == 10**40 - 1
    assert number_of("9" * 5000) is None
    assert number_of("1" + " 2" * 500 + "9" * 300) is not None  # the last number is longer than the part read first


def test_percent_and_its_value_are_equal_but_not_percents_of_other_size() -> None:
    percent, hundredth = Number(Fraction(20), Fraction(1, 100)), Number(Fraction(2, 10), Fraction(1, 100))
    assert percent.equals(Number(Fraction(20)))
    assert Number(Fraction(1, 5)).equals(percent)
    assert not percent.equals(hundredth)
    assert not hundredth.equals(percent)


def test_a_fine_decimal_may_stand_for_a_fraction_only() -> None:
    assert grade_number("0.333333", "1/3").reward == grade_number("1/3", "0.333333").reward == 1
    for completion, reference in (
        ("0.33333", "1/3"),
        ("0.333334999", "1/3"),
        ("3.0000001", "3"),
        ("0.3333331", "0.333333"),
    ):
        assert grade_number(completion, reference).reward == 0


def test_no_number_is_not_readable_and_no_label_without_one_in_the_reference() -> None:
    assert grade_number("none", "5") == grade_number("<think>5", "5") == NOT_READABLE
    assert grade_number("5", "none") == NO_REFERENCE


@pytest.mark.parametrize("piece", ["1,", "1 ", "-", "answer is ", "\\boxed{", "\nQ:", "\n", "1/", "#### ", "**"])
def test_a_text_that_repeats_is_read_in_linear_time(piece: str) -> None:
    begun = time.process_time()
    grade_number(piece * (50_000 // len(piece)), "5")
    assert time.process_time() - begun < 5  # a quadratic reading takes minutes
