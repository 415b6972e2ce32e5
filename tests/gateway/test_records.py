"""What finished requests leave in the records database, and that serving never waits for it."""

import asyncio
import json
import logging
import resource
import sqlite3
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import sqlalchemy as sa
import yaml

from depo_gateway.estimator.records import tables
from depo_gateway.estimator.records.reasons import Reason
from depo_gateway.estimator.records.store import Feedback, Store
from depo_gateway.estimator.records.types import Record, RoutingSettings, ServedPool
from depo_gateway.gateway import config, records, request_notes
from depo_gateway.gateway.metrics import Metrics
from depo_gateway.gateway.openai.chat import CHAT
from depo_gateway.gateway.openai.query import json_object, query_of
from depo_gateway.gateway.records import Recorder
from depo_gateway.gateway.request_notes import RequestNotes, StreamCopy, record_of, reference_text
from depo_gateway.gateway.routing import Decision
from tests.gateway.backend import FakeVllm, Script
from tests.gateway.conftest import Running, StartGateway, running, settings
from tests.gateway.test_drain import serving
from tests.postgres import Postgres

SECRET_WORDS = "xylophone zephyr"


def stored(url: str) -> list[Record]:
    store = Store(url)
    try:
        return [item.record for item in store.logged(100_000)]
    finally:
        store.close()


async def written(gateway: Running, count: int) -> None:
    assert await gateway.settles("gateway_records_total", count, 15, outcome="written")


def keys(*names: str) -> dict[str, Any]:
    return {"keys": [{"name": name, "sha256": config.key_digest(name + "-key")} for name in names]}


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}-key"}


async def test_a_request_leaves_what_the_router_knew_and_how_it_ended(start: StartGateway, records_url: str) -> None:
    before = time.time()
    async with FakeVllm() as small, FakeVllm() as large:
        small.script = Script(finish_reason="length")
        async with start([small], [large], records={"url": records_url}, auth=keys("team-a")) as gateway:
            gateway.session.headers.update(bearer("team-a"))
            whole = await gateway.chat("easy")
            streamed = await gateway.chat("easy", stream=True)
            assert b'"usage"' not in await streamed.read()
            await gateway.chat("hard " * 9)
    first, second, third = stored(records_url)
    assert (first.id, second.id) == (whole.headers["x-request-id"], streamed.headers["x-request-id"])
    assert before <= first.time <= second.time <= time.time()
    assert (first.key, first.endpoint, first.pool, first.reason) == ("team-a", "chat", "small", "confident")
    assert (first.estimator, first.stage, second.stage) == (whole.headers["x-depo-estimator"], "full", "cached")
    assert first.confidence == pytest.approx(float(whole.headers["x-depo-confidence"]), abs=1e-4)
    assert (first.threshold, first.propensity) == (0.85, 1.0)
    assert first.pools == ("small", "large")
    assert set(first.quality) == {"small", "large"}
    assert first.confidence == pytest.approx(1 - max(0.0, first.quality["large"] - first.quality["small"]))
    assert (first.status, first.prompt_tokens, first.completion_tokens, first.finish_reason) == (200, 7, 5, "stop")
    assert (second.prompt_tokens, second.completion_tokens, second.finish_reason) == (7, 5, "length")
    assert first.first_token_seconds is None
    assert second.first_token_seconds is not None
    assert 0 < second.first_token_seconds <= second.total_seconds < 10
    assert (third.pool, third.reason) == ("large", "unsure")
    assert len(first.conversation) == 64
    pools = {"small": ServedPool("org/small-1b", 1.0), "large": ServedPool("org/large-9b", 5.0)}
    assert first.settings == third.settings == RoutingSettings("gain", 0.85, {}, pools)
    for record in (first, second, third):  # prompts: none
        assert (record.asked, record.answer, record.prompt_hash, record.parameters) == (None, None, "", {})


async def test_errors_leave_records_too(start: StartGateway, records_url: str) -> None:
    async with FakeVllm() as small, FakeVllm() as large:
        sections = {"records": {"url": records_url}, "auth": keys("team-a")}
        async with start([small], [large], **sections) as gateway:
            await gateway.chat("easy")  # no key: nobody's
            gateway.session.headers.update(bearer("team-a"))
            await gateway.session.post(f"{gateway.url}/v1/chat/completions", data=b"{")
            await gateway.chat("easy", model="nonsense")
            small.script = Script(status=500, body=b"{}")
            await gateway.chat("easy")
            small.script = Script(reset_after_events=2)
            await (await gateway.chat("easy", stream=True)).read()
            small.script = Script(status=503)
            await gateway.chat("easy", model="small")
    found = stored(records_url)
    assert [(record.status, record.pool, record.reason) for record in found] == [
        (400, "", ""),
        (404, "", ""),
        (500, "small", "confident"),
        (502, "small", "confident"),
        (503, "", "pinned"),
    ]
    assert [record.conversation != "" for record in found] == [False, True, True, True, True]


async def test_requests_over_a_keys_rate_leave_none(start: StartGateway, records_url: str) -> None:
    auth = keys("team-a")
    auth["keys"][0]["requests_per_minute"] = 2
    async with FakeVllm() as small, FakeVllm() as large:
        async with start([small], [large], records={"url": records_url}, auth=auth) as gateway:
            gateway.session.headers.update(bearer("team-a"))
            assert [(await gateway.chat("easy")).status for _ in range(8)] == [200] * 2 + [429] * 6
    assert [record.status for record in stored(records_url)] == [200, 200]


async def test_a_client_that_hangs_up_leaves_a_record(start: StartGateway, records_url: str) -> None:
    async with FakeVllm() as small, FakeVllm() as large:
        async with start([small], [large], records={"url": records_url, "prompts": "full"}) as gateway:
            small.script = Script(events=500, between_s=0.05)
            answer = await gateway.chat("easy", stream=True)
            await answer.content.readuntil(b"\n\n")
            answer.close()
            small.script = Script(before_head_s=60)
            with pytest.raises(asyncio.TimeoutError):
                async with asyncio.timeout(0.3):
                    await gateway.chat("easy one")
            await written(gateway, 2)
    streaming, waiting = stored(records_url)
    assert (streaming.status, streaming.pool, streaming.finish_reason) == (499, "small", "")
    assert streaming.answer is not None
    assert streaming.answer.startswith("Hello from here. 0")
    assert (waiting.status, waiting.pool, waiting.reason, waiting.answer) == (499, "", "confident", None)


async def test_decisions_that_were_not_free_say_so(start: StartGateway, records_url: str) -> None:
    async with FakeVllm() as small, FakeVllm() as large:
        sections = {"routing": {"explore": 0.5}, "records": {"url": records_url}}
        async with start([small], [large], **sections) as gateway:
            await gateway.chat("easy", model="large")
            for index in range(40):
                await gateway.chat(f"easy {index}")
            small.script = Script(status=503)
            for index in range(40):
                await gateway.chat(f"easy again {index}")
    pinned, *found = stored(records_url)
    assert (pinned.reason, pinned.pool, pinned.pools, pinned.quality, pinned.stage) == (
        "pinned", "large", ("large",), {}, ""
    )  # fmt: skip
    explored, broken = found[:40], found[40:]  # so many that chance is no matter
    assert {record.reason for record in explored} == {"confident", "explore"}
    assert {(record.pool, record.propensity) for record in explored} == {("small", 0.75), ("large", 0.25)}
    assert all(record.free for record in explored)
    assert {record.reason for record in broken} == {"fallback", "explore"}
    assert all(record.free == (record.reason == "explore") for record in broken)
    assert {record.propensity for record in broken if record.reason == "fallback"} == {1.0}


async def test_other_endpoints(start: StartGateway, records_url: str) -> None:
    async with FakeVllm() as small, FakeVllm() as large:
        async with start([small], [large], records={"url": records_url, "prompts": "full"}) as gateway:
            post, url = gateway.session.post, f"{gateway.url}/v1"
            await post(f"{url}/completions", json={"model": "auto", "prompt": "easy", "n": 1})
            await (await post(f"{url}/completions", json={"model": "auto", "prompt": "easy", "stream": True})).read()
            await post(f"{url}/completions", json={"model": "small", "prompt": [1, 2, 3]})
            await post(f"{url}/embeddings", json={"model": "small", "input": SECRET_WORDS})
            await post(f"{url}/route", json={"model": "auto", "messages": [{"role": "user", "content": "easy"}]})
    whole, streamed, tokens, embeddings = stored(records_url)
    assert (whole.endpoint, whole.asked, whole.answer) == ("completions", "easy", "Hello from here.")
    assert whole.parameters == {"n": 1}
    assert streamed.answer == "".join(f"Hello from here. {index}" for index in range(5))
    assert (tokens.asked, tokens.conversation) == (None, "")
    assert (embeddings.endpoint, embeddings.asked, embeddings.parameters) == ("embeddings", None, {})


# Text.


def contents(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in directory.glob("records.db*"))


async def ask_in_secret(gateway: Running) -> None:
    """Requests whose every text is made of SECRET_WORDS, and one more thing to know them by."""
    headers = {"x-depo-reference": SECRET_WORDS}
    for stream in (False, True):
        body = {"model": "auto", "messages": [{"role": "user", "content": SECRET_WORDS}], "stream": stream}
        body |= {"user": SECRET_WORDS, "temperature": 0.5, "stream_options": {} if stream else None}
        await (await gateway.session.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers)).read()
    await gateway.session.post(f"{gateway.url}/v1/completions", json={"model": "small", "prompt": SECRET_WORDS})


@pytest.mark.parametrize("prompts", ["none", "hash", "full"])
async def test_text_is_stored_only_as_configured(
    start: StartGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompts: str
) -> None:
    monkeypatch.setenv("HASH_KEY", "a-key-of-the-test")
    url = f"sqlite:///{tmp_path / 'records.db'}"
    section = {"url": url, "prompts": prompts, "hash_key_env": "HASH_KEY"}
    async with FakeVllm() as small, FakeVllm() as large:
        small.script = large.script = Script(text=SECRET_WORDS)
        async with start([small], [large], records=section) as gateway:
            await ask_in_secret(gateway)
            await written(gateway, 3)
            files = contents(tmp_path)  # with the log ahead
        files += contents(tmp_path)
    assert b"confident" in files or b"unsure" in files
    for word in SECRET_WORDS.split():
        assert (word.encode() in files) == (prompts == "full")
    whole, streamed, completion = stored(url)
    assert (whole.prompt_hash != "") == (prompts == "hash")
    assert whole.prompt_hash == streamed.prompt_hash
    assert whole.conversation == streamed.conversation != ""
    if prompts == "full":
        assert whole.asked == streamed.asked == [{"role": "user", "content": SECRET_WORDS}]
        assert whole.answer == SECRET_WORDS
        assert streamed.answer == "".join(f"{SECRET_WORDS} {index}" for index in range(5))
        assert whole.parameters == streamed.parameters == {"user": SECRET_WORDS, "temperature": 0.5}
        assert whole.reference == SECRET_WORDS
        assert (completion.asked, completion.reference) == (SECRET_WORDS, None)


async def test_the_reference_stays_here(start: StartGateway, records_url: str) -> None:
    async with FakeVllm() as small, FakeVllm() as large:
        async with start([small], [large], records={"url": records_url, "prompts": "full"}) as gateway:
            await gateway.session.post(
                f"{gateway.url}/v1/chat/completions",
                json={"model": "auto", "messages": [{"role": "user", "content": "easy"}]},
                headers={"x-depo-reference": "four%C3%A9"},
            )
        assert not any("depo" in name for seen in small.seen + large.seen for name in seen.headers)
    assert [record.reference for record in stored(records_url)] == ["fouré"]


@pytest.mark.parametrize(
    ("header", "text"),
    [
        (b"42", "42"),
        ("é".encode(), "é"),
        (b"%C3%A9%0A50%", "é\n50%"),
        (b"%25aa", "%aa"),
        (b"\xff", "\N{REPLACEMENT CHARACTER}"),
    ],
)
def test_references_are_utf8_with_any_byte_as_percent(header: bytes, text: str) -> None:
    assert reference_text(header) == text


async def test_a_conversation_is_one_through_all_its_turns(start: StartGateway, records_url: str) -> None:
    turns = [{"role": "user", "content": "easy one"}]
    more = [*turns, {"role": "assistant", "content": "Hello from here."}, {"role": "user", "content": "hard"}]

    async def ask(gateway: Running, messages: list[dict[str, str]], key: str) -> None:
        body = {"model": "auto", "messages": messages}
        await gateway.session.post(f"{gateway.url}/v1/chat/completions", json=body, headers=bearer(key))

    async with FakeVllm() as small, FakeVllm() as large:
        sections = {"records": {"url": records_url}, "auth": keys("team-a", "team-b")}
        async with start([small], [large], **sections) as gateway:
            await ask(gateway, turns, "team-a")
            await ask(gateway, [{"role": "system", "content": "It is noon."}, *more], "team-a")
            await ask(gateway, turns, "team-b")
            await ask(gateway, [{"role": "user", "content": "easy two"}], "team-a")
    first, second, others, another = (record.conversation for record in stored(records_url))
    assert first == second
    assert len({first, others, another}) == 3


def test_a_long_stream_is_not_kept_but_its_end_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_notes, "ANSWER_BYTES", 2000)
    answer = StreamCopy(whole=True)
    for index in range(100):
        choice = {"index": 0, "delta": {"content": "word "}, "finish_reason": "stop" if index == 99 else None}
        answer.add(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
    answer.add(b"data: [DONE]\n\n")
    assert len(answer.chunks) == request_notes.LAST_CHUNKS
    record = record_of(RequestNotes(CHAT, "req-1", key="", stream=answer, status=200), "full", b"key")
    assert (record.answer, record.finish_reason) == (None, "stop")


def test_answers_of_any_shape_make_a_record() -> None:
    for whole in (None, [], {}, {"choices": 1}, {"choices": [1, {"index": 1}]}, {"choices": [{"message": 3}]}):
        notes = RequestNotes(CHAT, "req-1", key="", whole=whole, usage={"prompt_tokens": "many"})
        record = record_of(notes, "full", b"key")
        assert (record.answer or "", record.finish_reason, record.prompt_tokens) == ("", "", None)
    stream = StreamCopy(whole=True)
    stream.add(b'data: {"choices": [{"index": 1, "delta": {"content": "b"}}, {"delta": {"content": "a"}}]}\n\ndata: {')
    assert record_of(RequestNotes(CHAT, "req-1", key="", stream=stream), "full", b"key").answer == "a"


# When the database doesn't take them.


def notes_of(number: int) -> RequestNotes:
    return RequestNotes(CHAT, f"req-{number}", key="", status=200, time=float(number))


def outcome(metrics: Metrics, name: str) -> float:
    return metrics.registry.get_sample_value("gateway_records_total", {"outcome": name}) or 0.0


def until(condition: Any, seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def lock(path: Path) -> sqlite3.Connection:
    """Holds the file's write lock, as a backup that hangs does."""
    other = sqlite3.connect(path, timeout=10)
    other.execute("BEGIN IMMEDIATE")
    return other


def test_a_full_queue_drops_and_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(records, "QUEUE_RECORDS", 10)
    monkeypatch.setattr("depo_gateway.estimator.records.store.WAIT_SECONDS", 0.05)
    path, metrics = tmp_path / "records.db", Metrics("0")
    section = config.Records(f"sqlite:///{path}")
    recorder = Recorder(section, metrics)
    recorder.add(notes_of(0))
    until(lambda: outcome(metrics, "written") == 1)
    other = lock(path)
    for number in range(1, 26):
        recorder.add(notes_of(number))
    until(lambda: "locked" in recorder.trouble)
    assert (recorder.waiting, outcome(metrics, "dropped")) == (10, 15)
    assert caplog.text.count("the queue of records is full") == 1
    other.rollback()
    other.close()
    until(lambda: outcome(metrics, "written") == 11)
    recorder.add(notes_of(99))
    recorder.close()
    assert [record.id for record in stored(f"sqlite:///{path}")] == [f"req-{n}" for n in (*range(11), 99)]
    assert caplog.text.count("no records are written") == caplog.text.count("records are written again") == 1
    assert metrics.registry.get_sample_value("gateway_records_failures_total") >= 1


def test_so_does_one_with_too_much_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "QUEUE_BYTES", 1000)
    monkeypatch.setattr("depo_gateway.estimator.records.store.WAIT_SECONDS", 0.05)
    path, metrics = tmp_path / "records.db", Metrics("0")
    recorder = Recorder(config.Records(f"sqlite:///{path}", prompts="full"), metrics)
    recorder.add(notes_of(0))
    until(lambda: outcome(metrics, "written") == 1)
    other = lock(path)
    for number in range(1, 5):
        answer = StreamCopy(whole=True)
        answer.add(b"x" * 400)
        recorder.add(replace(notes_of(number), stream=answer))
    until(lambda: recorder.trouble != "")
    assert (recorder.waiting, outcome(metrics, "dropped")) == (2, 2)
    other.rollback()
    other.close()
    until(lambda: outcome(metrics, "written") == 3)
    answer = StreamCopy(whole=True)
    answer.add(b"x" * 900)
    recorder.add(replace(notes_of(5), stream=answer))  # there is room again
    recorder.close()
    assert outcome(metrics, "written") == 4


@pytest.mark.parametrize("endpoint", ["chat", "embeddings"])
async def test_all_that_waits_is_counted(
    start: StartGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    """Also an answer that came in one piece, and a reference."""
    sizes = list[int]()
    add = Recorder.add

    def weighed(recorder: Recorder, item: RequestNotes) -> None:
        sizes.append(item.size)
        add(recorder, item)

    monkeypatch.setattr(Recorder, "add", weighed)
    long = {"choices": [{"index": 0, "message": {"content": "x" * 20_000}}], "data": [[0.1] * 5_000]}
    section = {"url": f"sqlite:///{tmp_path / 'records.db'}", "prompts": "full"}
    async with FakeVllm(script=Script(body=json.dumps(long).encode())) as small, FakeVllm() as large:
        async with start([small], [large], records=section) as gateway:
            path = {"chat": "chat/completions"}.get(endpoint, endpoint)
            body = {"model": "small", "messages": [{"role": "user", "content": "easy"}], "input": "easy"}
            headers = {"x-depo-reference": "y" * 5_000}
            async with gateway.session.post(f"{gateway.url}/v1/{path}", json=body, headers=headers) as answer:
                assert answer.status == 200
            await written(gateway, 1)
    expected = 25_000 if endpoint == "chat" else 5_000
    assert expected < sizes[0] < (60_000 if endpoint == "chat" else 6_000)


async def test_feedback_that_nobody_waits_for_any_more_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sender has got 503, send it again, perhaps to another gateway, and may have changed their mind."""
    url = f"sqlite:///{tmp_path / 'records.db'}"
    recorder = Recorder(config.Records(url), Metrics("0"))
    decision = Decision("small", Reason.CONFIDENT)
    recorder.add(replace(notes_of(0), decision=decision, served=True))
    assert await recorder.feedback(Feedback("req-0", "", 0.5))
    other = lock(tmp_path / "records.db")
    monkeypatch.setattr(records, "FEEDBACK_SECONDS", 0.5)
    late = [asyncio.create_task(recorder.feedback(Feedback("req-0", "", score))) for score in (0.1, 0.2)]
    await asyncio.sleep(0.15)  # the writer waits for the lock with these two
    late += [asyncio.create_task(recorder.feedback(Feedback("req-0", "", score))) for score in (0.3, 0.4)]
    with pytest.raises(TimeoutError):
        await asyncio.gather(*late)
    await asyncio.gather(*late, return_exceptions=True)
    other.rollback()
    other.close()
    monkeypatch.setattr(records, "FEEDBACK_SECONDS", 10)
    assert await recorder.feedback(Feedback("req-unknown", "", 1.0)) is False
    await asyncio.to_thread(recorder.close)
    store = Store(url)
    (item,) = store.labelled(10)
    store.close()
    assert item.labels[0].quality in (0.1, 0.2, 0.5)


def test_closing_gives_up_after_a_while_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("depo_gateway.estimator.records.store.WAIT_SECONDS", 0.05)
    path, metrics = tmp_path / "records.db", Metrics("0")
    recorder = Recorder(config.Records(f"sqlite:///{path}"), metrics)
    recorder.add(notes_of(0))
    until(lambda: outcome(metrics, "written") == 1)
    other = lock(path)
    recorder.add(notes_of(1))
    recorder.close(0.3)
    assert outcome(metrics, "dropped") == 1
    other.rollback()
    other.close()


def test_what_no_database_takes_holds_nothing_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, metrics = tmp_path / "records.db", Metrics("0")
    recorder = Recorder(config.Records(f"sqlite:///{path}", prompts="full"), metrics)
    deep: Any = []
    for _ in range(500):
        deep = [deep]
    body = json.dumps({"model": "auto", "messages": [{"role": "user", "content": "x"}], "deep": deep}).encode()
    recorder.add(notes_of(1))
    for number, sent in ((2, body), (3, body.replace(b'"x"', json.dumps(deep).encode()))):
        recorder.add(replace(notes_of(number), query=query_of(CHAT, json_object(sent), sent)))
    recorder.add(notes_of(4))
    recorder.close()
    assert [record.id for record in stored(f"sqlite:///{path}")] == ["req-1", "req-4"]
    assert (outcome(metrics, "written"), outcome(metrics, "rejected")) == (2, 2)
    assert recorder.waiting == 0


async def test_serving_goes_on_while_the_database_is_gone(
    start: StartGateway, postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    url = postgres.database()
    async with FakeVllm() as small, FakeVllm() as large:
        async with start([small], [large], records={"url": url}) as gateway:
            first = await gateway.chat("easy")
            await written(gateway, 1)
            await asyncio.to_thread(postgres.stop)
            for index in range(20):
                assert (await gateway.chat(f"easy {index}")).status == 200
            assert await gateway.settles("gateway_records_waiting", 20)
            body = {"request_id": first.headers["x-request-id"], "score": 1}
            async with asyncio.timeout(6):
                async with gateway.session.post(f"{gateway.url}/v1/feedback", json=body) as answer:
                    assert (answer.status, answer.headers["retry-after"]) == (503, "5")
                    assert (await answer.json())["error"]["code"] == "records_unavailable"
            async with gateway.session.get(f"{gateway.url}/readyz") as ready:
                assert ready.status == 200
            async with gateway.session.get(f"{gateway.admin}/admin/status") as status:
                told = (await status.json())["records"]
            assert told["waiting"] == 20
            assert told["trouble"] != ""
            assert "secret" not in json.dumps(told)
            await asyncio.to_thread(postgres.start)
            await written(gateway, 21)
    assert len(stored(url)) == 21
    assert caplog.text.count("no records are written") == 1
    assert "secret" not in caplog.text


async def test_a_gateway_starts_without_its_database(start: StartGateway, postgres: Postgres) -> None:
    url = postgres.database()
    await asyncio.to_thread(postgres.stop)
    async with FakeVllm() as small, FakeVllm() as large:
        async with start([small], [large], records={"url": url}) as gateway:
            assert (await gateway.chat("easy")).status == 200
            assert await gateway.settles("gateway_records_waiting", 1)
            await asyncio.to_thread(postgres.start)
            await written(gateway, 1)


async def test_serving_goes_on_where_the_directory_takes_no_file(start: StartGateway) -> None:
    async with FakeVllm() as small, FakeVllm() as large:
        async with start([small], [large], records={"url": "sqlite:////proc/self/records.db"}) as gateway:  # root's too
            answer = await gateway.chat("easy")
            assert answer.status == 200
            assert await gateway.settles("gateway_records_waiting", 1)
            body = {"request_id": answer.headers["x-request-id"], "score": 1}
            rated = await gateway.session.post(f"{gateway.url}/v1/feedback", json=body)
            assert rated.status == 503
            assert rated.headers["retry-after"]
            assert await gateway.metric("gateway_records_failures_total") >= 1


async def test_serving_goes_on_while_the_disk_is_full(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """The limit on a file's size, as the kernel sets it on a running process, stands for a disk without room."""
    url = f"sqlite:///{tmp_path / 'records.db'}"
    async with FakeVllm() as small, FakeVllm() as large:
        raw = settings([small], [large], tiny_checkpoint, records={"url": url, "prompts": "full"})
        async with serving(tmp_path, raw) as gateway, aiohttp.ClientSession() as session:

            async def ask(number: int) -> str:
                body = {"model": "auto", "messages": [{"role": "user", "content": f"easy {number} " + "a " * 2000}]}
                async with session.post(f"{gateway.url}/v1/chat/completions", json=body) as answer:
                    assert answer.status == 200
                    return answer.headers["x-request-id"]

            async def score(request_id: str) -> int:
                body = {"request_id": request_id, "score": 0.5}
                async with session.post(f"{gateway.url}/v1/feedback", json=body) as answer:
                    return answer.status

            first = await ask(0)
            assert await score(first) == 200
            size = (tmp_path / "records.db-wal").stat().st_size
            limits = resource.prlimit(gateway.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            asked = [await ask(number) for number in range(1, 20)]
            assert await score(first) == 503
            resource.prlimit(gateway.process.pid, resource.RLIMIT_FSIZE, limits)
            until_s = time.monotonic() + 15
            while await score(asked[-1]) != 200:
                assert time.monotonic() < until_s
            gateway.process.terminate()
            assert (await gateway.exit())[0] == 0
    assert {record.id for record in stored(url)} == {first, *asked}


# Settings.


async def test_retention_deletes_old_records_only(start: StartGateway, records_url: str) -> None:
    store = Store(records_url)
    store.create()
    days = 86_400.0
    store.append([Record("old", time.time() - 8 * days, pool="small"), Record("new", time.time() - 6 * days)])
    store.append([Record(f"older-{index}", time.time() - 9 * days) for index in range(2 * records.BATCH_RECORDS)])
    async with FakeVllm() as small, FakeVllm() as large:
        async with start([small], [large], records={"url": records_url, "retention_days": 7}) as gateway:
            await gateway.chat("easy")
            await written(gateway, 1)
            await asyncio.to_thread(until, lambda: store.count_records()[0] == 2)
    assert stored(records_url)[0].id == "new"
    store.close()


async def test_a_reload_takes_up_another_records_section(tmp_path: Path, tiny_checkpoint: Path) -> None:
    path, admin_key = tmp_path / "gateway.yaml", "an-admin-key"
    first, second = (f"sqlite:///{tmp_path / name}" for name in ("first.db", "second.db"))
    async with FakeVllm() as small, FakeVllm() as large:
        admin = {"port": 0, "key_sha256": config.key_digest(admin_key)}
        raw = settings([small], [large], tiny_checkpoint, admin=admin, records={"url": first})
        async with running(raw, path) as gateway:

            async def reload(section: dict[str, Any] | None) -> int:
                changed = {name: value for name, value in raw.items() if name != "records"}
                changed |= {"records": section} if section else {}
                path.write_text(yaml.safe_dump(changed, sort_keys=False))
                headers = {"Authorization": f"Bearer {admin_key}"}
                async with gateway.session.post(f"{gateway.admin}/admin/reload", headers=headers) as answer:
                    assert answer.status == 200 or "records" in (await answer.json())["error"]["message"]
                    return answer.status

            small.script = Script(between_s=0.2)
            streaming = await gateway.chat("easy", stream=True)
            small.script = Script()
            await gateway.chat("easy two")
            assert await reload({"url": f"sqlite:///{tmp_path}/nowhere/records.db"}) == 422
            assert await reload({"url": second, "prompts": "full"}) == 200
            assert len(stored(first)) == 1
            await streaming.read()  # begun before, recorded where records go now
            await gateway.chat("easy three")
            await written(gateway, 3)
            assert await reload(None) == 200
            await gateway.chat("easy four")
    assert len(stored(first)) == 1
    begun, later = stored(second)
    assert begun.answer is None  # its text was not to be kept when it began
    assert later.answer == "Hello from here."


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"url": "sqlite:////nowhere/at/all/records.db"}, "the directory /nowhere/at/all does not exist"),
        ({"url": "postgresql://host:port/base"}, "records.url can't be read"),
        ({"url": "postgresql://depo:a@b@host/base"}, "records.url has an '@' in its password; write it as %40"),
        ({"url": f"sqlite:////{'long' * 100}/records.db"}, "longlong does not exist"),
    ],
)
async def test_an_address_that_cannot_be_stops_start_up(
    start: StartGateway, section: dict[str, str], message: str
) -> None:
    async with FakeVllm() as small, FakeVllm() as large:
        with pytest.raises(ValueError, match=message):
            async with start([small], [large], records=section):
                pass


async def test_a_database_of_another_version_is_not_touched(
    start: StartGateway, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "records.db"
    store = Store(f"sqlite:///{path}")
    store.create()
    store.close()
    with sqlite3.connect(path) as other:
        other.execute("UPDATE depo_schema SET version = 99")
    other.close()
    async with FakeVllm() as small, FakeVllm() as large:
        async with start([small], [large], records={"url": f"sqlite:///{path}"}) as gateway:
            assert (await gateway.chat("easy")).status == 200
            assert await gateway.settles("gateway_records_waiting", 1)
            with caplog.at_level(logging.ERROR):
                await asyncio.sleep(0.3)
    assert "was created by another version (schema 99, here 1)" in caplog.text
    assert stored(f"sqlite:///{path}") == []


def test_a_database_of_version_0_1_is_read_as_it_is_and_taken_over(records_url: str) -> None:
    store = Store(records_url)
    store.create()
    with store._transaction(write=True) as connection:  # version 0.1's tables
        connection.execute(sa.text("ALTER TABLE records DROP COLUMN settings"))
        connection.execute(sa.text('ALTER TABLE records DROP COLUMN "group"'))
        connection.execute(sa.text("DROP TABLE routing_settings"))
        columns = "id, time, key, endpoint, conversation, pool, reason, estimator, stage, pools, quality, propensity,"
        values = "'old', 1, '', 'chat', '', 'small', 'confident', '', '', '[]', '{}', 1,"
        by_old_version = (
            f"INSERT INTO records ({columns} total_seconds, status, finish_reason, prompt_hash, parameters)"
        )
        connection.execute(sa.text(f"{by_old_version} VALUES ({values} 1, 200, '', '', '{{}}')"))
    store.close()
    assert [(record.id, record.settings) for record in stored(records_url)] == [("old", None)]
    pools = {"small": ServedPool("org/small", 1.0)}
    kept = [RoutingSettings("gain", None, {"large_share": bound}, pools) for bound in (0.3, 0.4)]
    new = Store(records_url)
    new.create()
    new.append([Record(f"new {n}", 2.0 + n, group=f"task {n}", settings=kept[n % 2]) for n in range(4)])
    new.create()
    with new._transaction(write=True) as connection:
        connection.execute(
            sa.text(f"{by_old_version} VALUES ({values.replace('old', 'again')} 1, 200, '', '', '{{}}')")
        )
    new.close()
    found = {record.id: (record.settings, record.group) for record in stored(records_url)}
    old = {"old": (None, ""), "again": (None, "")}
    assert found == old | {f"new {n}": (kept[n % 2], f"task {n}") for n in range(4)}


def test_a_database_without_tasks_is_taken_over_while_an_older_gateway_writes(records_url: str) -> None:
    """As on a rolling upgrade, and after one is taken back: nothing that either version wrote is lost."""
    settings = RoutingSettings("gain", 0.85, {}, {"small": ServedPool("org/small", 1.0)})
    older = Store(records_url)
    older.create()
    older.append([Record("before", 1.0, group="lost", settings=settings)])
    with older._transaction(write=True) as connection:  # the tables of the version before
        connection.execute(sa.text('ALTER TABLE records DROP COLUMN "group"'))
    assert [(record.id, record.group, record.settings) for record in stored(records_url)] == [("before", "", settings)]
    new = Store(records_url)
    new.create()
    new.append([Record("new", 2.0, group="sums", settings=settings)])
    with older._transaction(write=True) as connection:  # it knows its own columns only
        names = ", ".join(f'"{column.name}"' for column in tables.RECORDS.c if column.name not in ("seq", "group"))
        values = names.replace('"id"', "'after'").replace('"time"', "3.0")
        connection.execute(sa.text(f"INSERT INTO records ({names}) SELECT {values} FROM records WHERE id = 'before'"))
    older.close()
    new.close()
    found = {record.id: (record.group, record.settings) for record in stored(records_url)}
    assert found == {"before": ("", settings), "new": ("sums", settings), "after": ("", settings)}
