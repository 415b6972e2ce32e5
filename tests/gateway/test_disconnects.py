"""A client that hangs up, in every phase of its request: the backend hears of it within a second, nothing leaks."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.gateway.backend import FakeVllm, Script
from tests.gateway.conftest import Running, StartGateway, running, settings
from tests.gateway.wire import Wire, chat, connect, request

SOON = 1.0  # seconds; the contract's bound


@contextlib.asynccontextmanager
async def asking(gateway: Running, stream: bool, model: str = "auto") -> AsyncIterator[Wire]:
    """A client that has sent its request and leaves at the end of the block."""
    async with connect(gateway.url) as wire:
        await wire.send(request(chat(model=model, stream=stream)))
        yield wire


async def nothing_is_left(gateway: Running, phase: str, count: int = 1) -> None:
    assert await gateway.settles("gateway_client_disconnects_total", count, phase=phase)
    assert await gateway.metric("gateway_client_disconnects_total") == count
    for name in ("gateway_in_flight_requests", "gateway_circuit_state"):
        assert await gateway.settles(name, 0), name
    assert await gateway.metric("gateway_requests_total", code="499") == count
    async with gateway.session.get(f"{gateway.admin}/admin/status") as answer:
        status = await answer.json()
    assert status["active_requests"] == 0
    for pool in status["pools"].values():
        assert (pool["in_flight"], pool["waiting"]) == (0, 0)
        assert [backend["in_flight"] for backend in pool["backends"]] == [0] * len(pool["backends"])


@pytest.mark.parametrize("leave", ["close", "reset", "half-close"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_while_waiting_for_the_first_byte(start: StartGateway, stream: bool, leave: str) -> None:
    async with FakeVllm(script=Script(before_head_s=30)) as one, start([one], [one]) as gateway:
        async with asking(gateway, stream) as wire:
            assert await one.wait_for(lambda: bool(one.seen))
            if leave == "reset":
                wire.reset()
            elif leave == "half-close":
                wire.writer.write_eof()
            else:
                wire.writer.close()
            left = time.monotonic()
            assert await one.wait_for(lambda: one.seen[0].closed is not None, SOON)
            assert (one.seen[0].closed or 0) - left < SOON
        await nothing_is_left(gateway, "waiting")
        assert await gateway.metric("gateway_upstream_attempts_total", outcome="cancelled") == 1
        assert len(one.seen) == 1  # no retry for a client that is gone


async def test_between_the_head_and_the_first_event(start: StartGateway) -> None:
    async with FakeVllm(script=Script(before_first_s=30)) as one, start([one], [one]) as gateway:
        async with asking(gateway, stream=True):
            assert await one.wait_for(lambda: bool(one.seen))
            await asyncio.sleep(0.1)
        assert await one.wait_for(lambda: one.seen[0].closed is not None, SOON)
        await nothing_is_left(gateway, "waiting")


@pytest.mark.parametrize("pause_s", [30.0, 0.005], ids=["paused", "flowing"])
async def test_in_mid_stream(start: StartGateway, pause_s: float) -> None:
    script = Script(events=100_000, between_s=pause_s)
    async with FakeVllm(script=script) as one, start([one], [one]) as gateway:
        async with asking(gateway, stream=True) as wire:
            await wire.head()
            await anext(wire.chunks())
        assert await one.wait_for(lambda: one.seen[0].closed is not None, SOON)
        await nothing_is_left(gateway, "streaming")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_in_a_pools_queue(start: StartGateway, stream: bool) -> None:
    one = FakeVllm(script=Script(before_head_s=1.5))
    async with one, FakeVllm() as large, start([one], [large], small={"max_in_flight": 1}) as gateway:
        first = asyncio.create_task(gateway.chat(model="small"))
        assert await one.wait_for(lambda: bool(one.seen))
        async with asking(gateway, stream, "small"):
            await asyncio.sleep(0.2)
        assert await gateway.settles("gateway_client_disconnects_total", 1, SOON, phase="queue")
        third = asyncio.create_task(gateway.chat(model="small"))
        assert (await first).status == (await third).status == 200
        assert len(one.seen) == 2  # the one that left was never sent
        await nothing_is_left(gateway, "queue")


async def test_while_the_body_is_still_coming(start: StartGateway) -> None:
    async with FakeVllm() as one, start([one], [one]) as gateway:
        async with connect(gateway.url) as wire:
            await wire.send(request()[:-5])
            await asyncio.sleep(0.1)
        await nothing_is_left(gateway, "reading")
        assert not one.seen


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_while_being_scored(slow_checkpoint: Path, stream: bool) -> None:
    async with FakeVllm() as one:
        raw = settings([one], [one], slow_checkpoint, estimator={"path": str(slow_checkpoint), "deadline_ms": 60_000})
        async with running(raw) as gateway:
            started = time.monotonic()
            long = [asyncio.create_task(gateway.chat(f"{index} " + "easy question " * 2000)) for index in range(32)]
            await asyncio.sleep(0.1)  # they are being scored, and the next one waits behind them
            async with asking(gateway, stream):
                await asyncio.sleep(0.1)
            assert await gateway.settles("gateway_client_disconnects_total", 1, SOON, phase="scoring")
            assert not all(task.done() for task in long), f"scored within {time.monotonic() - started:.1f} s"
            assert {answer.status for answer in await asyncio.gather(*long)} == {200}
            await nothing_is_left(gateway, "scoring")
            assert len(one.seen) == len(long)


async def test_hanging_up_does_not_open_the_breaker(start: StartGateway) -> None:
    async with FakeVllm(script=Script(before_head_s=30)) as one, start([one], [one]) as gateway:
        for index in range(10):
            async with asking(gateway, stream=bool(index % 2), model="small"):
                assert await one.wait_for(lambda: len(one.seen) == index + 1)  # noqa: B023
        await nothing_is_left(gateway, "waiting", 10)
        one.script = Script()
        assert (await gateway.chat(model="small")).status == 200


async def test_many_at_once(start: StartGateway) -> None:
    async with (
        FakeVllm(script=Script(before_head_s=0.3, events=1000, between_s=0.05)) as small,
        FakeVllm(script=Script(before_head_s=30)) as large,
        start([small], [large]) as gateway,
    ):
        async with contextlib.AsyncExitStack() as clients:
            for index in range(40):
                await clients.enter_async_context(asking(gateway, bool(index % 3), "small" if index % 2 else "large"))
            assert await large.wait_for(lambda: len(small.seen) + len(large.seen) == 40)
        for one in (small, large):
            await one.wait_for(lambda: all(item.closed for item in one.seen), 10.0)  # noqa: B023
            assert [item.closed is not None for item in one.seen] == [True] * len(one.seen)
        assert await gateway.settles("gateway_in_flight_requests", 0)
