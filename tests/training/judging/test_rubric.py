"""How a model's verdict is read."""

import pytest

from depo_gateway.training.judging.rubric import parse_grades, without_reasoning


@pytest.mark.parametrize(
    ("said", "grades"),
    [
        ('{"first": 7, "second": 2.5}', (7.0, 2.5)),
        ('<think>{"first": 1, "second": 1}</think>\n```json\n{"second": 0, "first": 10}\n```', (10.0, 0.0)),
        ('{"first": 11, "second": 2}', None),
        ('{"first": -1, "second": 2}', None),
        ('{"first": "7", "second": 2}', None),
        ('{"first": true, "second": 2}', None),
        ('{"first": NaN, "second": 2}', None),
        ('{"first": 7}', None),
        ('{"first": 7, "second": 2, "why": ""}', None),
        ('The verdict: {"first": 7, "second": 2}', None),
        ('{"first": 7, "second": 2} {"first": 0, "second": 10}', None),
        ("[7, 2]", None),
        ("", None),
        ("[" * 100_000, None),
    ],
)
def test_a_verdict_is_read_strictly(said: str, grades: tuple[float, float] | None) -> None:
    assert parse_grades(said) == grades


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>5?</think>\n 6", "6"),
        ("5?</think>6", "6"),  # the chat template opened it
        ("<think>5? </think> no, <think>6?</think>7", "7"),
        ("<think>5, or", ""),
        ("<|channel|>analysis<|message|>5?<|end|><|channel|>final<|message|>6", "6"),
        ("Write <think> before and </think> after it.", "Write <think> before and </think> after it."),
        ("Use `<analysis>` here:\n<analysis>x", "Use `<analysis>` here:\n<analysis>x"),
        ("<p>Hello</p>", "<p>Hello</p>"),
        ("A <p> then?</think>6", "6"),
        ("  ", ""),
    ],
)
def test_an_answer_is_what_follows_the_model_s_own_reasoning(text: str, answer: str) -> None:
    assert without_reasoning(text) == answer
