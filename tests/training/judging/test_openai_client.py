"""Retries, their reasons, and how replies and errors are read."""

import asyncio

import aiohttp
import pytest

from depo_gateway.training.judging import openai_client
from depo_gateway.training.judging.openai_client import (
    AttemptError,
    HttpReply,
    NoAnswerError,
    error_text,
    post_json,
    retry,
    together,
)
from tests.training.fake_vllm import vllm


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts, which take no time here."""
    found: list[float] = []
    sleep = asyncio.sleep

    async def at_once(seconds: float) -> None:
        found.append(seconds)
        await sleep(0)

    monkeypatch.setattr(openai_client.asyncio, "sleep", at_once)
    return found


async def test_it_tries_again_until_an_attempt_succeeds_with_doubled_waits(waits: list[float]) -> None:
    failures = iter([AttemptError("answers 503"), aiohttp.ClientError("reset"), TimeoutError(), ValueError("no JSON")])

    async def attempt() -> str:
        for failure in failures:
            raise failure
        return "done"

    assert await retry(attempt, 5) == "done"
    assert [wait / 0.5 for wait in waits] == pytest.approx([1, 2, 4, 8], rel=0.21)


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (AttemptError("answers 503 busy"), "answers 503 busy"),
        (TimeoutError(), r"fails \(TimeoutError\)"),
        (aiohttp.ClientError("reset"), r"fails \(reset\)"),
    ],
)
async def test_the_last_failure_is_the_reason(failure: Exception, reason: str, waits: list[float]) -> None:
    async def attempt() -> None:
        raise failure

    with pytest.raises(NoAnswerError, match=f"^{reason}$"):
        await retry(attempt, 3)
    assert len(waits) == 2


async def test_other_exceptions_are_not_tried_again(waits: list[float]) -> None:
    async def attempt() -> None:
        raise KeyError("a defect")

    with pytest.raises(KeyError):
        await retry(attempt, 3)
    assert waits == []


async def test_a_reply_is_read_up_to_a_limit() -> None:
    with vllm(lambda body: (200, b"x" * 100_000)) as server:
        async with aiohttp.ClientSession() as session:
            reply = await post_json(session, server.url, {"a": 1}, {"Authorization": "Bearer k"}, limit=1000)
            assert (reply.status, reply.content) == (200, b"x" * 1000)
            assert len((await post_json(session, server.url, {}, {})).content) == 100_000
    assert (server.bodies[0], server.keys[0]) == ({"a": 1}, "Bearer k")


async def test_together_waits_for_all_before_it_fails() -> None:
    ended: list[int] = []

    async def call(number: int) -> int:
        for _ in range(number):
            await asyncio.sleep(0)
        ended.append(number)
        if number == 1:
            raise NoAnswerError("down")
        return number

    with pytest.raises(NoAnswerError):
        await together(call(1), call(3))
    assert ended == [1, 3]


def test_json_that_is_none_is_text_or_an_error() -> None:
    for content in (b"plain", b"[" * 100_000, b"\xff"):
        with pytest.raises(ValueError, match=r"."):
            HttpReply(200, content).json()
        assert isinstance(HttpReply(200, content).json_or_text(), str)


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ({"error": {"message": "too\n long"}}, "too long"),
        ({"error": "no"}, "no"),
        ({"message": "odd"}, "odd"),
        ("plain", "plain"),
        ("x" * 1000, "x" * 300),
    ],
)
def test_an_error_is_one_line(reply: object, text: str) -> None:
    assert error_text(reply) == text
