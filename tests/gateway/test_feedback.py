"""POST /v1/feedback: whose it may be, what it answers, and that what it acknowledged is never lost."""

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from depo_gateway.estimator.records.store import Store
from depo_gateway.estimator.records.types import FEEDBACK, Labelled
from depo_gateway.gateway import config
from tests.gateway.backend import FakeVllm
from tests.gateway.conftest import Running, StartGateway, settings
from tests.gateway.test_drain import serving
from tests.postgres import Postgres

KILLS = 20


def labelled(url: str) -> list[Labelled]:
    store = Store(url)
    try:
        return store.labelled(100_000)
    finally:
        store.close()


async def score(gateway: Running, request_id: object, value: object, **fields: Any) -> tuple[int, Any]:
    headers = fields.pop("headers", {})
    body = {"request_id": request_id, "score": value, **fields}
    async with gateway.session.post(f"{gateway.url}/v1/feedback", json=body, headers=headers) as answer:
        return answer.status, await answer.json()


@contextlib.asynccontextmanager
async def backends() -> AsyncIterator[tuple[list[FakeVllm], list[FakeVllm]]]:
    async with FakeVllm() as small, FakeVllm() as large:
        yield [small], [large]


async def test_a_score_is_durable_when_it_is_acknowledged_and_overwrites(start: StartGateway, records_url: str) -> None:
    async with backends() as both, start(*both, records={"url": records_url}) as gateway:
        answer = await gateway.chat("easy")
        request_id = answer.headers["x-request-id"]
        status, told = await score(gateway, request_id, 0, comment="no use")  # at once: its record is on its way
        assert (status, told) == (200, {"status": "stored", "request_id": request_id})
        (first,) = labelled(records_url)
        assert (first.record.id, first.record.pool) == (request_id, "small")
        assert (await score(gateway, request_id, 0.75))[0] == 200
        (second,) = labelled(records_url)
        assert await gateway.metric("gateway_feedback_total", outcome="stored") == 2
    (before,), (after,) = first.labels, second.labels
    assert (before.quality, after.quality) == (0.0, 0.75)
    assert (after.pool, after.source) == ("small", FEEDBACK)
    assert after.time > before.time


async def test_feedback_is_for_the_callers_own_answers(start: StartGateway, records_url: str) -> None:
    keys = {"keys": [{"name": name, "sha256": config.key_digest(name)} for name in ("team-a", "team-b")]}
    mine, others = ({"Authorization": f"Bearer {name}"} for name in ("team-a", "team-b"))
    async with backends() as both, start(*both, records={"url": records_url}, auth=keys) as gateway:
        body = {"model": "auto", "messages": [{"role": "user", "content": "easy"}]}
        async with gateway.session.post(f"{gateway.url}/v1/chat/completions", json=body, headers=mine) as answer:
            request_id = answer.headers["x-request-id"]
        assert (await score(gateway, request_id, 1))[0] == 401
        status, told = await score(gateway, request_id, 1, headers=others)
        assert (status, told["error"]["code"], told["error"]["param"]) == (404, "request_not_found", "request_id")
        assert (await score(gateway, "req-unknown", 1, headers=mine))[0] == 404
        assert labelled(records_url) == []
        assert (await score(gateway, request_id, 1, headers=mine))[0] == 200
        assert await gateway.metric("gateway_feedback_total", outcome="unknown") == 2
    assert len(labelled(records_url)) == 1


async def test_an_id_that_no_database_can_hold_is_unknown(start: StartGateway, records_url: str) -> None:
    async with backends() as both, start(*both, records={"url": records_url}) as gateway:
        answer = await gateway.chat("easy")
        strange, known = await asyncio.gather(
            score(gateway, "req-\0", 1), score(gateway, answer.headers["x-request-id"], 1)
        )
        assert (strange[0], known[0]) == (404, 200)
        assert await gateway.metric("gateway_records_failures_total") == 0


async def test_unknown_ids_do_not_hold_up_the_writer(start: StartGateway, records_url: str) -> None:
    async with backends() as both, start(*both, records={"url": records_url}) as gateway:
        unknown = [asyncio.create_task(score(gateway, f"req-{index}", 1)) for index in range(50)]
        answer = await gateway.chat("easy")
        assert (await score(gateway, answer.headers["x-request-id"], 1))[0] == 200
        assert not any(task.done() for task in unknown)
        assert {status for status, _ in await asyncio.gather(*unknown)} == {404}


WRONG: list[tuple[Any, str, str | None]] = [
    (b"{", "invalid_json", None),
    (b"[]", "invalid_json", None),
    ({"score": 1}, "invalid_feedback", "request_id"),
    ({"request_id": "", "score": 1}, "invalid_feedback", "request_id"),
    ({"request_id": "x" * 129, "score": 1}, "invalid_feedback", "request_id"),
    ({"request_id": 7, "score": 1}, "invalid_feedback", "request_id"),
    ({"request_id": "req-1"}, "invalid_feedback", "score"),
    ({"request_id": "req-1", "score": 1.01}, "invalid_feedback", "score"),
    ({"request_id": "req-1", "score": -0.01}, "invalid_feedback", "score"),
    ({"request_id": "req-1", "score": "1"}, "invalid_feedback", "score"),
    ({"request_id": "req-1", "score": True}, "invalid_feedback", "score"),
    ({"request_id": "req-1", "score": 1, "comment": 5}, "invalid_feedback", "comment"),
    ({"request_id": "req-1", "score": 1, "comment": "x" * 4097}, "invalid_feedback", "comment"),
    ({"request_id": "req-1", "score": 1, "coment": "typo"}, "invalid_feedback", "coment"),
]


async def test_a_wrong_body_is_an_error_that_names_the_field(start: StartGateway, tmp_path: Path) -> None:
    section = {"url": f"sqlite:///{tmp_path / 'records.db'}"}
    async with backends() as both, start(*both, records=section) as gateway:
        for body, code, field in WRONG:
            sent = {"data": body} if isinstance(body, bytes) else {"json": body}
            async with gateway.session.post(f"{gateway.url}/v1/feedback", **sent) as answer:
                error = (await answer.json())["error"]
            assert (answer.status, error["code"], error["param"]) == (400, code, field), body
            assert field is None or repr(field) in error["message"]
        assert await gateway.metric("gateway_feedback_total", outcome="refused") == len(WRONG)


async def test_without_records_it_says_what_to_configure(start: StartGateway) -> None:
    async with backends() as both, start(*both) as gateway:
        status, told = await score(gateway, "req-1", 1)
        assert (status, told["error"]["code"]) == (404, "records_off")
        assert "`records`" in told["error"]["message"]


async def test_a_locked_database_gets_503_and_nothing_is_acknowledged(start: StartGateway, tmp_path: Path) -> None:
    path = tmp_path / "records.db"
    async with backends() as both, start(*both, records={"url": f"sqlite:///{path}"}) as gateway:
        answer = await gateway.chat("easy")
        assert (await score(gateway, answer.headers["x-request-id"], 0))[0] == 200
        other = sqlite3.connect(path)
        other.execute("BEGIN IMMEDIATE")
        async with asyncio.timeout(8):
            status, told = await score(gateway, answer.headers["x-request-id"], 1)
        assert (status, told["error"]["code"]) == (503, "records_unavailable")
        assert await gateway.metric("gateway_feedback_total", outcome="unavailable") == 1
        assert (await gateway.chat("easy")).status == 200
        other.rollback()
        other.close()


async def test_two_gateways_share_one_database(start: StartGateway, postgres: Postgres) -> None:
    section = {"url": postgres.database()}
    async with backends() as both, start(*both, records=section) as one, start(*both, records=section) as two:
        answers = [await (one, two)[index % 2].chat(f"easy {index}") for index in range(20)]
        scores = [
            score((two, one)[index % 2], answer.headers["x-request-id"], index / 20)
            for index, answer in enumerate(answers)
        ]
        assert {status for status, _ in await asyncio.gather(*scores)} == {200}
    found = labelled(section["url"])
    assert [item.record.id for item in found] == [answer.headers["x-request-id"] for answer in answers]
    assert [item.labels[0].quality for item in found] == [index / 20 for index in range(20)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_kill_9_loses_nothing_that_was_acknowledged(
    kind: str, tmp_path: Path, tiny_checkpoint: Path, request: pytest.FixtureRequest
) -> None:
    """Twenty gateways, each killed in the midst of its writing, at a moment of its own."""
    url = f"sqlite:///{tmp_path / 'records.db'}"
    if kind == "postgresql":
        url = request.getfixturevalue("postgres").database()
    acknowledged: dict[str, float] = {}
    sent: dict[str, set[float]] = {}
    async with backends() as (small, large):
        raw = settings(small, large, tiny_checkpoint, records={"url": url})
        for kill in range(KILLS):
            async with serving(tmp_path, raw) as gateway, aiohttp.ClientSession() as session:

                async def client(base: str, session: aiohttp.ClientSession, number: int) -> None:
                    """Asks and scores, and then scores again, until the gateway is gone."""
                    for index in range(1_000_000):
                        body = {"model": "auto", "messages": [{"role": "user", "content": "easy"}]}
                        async with session.post(f"{base}/v1/chat/completions", json=body) as answer:
                            request_id = answer.headers["x-request-id"]
                        for value in (number / 16, index % 97 / 97):
                            sent.setdefault(request_id, set()).add(value)
                            acknowledged_before = acknowledged.pop(request_id, None)
                            scored = {"request_id": request_id, "score": value}
                            try:
                                async with session.post(f"{base}/v1/feedback", json=scored) as answer:
                                    assert answer.status == 200
                            except aiohttp.ClientError:
                                if acknowledged_before is not None:  # this, or what was to overwrite it
                                    acknowledged[request_id] = -1.0
                                raise
                            acknowledged[request_id] = value

                clients = [asyncio.create_task(client(gateway.url, session, number)) for number in range(8)]
                await asyncio.sleep(0.3 + kill * 0.037)
                gateway.process.kill()
                done = await asyncio.gather(*clients, return_exceptions=True)
                assert all(isinstance(error, aiohttp.ClientError) for error in done), done
                await gateway.process.wait()
    found = {item.record.id: item.labels[0].quality for item in labelled(url)}
    assert len(acknowledged) > 10 * KILLS
    for request_id, value in acknowledged.items():
        assert found[request_id] in sent[request_id]
        assert value in (-1.0, found[request_id])
