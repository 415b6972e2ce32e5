import pytest

from training.rewards import VERIFIERS, choice, exact, last_number, number, verifier


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
        ("7", "no digits", 0),
        ("", "0", 0),
        ("v2 is version 3.", "3", 1),
    ],
)
def test_number_compares_the_last_numbers(completion: str, reference: str, reward: float) -> None:
    assert number(completion, reference) == reward


def test_last_number_of_a_long_digit_string_is_exact() -> None:
    assert str(last_number("9" * 40)) == "9" * 40


@pytest.mark.parametrize(
    ("completion", "reference", "reward"),
    [
        ("B", "B", 1),
        ("b", "B", 0),  # a lone small letter is a word in English
        ("The answer is (b).", "B", 1),
        ("A looks right at first, but the answer is C.", "C", 1),
        ("Answer: **D**", "d", 1),
        ("I'd say E", "A", 0),
        ("It is C)", "C", 1),
        ("", "A", 0),
        ("The answer is Berlin", "B", 0),
    ],
)
def test_choice_reads_the_letter_chosen(completion: str, reference: str, reward: float) -> None:
    assert choice(completion, reference) == reward


def test_exact_is_blind_to_case_space_and_outer_punctuation() -> None:
    assert exact("  The  Nile.\n", "the nile") == 1
    assert exact("The Nile river", "the nile") == 0


def test_a_verifier_is_found_by_name_and_an_unknown_one_names_those_there_are() -> None:
    assert verifier("number") is number
    with pytest.raises(ValueError, match="unknown verifier 'math': known are exact, number, choice"):
        verifier("math")
    assert set(VERIFIERS) == {"exact", "number", "choice"}
