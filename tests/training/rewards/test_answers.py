import pytest

from depo_gateway.training.rewards.answers import answer_part, boxed, formulas, hashed, reference_part, statements


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{3} or rather \boxed{4}", "4"),
        (r"$\boxed{1}$ and $\boxed{2}$", "1, 2"),
        (r"\boxed{7} \boxed{7}", "7"),
        (r"\boxed{\text{It is } \boxed{7}}", "7"),
        (r"\boxed 7", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{unclosed", None),
        (r"use \boxed.", None),
        ("no box", None),
    ],
)
def test_the_last_box(text: str, content: str | None) -> None:
    assert boxed(text) == content


def test_the_part_of_a_text_that_answers() -> None:
    assert answer_part("a <answer> 7 </answer> b") == "7"
    assert answer_part("<answer>6</answer><answer>7") == "7"
    assert answer_part("<final_answer>7</final_answer>") == "7"
    assert answer_part("#### 18\n\nQuestion: next?\n#### 3") == "#### 18"
    assert answer_part("Question: 2+2?\nThe answer is 4") == "Question: 2+2?\nThe answer is 4"


def test_a_reference_in_a_list_of_one() -> None:
    assert reference_part("['34']") == reference_part('["34"]') == reference_part(" 34 ") == "34"
    assert reference_part("['3', '4']") == "['3', '4']"
    assert reference_part("[1, 2]") == "[1, 2]"


def test_the_line_after_the_last_mark() -> None:
    assert hashed("#### 5\nno, #### 6 apples\nsure") == "6 apples"
    assert hashed("####") is None


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("The answer is 5. The answer is 6.", ["6", "5"]),
        ("**Answer:** 7 (see step 2)\nBye", ["7 (see step 2)"]),
        ("Answer:\n\n7", ["7"]),
        ("The final answer to this is: $7$. I hope so", ["$7$"]),
        ("The answer is 1.5 m.", ["1.5 m"]),
        ("The answer is\n\\[\nx = 7\n\\]\nas said", ["\\[\nx = 7\n\\]"]),
        ("The answer is not 5. The answer isn't 6.", []),
        ("答案是12。对", ["12"]),
        ("Die Antwort ist 12", ["12"]),
        ("La réponse est C.", ["C"]),
        ("Ответ: 15", ["15"]),
        ("정답은 C", ["C"]),
        ("answering is hard", []),
    ],
)
def test_what_is_stated_as_the_answer(text: str, stated: list[str]) -> None:
    assert list(statements(text)) == stated


def test_dollars_before_an_amount_are_no_formula() -> None:
    text = "She has $5 and $7, so $x = 12$ or \\(x\\)"
    assert [text[start:end] for start, end in formulas(text)] == ["$x = 12$", "\\(x\\)"]
