import pytest

from depo_gateway.training.rewards.option_letters import letters_at, letters_within

LETTERS = "ABCDEFGHIJ"


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("(B) text", "B"),
        ("**C**", "C"),
        ("option d)", "D"),
        ("c", "C"),
        ("A because", "A"),
        ("A, B or C", "ABC"),
        ("A B C D", "ABCD"),
        ("ACD", "ACD"),
        ("B, and D is wrong", "B"),
        ("probably the option E", "E"),
        ("A decrease", None),
        ("I think", None),
        ("E = mc^2", None),
        ("CAB", None),
        ("Berlin", None),
        ("a.m.", None),
        ("K", None),
        ("", None),
    ],
)
def test_letters_where_an_answer_is_stated(text: str, letters: str | None) -> None:
    read = letters_at(text, 0, LETTERS)
    assert (read[0] if read else None) == (frozenset(letters) if letters else None)


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("So we take B", "B"),
        ("It is not B but D.", "D"),
        ("Either B or C.", "BC"),
        ("take vitamin C, so D", "D"),
        ("Vitamin C", None),
        ("I do not know", None),
        ("A lot of it", None),
        ("E = mc^2", None),
    ],
)
def test_the_last_letters_of_a_text(text: str, letters: str | None) -> None:
    assert letters_within(text, LETTERS) == (frozenset(letters) if letters else None)
