import time

import pytest

from depo_gateway.training.rewards.choice import Option, grade_choice, option_of
from depo_gateway.training.rewards.verdicts import NO_REFERENCE, NOT_READABLE, RIGHT, WRONG
from tests.training.rewards.reported_cases import misgraded


def test_the_kinds_of_fault_that_users_of_graders_report() -> None:
    assert misgraded("choice") == []


@pytest.mark.parametrize(
    ("completion", "reference", "reward"),
    [
        ("B", "B", 1),
        ("b", "B", 1),
        ("it is b", "B", 0),  # a small letter within a sentence is a word
        ("The answer is (b).", "B", 1),
        ("A looks right at first, but the answer is C.", "C", 1),
        ("Answer: **D**", "d", 1),
        ("I'd say E", "A", 0),
        ("It is C)", "C", 1),
        ("", "A", 0),
        ("The answer is Berlin", "B", 0),
        ("The answer is a tricky one to see. Only B fits.", "A", 0),
        ("The answer is a tricky one to see. Only B fits.", "B", 1),
        ("ANSWER: b", "B", 1),
        ("The Answer is **c**.\nA closer look confirms it.", "C", 1),
        ("I choose option d) here", "D", 1),
        ("It starts at 9. The answer is a.m. then, so E", "E", 1),
    ],
)
def test_choice_reads_the_letter_chosen(completion: str, reference: str, reward: float) -> None:
    assert grade_choice(completion, reference).reward == reward


@pytest.mark.parametrize(
    ("reference", "letters", "text"),
    [
        ("C", "C", ""),
        ("(c)", "C", ""),
        ("**C**", "C", ""),
        ("\\boxed{\\text{C}}", "C", ""),
        ("The answer is C", "C", ""),
        ("C. Vitamin D", "C", "Vitamin D"),
        ("(C) 12 m", "C", "12 m"),
        ("D: A big house", "D", "A big house"),
        ("0", "A", "0"),
        ("9", "J", "9"),
        ("A, C", "AC", ""),
        ("ACD", "ACD", ""),
        ("99", None, ""),
        ("A decrease", None, ""),
        ("Vitamins", None, ""),
        ("", None, ""),
    ],
)
def test_a_reference_names_letters_and_perhaps_their_text(reference: str, letters: str | None, text: str) -> None:
    found = option_of(reference)
    assert found == (None if letters is None else Option(frozenset(letters), text))


def test_a_reference_beyond_j_extends_the_letters() -> None:
    assert Option(frozenset("B")).allowed == "ABCDEFGHIJ"
    assert Option(frozenset("L")).allowed == "ABCDEFGHIJKL"
    assert grade_choice("The answer is L.", "L") == RIGHT
    assert grade_choice("The answer is L.", "B") == NOT_READABLE


def test_no_letter_is_not_readable_and_no_label_without_one_in_the_reference() -> None:
    assert grade_choice("I cannot tell.", "I") == grade_choice("<think>A", "A") == NOT_READABLE
    assert grade_choice("A", "a decrease") == NO_REFERENCE
    assert grade_choice("A or B", "A") == WRONG


@pytest.mark.parametrize("piece", ["A ", "A, ", "A or ", "Answer: ", "\\boxed{", "\n", "(", "option ", "not "])
def test_a_text_that_repeats_is_read_in_linear_time(piece: str) -> None:
    begun = time.process_time()
    grade_choice(piece * (50_000 // len(piece)), "C")
    assert time.process_time() - begun < 5  # a quadratic reading takes minutes
