"""What is read of a completion."""

from typing import Any

import orjson
import pytest

from depo_gateway.gateway.openai.completions import COMPLETIONS
from depo_gateway.gateway.openai.query import query_of


def prompt_of(prompt: Any) -> Any:
    fields = {"model": "auto", "prompt": prompt}
    return query_of(COMPLETIONS, fields, orjson.dumps(fields)).prompt


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("once upon", "once upon"),
        (["once", "upon"], "once\nupon"),
        ("", ""),
        ([""], ""),
        ([1, 2, 3], None),
        ([[1, 2], [3]], None),
        ([], None),
        (None, None),
        ({}, None),
    ],
)
def test_only_text_is_scored(prompt: Any, text: str | None) -> None:
    assert prompt_of(prompt) == text
