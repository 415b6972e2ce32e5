from collections.abc import Iterator
from contextlib import closing

import pytest

from depo_gateway.training.rewards.verifiers import Grader
from tests.training.rewards.reported_cases import misgraded


@pytest.fixture(scope="module")
def mathematics() -> Iterator[Grader]:
    with closing(Grader("math", deadline_s=20.0)) as grader:
        yield grader


EQUAL = [
    ("18", "18"),
    (r"\boxed{18}", "18"),
    (r"So \boxed{\frac{1}{2}}.", "0.5"),
    ("0.5", r"\frac{1}{2}"),
    ("0.5", "1/2"),
    (r"\boxed{\dfrac{2}{4}}", r"We add them. \[\boxed{\frac12}\]"),
    ("The answer is 1,000.", "1000"),
    (r"\boxed{1{,}000}", "1,000"),
    ("1234567", r"\$1,234,567"),
    ("she pays $18.00", "#### 18"),
    ("42", "She has 6 * 7 = <<6*7=42>>42\n#### 42"),
    ("first 5\n#### 42", "42"),
    (r"\boxed{\frac{1}{\sqrt{2}}}", r"\sqrt{2}/2"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"$\{2, 1\}$", r"\{1,2\}"),
    (r"\boxed{(1, 2)}", "(1,2)"),
    (r"\boxed{[0,1)}", "[0, 1)"),
    (r"\boxed{x=3}", "3"),
    ("1+9=10", "10"),
    (r"\boxed{1+x^2}", "x^2+1"),
    (r"\boxed{1} and \boxed{2}", "1, 2"),
    (r"maybe \boxed{17}, no: \boxed{18}", "18"),
    (r"<think>\boxed{17}</think> The answer is 18", "18"),
    (r"\boxed{\text{no solution}}", "No solution"),
    (r"\boxed{\text{(B)}}", "(B)"),
    (r"\boxed{50\%}", "50"),
    (r"\boxed{3\frac{1}{2}}", "7/2"),
    (r"\boxed{\pi}", r"\pi"),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
]
DIFFERENT = [
    ("17", "18"),
    (r"\boxed{0.33}", r"\frac{1}{3}"),
    (r"\boxed{17} and not 18", "18"),
    (r"\boxed{18} then \boxed{17}", "18"),
    (r"<think>\boxed{18}</think> The answer is 17", "18"),
    ("I got 5 and then 18", "5"),
    (r"\boxed{(2,1)}", "(1,2)"),
    (r"\boxed{\{1,2,3\}}", r"\{1,2\}"),
    (r"\boxed{2}", r"2\sqrt{3}"),
    (r"\boxed{3.14}", r"\pi"),
    (r"\boxed{21/2}", "2 1/2"),
    ("not a number", "2"),
    (r"\boxed{}", "2"),
    (r"\boxed{unclosed", "2"),
    ("", "2"),
    (r"\boxed{\text{NaN}}", "2"),
    (r"\boxed{\infty}", "2"),
    (r"\boxed{x}", "2"),
    ("\x00\ud800", "2"),
]


@pytest.mark.parametrize(("pair", "reward"), [(pair, 1) for pair in EQUAL] + [(pair, 0) for pair in DIFFERENT])
def test_math_compares_answers_not_texts(mathematics: Grader, pair: tuple[str, str], reward: float) -> None:
    assert mathematics.grade([pair]) == [reward]


def test_the_kinds_of_fault_that_users_of_graders_report() -> None:
    assert misgraded("math") == []


def test_numbers_that_math_verify_rounds_are_compared_exactly(mathematics: Grader) -> None:
    wrong = [(r"\boxed{\frac{1}{2^{98}}}", r"\frac{1}{2^{99}}"), (r"\boxed{e^{-40}}", r"e^{-41}")]
    right = [(r"\boxed{\frac{2}{2^{100}}}", r"\frac{1}{2^{99}}"), (r"\boxed{\frac{e}{e^{42}}}", r"e^{-41}")]
    assert mathematics.grade(wrong + right) == [0, 0, 1, 1]


def test_math_grades_a_batch_in_order_and_counts_what_has_no_reference(mathematics: Grader) -> None:
    mathematics.counts()
    pairs = [(rf"\boxed{{{i}}}", rf"\frac{{{2 * i + i % 2}}}{{2}}") for i in range(100)]
    assert mathematics.grade(pairs) == [1 - i % 2 for i in range(100)]
    assert mathematics.grade([("1", ""), ("1", "It is left as an exercise."), ("1", "1")]) == [None, None, 1]
    assert mathematics.counts() == {"graded": 101, "unreadable": 0, "references": 2, "timeouts": 0, "failures": 0}


def test_an_expression_without_end_is_a_timeout_not_a_wrong_answer() -> None:
    with closing(Grader("math", deadline_s=1.0)) as grader:
        assert grader.grade([("2", "2"), (r"\boxed{9^{9^{9^9}}}", "3"), ("3", "3")]) == [1, None, 1]
        assert grader.counts() == {"graded": 2, "unreadable": 0, "references": 0, "timeouts": 1, "failures": 0}
