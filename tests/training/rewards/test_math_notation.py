from fractions import Fraction

import pytest

from depo_gateway.training.rewards.math_notation import (
    assigned,
    bare_text,
    clock_of,
    elements_of,
    in_base,
    is_equal_to_zero,
    literal_of,
    mathematical,
    modulus_of,
    without_option,
    word_of,
)


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("12", 12),
        (r"\$9{,}500", 9500),
        ("$-3$", -3),
        ("x = 2.50", Fraction(5, 2)),
        (r"1\frac14", Fraction(5, 4)),
        (r"60 \text{ cm}^2", 60),
        ("5.5 km/h", Fraction(11, 2)),
        (r"60^\circ", 60),
        ("12 apples", 12),
        ("US$70", 70),
        ("5x", None),
        (r"2\pi", None),
        (r"3\sqrt{2}", None),
        ("2, 3", None),
        ("1 + 2", None),
        ("5 mod 7", None),
        ("3:45", None),
        ("(1, 2)", None),
        ("none", None),
    ],
)
def test_a_number_alone(answer: str, value: object) -> None:
    found = literal_of(answer)
    assert (None if found is None else found.value) == value


@pytest.mark.parametrize(
    ("answer", "latex"),
    [
        ("10 − 2√5", r"10 - 2\sqrt{5}"),
        ("−1 1/4", r"-(1+\frac{1}{4})"),
        (r"1\ 1/4", r"(1+\frac{1}{4})"),
        ("1.5e3", r"1.5 \cdot 10^{3}"),
        (r"\$12", "12"),
        ("$x$", "x"),
        (r"\[x\]", "x"),
        (r"\color{red}{42}", "{42}"),
        ("sin(pi*x)", r"\sin (\pi *x)"),
        ("x**2", "x^2"),
        (r"\sin 30^\circ", r"\sin(\frac{30\pi}{180})"),
        (r"0.1\overline{6}", r"\frac{15}{90}"),
        (r"\varnothing", r"\emptyset"),
    ],
)
def test_the_latex_that_math_verify_reads(answer: str, latex: str) -> None:
    assert mathematical(answer) == latex


def test_lists_and_what_they_assign() -> None:
    assert elements_of("2, 3") == elements_of("2 or 3") == elements_of(r"2 \text{ and } 3") == ["2", "3"]
    assert elements_of("10,000") == ["10,000"]
    assert elements_of("(1, 2), [3, 4)") == ["(1, 2)", "[3, 4)"]
    assert elements_of("floor") == ["floor"]
    assert assigned("v_{R} = 4") == ("v_{R}", "4")
    assert assigned("4") == ("", "4")


def test_other_notation() -> None:
    assert in_base("1010_2") == in_base("1010_{2}") == ("1010", 2)
    assert in_base("x_2") is None
    assert modulus_of(r"5 \pmod{7}") == modulus_of(r"5 \mod 7") == modulus_of("5 (mod 7)") == "7"
    assert clock_of("6:30 PM") == (6, 30, "p")
    assert clock_of("2:3:4") is None
    assert without_option(r"\text{(D)}\ 7") == "7"
    assert is_equal_to_zero("x + y = 0")
    assert not is_equal_to_zero("x = 0")
    assert bare_text(r"5 \pmod 7") == bare_text(r"5 \mod 7")
    assert bare_text("2 1/2") != bare_text("21/2")


def test_words_are_words() -> None:
    assert word_of(r"\text{East}") == word_of("east.") == "east"
    assert word_of("ACD") == "acd"
    assert word_of("xy") is None
    assert word_of("x+1") is None
