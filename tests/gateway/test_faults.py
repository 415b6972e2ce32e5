"""What backends do wrong, and what the client sees of it: before the first byte nothing, after it one error event."""

import asyncio
import json
import socket
import time
from typing import Any

import aiohttp
import pytest

from depo_gateway.gateway import pools
from tests.gateway.backend import FakeVllm, Script
from tests.gateway.conftest import StartGateway

FAULTS = {
    "refused": None,  # the backend is gone
    "reset": Script(reset_before_head=True),
    "502": Script(status=502, body=b"{}"),
    "503": Script(status=503, body=b"{}"),
    "504": Script(status=504, body=b"{}"),
    "empty stream": Script(stop_after_events=0),
    "reset before the first event": Script(reset_after_events=0),
}
STREAMS_ONLY = ("empty stream", "reset before the first event")
CASES = [(fault, stream) for fault in FAULTS for stream in (False, True) if stream or fault not in STREAMS_ONLY]


async def break_down(backend: FakeVllm, fault: str) -> None:
    script = FAULTS[fault]
    if script is None:
        await backend.kill()
    else:
        backend.script = script


def events(body: bytes) -> list[bytes]:
    return [event for event in body.split(b"\n\n") if event]


async def error_of(answer: aiohttp.ClientResponse) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(await answer.read())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(("fault", "stream"), CASES)
async def test_a_second_backend_of_the_pool_answers(start: StartGateway, fault: str, stream: bool) -> None:
    async with FakeVllm() as bad, FakeVllm() as good, FakeVllm() as large, start([bad, good], [large]) as gateway:
        await break_down(bad, fault)
        for _ in range(12):
            answer = await gateway.chat(stream=stream)
            body = await answer.read()
            assert (answer.status, answer.headers["x-depo-pool"]) == (200, "small")
            assert answer.headers["x-depo-reason"] == "confident"
            assert body.endswith(b"data: [DONE]\n\n" if stream else b"}")
        assert await gateway.metric("gateway_retries_total") >= 1
        assert len(good.seen) == 12
        assert not large.seen
        assert await gateway.metric("gateway_fallbacks_total") == 0
        assert await gateway.metric("gateway_in_flight_requests") == 0


@pytest.mark.parametrize(("fault", "stream"), CASES)
async def test_the_other_pool_answers_unless_the_first_is_pinned(start: StartGateway, fault: str, stream: bool) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway:
        await break_down(small, fault)
        answer = await gateway.chat(stream=stream)
        await answer.read()
        headers = (answer.headers["x-depo-pool"], answer.headers["x-depo-reason"])
        assert (answer.status, *headers) == (200, "large", "fallback")
        assert await gateway.metric("gateway_fallbacks_total", from_pool="small", to_pool="large") == 1
        assert await gateway.metric("gateway_decisions_total", pool="large", reason="fallback") == 1
        assert await gateway.metric("gateway_requests_total", pool="large", code="200") == 1
        assert json.loads(large.seen[0].body)["model"] == "org/large-9b"
        for model in ("small", "org/small-1b"):
            answer = await gateway.chat(model=model, stream=stream)
            error = await error_of(answer)
            assert (answer.status, error["code"], error["type"]) == (503, "pool_unavailable", "server_error")
            assert int(answer.headers["retry-after"]) >= 1
            assert "pool small" in error["message"]
        assert len(large.seen) == 1
        assert await gateway.metric("gateway_in_flight_requests") == 0


async def test_large_falls_back_to_small(start: StartGateway) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway:
        await large.kill()
        answer = await gateway.chat("prove the hard theorem")
        assert (answer.status, answer.headers["x-depo-pool"]) == (200, "small")
        assert await gateway.metric("gateway_fallbacks_total", from_pool="large", to_pool="small") == 1


async def test_nobody_left(start: StartGateway) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway:
        await small.kill()
        await large.kill()
        for _ in range(2):  # found out by trying, then known
            answer = await gateway.chat()
            assert (answer.status, (await error_of(answer))["code"]) == (503, "pool_unavailable")
        async with gateway.session.get(f"{gateway.url}/readyz") as ready:
            assert (ready.status, (await ready.json())["reasons"]) == (503, ["no pool has a usable backend"])


async def test_the_budget_bounds_retries(start: StartGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "FAILURES_TO_OPEN", 1000)  # else the breaker does
    script = Script(status=503, body=b"{}")
    async with FakeVllm(script=script) as a, FakeVllm(script=script) as b:
        retries = {"budget": 0.0, "per_second": 0.3}  # three in ten seconds, and then hardly any
        async with start([a], [b], retries=retries) as gateway:
            for _ in range(20):
                answer = await gateway.chat()
                assert answer.status == 503
            assert 1 <= await gateway.metric("gateway_retries_total") <= 4


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_other_errors_pass_through_byte_for_byte(start: StartGateway, stream: bool) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway:
        for status in (400, 404, 422, 429, 500, 429, 500, 500, 500):
            body = b'{ "error" : {"message": "as it is", "type": "x", "param":null, "code": %d} }\n' % status
            headers = {"retry-after": "7", "x-ratelimit-remaining": "0"}
            small.script = Script(status=status, body=body, headers=headers)
            answer = await gateway.chat(stream=stream)
            assert (answer.status, await answer.read()) == (status, body)
            assert {name: answer.headers[name] for name in headers} == headers
            assert answer.headers["x-depo-pool"] == "small"
        assert (len(small.seen), len(large.seen)) == (9, 0)
        assert await gateway.metric("gateway_circuit_state") == 0


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (Script(reset_after_events=2), "broke off"),
        (Script(events=3, between_s=2.0), "idle_s"),
        (Script(events=1000, between_s=0.1), "total_s"),
    ],
    ids=["reset", "idle", "total"],
)
async def test_after_the_first_byte_one_error_event_ends_the_stream(
    start: StartGateway, script: Script, said: str
) -> None:
    timeouts = {"idle_s": 0.6, "total_s": 1.5}
    async with FakeVllm(script=script) as small, FakeVllm() as large:
        async with start([small], [large], timeouts=timeouts) as gateway:
            started = time.monotonic()
            answer = await gateway.chat(stream=True)
            body = await answer.read()  # a proper end: no exception here
            assert answer.status == 200
            *good, last = events(body)
            error = json.loads(last.removeprefix(b"data: "))["error"]
            assert said in error["message"]
            assert (error["type"], set(error)) == ("server_error", {"message", "type", "param", "code"})
            assert good
            assert all(json.loads(event[6:])["choices"] for event in good)
            assert b"[DONE]" not in body
            assert time.monotonic() - started < 5
            assert (len(small.seen), len(large.seen)) == (1, 0)
            assert await small.wait_for(lambda: not small.open or bool(small.seen[0].closed), 1.0)
            assert await gateway.settles("gateway_in_flight_requests", 0)


async def test_an_event_torn_by_a_reset_does_not_swallow_the_error(start: StartGateway) -> None:
    """The error must be an event of its own, after whatever came of the torn one."""
    async with FakeVllm() as large:

        async def torn(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            asked = await reader.readuntil(b"\r\n\r\n")
            if not asked.startswith(b"POST"):
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            else:
                half = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\ndata: {"choices":[{"del'
                head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
                writer.write(head + b"%x\r\n%b\r\n" % (len(half), half))
                await writer.drain()
                await asyncio.sleep(0.2)
            writer.close()

        listening = await asyncio.start_server(torn, "127.0.0.1", 0)
        small = FakeVllm()
        small.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        async with listening, start([small], [large]) as gateway:
            body = await (await gateway.chat(stream=True)).read()
            assert json.loads(events(body)[-1].removeprefix(b"data: "))["error"]["code"] == "backend_broke_off"


async def test_no_first_token_in_time(start: StartGateway) -> None:
    for script in (Script(before_head_s=30), Script(before_first_s=30)):
        async with FakeVllm(script=script) as small, FakeVllm() as large:
            async with start([small], [large], timeouts={"first_token_s": 0.4}) as gateway:
                started = time.monotonic()
                answer = await gateway.chat(stream=True)
                error = await error_of(answer)
                assert (answer.status, error["code"]) == (504, "timeout")
                assert "first_token_s" in error["message"]
                assert 0.3 < time.monotonic() - started < 3
                assert await small.wait_for(lambda: small.seen[0].closed is not None, 1.0)
                assert await gateway.metric("gateway_upstream_attempts_total", outcome="timeout") == 1


async def test_a_whole_answer_has_only_the_total_timeout(start: StartGateway) -> None:
    async with FakeVllm(script=Script(before_head_s=0.8)) as one:
        async with start([one], [one], timeouts={"first_token_s": 0.2, "idle_s": 0.2, "total_s": 1.6}) as gateway:
            assert (await gateway.chat()).status == 200
            one.script = Script(before_head_s=30)
            answer = await gateway.chat()
            error = await error_of(answer)
            assert (answer.status, error["code"]) == (504, "timeout")
            assert "total_s" in error["message"]
            assert await one.wait_for(lambda: one.seen[1].closed is not None, 1.0)
            assert await gateway.metric("gateway_upstream_attempts_total", outcome="timeout") == 1


async def test_long_streams_do_not_count_against_their_backend(start: StartGateway) -> None:
    async with FakeVllm(script=Script(events=1000, between_s=0.05)) as one:
        async with start([one], [one], timeouts={"total_s": 0.5}) as gateway:
            for answer in await asyncio.gather(*(gateway.chat(model="small", stream=True) for _ in range(4))):
                assert b"total_s" in await answer.read()
            assert await gateway.metric("gateway_circuit_state") == 0


async def test_connecting_takes_no_longer_than_connect_s(start: StartGateway) -> None:
    """A listener whose backlog is full drops what else would connect."""
    full = FakeVllm()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        full.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
            fillers.append(filler)
        try:
            async with FakeVllm() as large, start([full], [large], timeouts={"connect_s": 0.4}) as gateway:
                # the health check has found it down: only a wrong answer from there would be noticed; so ask at once
                assert await gateway.metric("gateway_backend_up", backend=full.url) == 0
                answer = await gateway.chat()
                assert (answer.status, answer.headers["x-depo-reason"]) == (200, "fallback")
        finally:
            for filler in fillers:
                filler.close()


async def test_a_backend_killed_under_load_is_not_noticed(start: StartGateway) -> None:
    """50 clients, streams and whole answers: none sees an error unless its own stream had begun."""
    script = Script(before_head_s=0.02, between_s=0.01)
    async with FakeVllm(script=script) as a, FakeVllm(script=script) as b, FakeVllm() as large:
        async with start([a, b], [large], retries={"budget": 1.0, "per_second": 100}) as gateway:
            until = time.monotonic() + 2.5
            answered, broken = 0, 0

            async def client(number: int) -> None:
                nonlocal answered, broken
                while time.monotonic() < until:
                    answer = await gateway.chat(stream=bool(number % 2))
                    body = await answer.read()
                    assert answer.status == 200, body
                    if number % 2 and not body.endswith(b"data: [DONE]\n\n"):
                        assert b"backend_broke_off" in events(body)[-1]
                        assert len(events(body)) > 1  # it had begun
                        broken += 1
                    answered += 1

            clients = [asyncio.create_task(client(number)) for number in range(50)]
            await asyncio.sleep(0.8)
            await a.kill()
            await asyncio.gather(*clients)
            assert answered > 100
            assert broken <= 50
            assert await gateway.settles("gateway_backend_up", 0, backend=a.url)
            assert await gateway.settles("gateway_in_flight_requests", 0)
            assert not large.seen  # the pool's other backend was there


async def test_an_idle_connection_that_closes_as_it_is_used(start: StartGateway) -> None:
    """The backend answers once, and resets the kept connection as soon as the next request comes over it."""
    for stream in (False, True):
        async with FakeVllm() as one, FakeVllm() as large, start([one], [large]) as gateway:
            for _ in range(6):
                assert (await gateway.chat(model="small", stream=stream)).status == 200
                one.script = Script(reset_before_head=True, repeat=1, then=Script())
                answer = await gateway.chat(model="small", stream=stream)
                await answer.read()
                assert answer.status == 200
            for _ in range(6):
                for writer in list(one.open):
                    writer.close()  # a polite close, seen or not yet
                assert (await gateway.chat(model="small", stream=stream)).status == 200
            assert await gateway.metric("gateway_circuit_state") == 0


async def test_a_prompt_too_long_for_small_goes_up(start: StartGateway) -> None:
    async with FakeVllm() as small, FakeVllm() as large:
        limits: dict[str, Any] = {"small": {"context_tokens": 100}, "large": {"context_tokens": 1000}}
        async with start([small], [large], **limits) as gateway:
            answer = await gateway.chat("easy " * 200)
            assert (answer.headers["x-depo-pool"], answer.headers["x-depo-reason"]) == ("large", "context")
            answer = await gateway.chat("easy", max_tokens=200)
            assert answer.headers["x-depo-reason"] == "context"
            assert not small.seen
            small.script = Script(
                status=400,
                body=b'{"object":"error","message":"This model\'s maximum context length is 100 tokens.","code":400}',
            )
            for stream in (False, True):  # the estimate let it pass, the backend knows better
                answer = await gateway.chat("easy", stream=stream)
                await answer.read()
                assert (answer.status, answer.headers["x-depo-pool"]) == (200, "large")
                assert answer.headers["x-depo-reason"] == "context"
            pinned = await gateway.chat("easy", model="small")
            assert (pinned.status, await pinned.read()) == (400, small.script.body)
            assert await gateway.metric("gateway_fallbacks_total") == 0
            assert await gateway.metric("gateway_in_flight_requests") == 0
            assert await gateway.metric("gateway_circuit_state") == 0
        async with start([small], [large], small={"context_tokens": 1000}, large={"context_tokens": 1000}) as gateway:
            assert (await gateway.chat("easy")).status == 400  # no more room there
        async with start([small], [large]) as gateway:  # nobody said how much either holds: it is worth a try
            assert (await gateway.chat("easy")).headers["x-depo-reason"] == "context"
            large.script, small.script = small.script, Script()
            answer = await gateway.chat("hard")  # and never down to a cheaper one
            assert (answer.status, answer.headers["x-depo-pool"]) == (400, "large")
