"""What is read of a chat."""

from typing import Any

import orjson
import pytest

from depo_gateway.estimator.text import TextConfig, extract_text
from depo_gateway.gateway.openai.chat import CHAT
from depo_gateway.gateway.openai.query import Query, query_of


def chat(**fields: Any) -> Query:
    return query_of(CHAT, fields, orjson.dumps(fields))


def scored(messages: list[Any], **fields: Any) -> tuple[str, str]:
    prompt = chat(model="auto", messages=messages, **fields).prompt
    assert prompt is not None
    return extract_text(TextConfig(), prompt)


def test_the_last_user_turn_is_scored_with_the_conversation_before_it() -> None:
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    assert scored(turns) == ("three", "one\ntwo")


def test_system_developer_and_tool_text_is_never_scored() -> None:
    plain = [{"role": "user", "content": "question"}]
    dressed = [
        {"role": "system", "content": "theorem " * 9999},
        {"role": "developer", "content": "prove"},
        *plain,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": {"name": "f"}}]},
        {"role": "tool", "tool_call_id": "c", "content": "result " * 9999},
        {"role": "function", "name": "f", "content": "result"},
    ]  # fmt: skip
    tools = [{"type": "function", "function": {"name": "f", "description": "hard " * 99}}]
    assert scored(dressed, tools=tools) == scored(plain) == ("question", "")


def test_text_parts_of_arrays_are_scored() -> None:
    parts = [
        {"type": "text", "text": "what is"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "text", "text": "this?"},
        {"type": "text"},
        "stray",
    ]
    assert scored([{"role": "user", "content": parts}]) == ("what is\nthis?", "")


def test_messages_of_odd_shapes_are_the_backends_to_judge() -> None:
    assert scored([{}, {"role": 3, "content": 4}, {"role": "user", "content": {"a": 1}}]) == ("", "")


@pytest.mark.parametrize(
    ("fields", "modalities"),
    [
        ({}, set()),
        ({"tools": []}, set()),
        ({"tools": [{"type": "function"}]}, {"tools"}),
        ({"functions": [{"name": "f"}]}, {"tools"}),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, {"image"}),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, {"audio"}),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "image_url"}, {"type": 3}]}]}, set()),
    ],
)
def test_modalities_beyond_text(fields: dict[str, Any], modalities: set[str]) -> None:
    body = {"model": "auto", "messages": [{"role": "user", "content": "x"}]} | fields
    assert chat(**body).modalities == modalities
