"""How a model's verdict is read."""

import pytest

from depo_gateway.training.judging.rubric import parse_grades


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
