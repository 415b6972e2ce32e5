"""Choosing among backends, the breaker, health checks, slots and the queue for them."""

import asyncio
import time

import pytest

from depo_gateway.estimator.configuration.shared import BackendConfig
from depo_gateway.gateway import pools
from depo_gateway.gateway.config import PoolConfig
from depo_gateway.gateway.metrics import Metrics
from depo_gateway.gateway.pools import Backend, NoSlotError, Pool, RetryBudget
from depo_gateway.gateway.upstream import Upstream
from tests.gateway.backend import FakeVllm, Script
from tests.gateway.conftest import StartGateway


def pool(count: int, max_in_flight: int = 256) -> Pool:
    metrics = Metrics("test")
    urls = [f"http://127.0.0.1:{port}" for port in range(1, count + 1)]
    config = PoolConfig("model", tuple(BackendConfig(url) for url in urls), max_in_flight=max_in_flight)
    return Pool("small", config, tuple(Backend(url, {}, metrics) for url in urls))


def test_the_less_busy_of_two_is_picked() -> None:
    one = pool(8)
    for _ in range(4000):  # sampled load as in Mitzenmacher's power of two choices: it stays level
        picked = one.pick()
        assert picked is not None
        picked.taken()
    loads = [backend.in_flight for backend in one.backends]
    assert max(loads) - min(loads) <= 12  # a single random choice spreads over about 90
    busy, free = pool(2).backends
    for _ in range(5):
        busy.taken()
    assert Pool("small", pool(2).config, (busy, free)).pick() is free


def test_what_was_tried_or_is_out_is_not_picked() -> None:
    one = pool(3)
    a, b, c = one.backends
    assert one.pick((a, b)) is c
    assert one.pick((a, b, c)) is None
    b.set_up(False)
    assert {one.pick((a,)) for _ in range(20)} == {c}
    for _ in range(pools.FAILURES_TO_OPEN):
        c.failed(time.monotonic())
    assert one.pick((a,)) is None


def test_the_breaker_opens_tries_and_closes() -> None:
    backend = pool(1).backends[0]
    now = 1000.0
    for _ in range(pools.FAILURES_TO_OPEN - 1):
        backend.failed(now)
    assert backend.usable(now)
    backend.succeeded()  # failures count only in a row
    for _ in range(pools.FAILURES_TO_OPEN):
        assert backend.usable(now)
        backend.failed(now)
    assert not backend.usable(now + pools.OPEN_SECONDS - 0.01)
    trial = now + pools.OPEN_SECONDS
    assert backend.usable(trial)
    backend.taken()
    assert not backend.usable(trial)  # one trial at a time
    backend.failed(trial)
    backend.released()
    assert not backend.usable(trial + 2 * pools.OPEN_SECONDS - 0.01)  # twice as long
    backend.taken()
    backend.released()  # the trial's client hung up: it proved nothing
    assert backend.usable(trial + 2 * pools.OPEN_SECONDS)
    backend.taken()
    backend.succeeded()
    backend.released()
    assert (backend.state, backend.in_flight) == (pools.CLOSED, 0)
    for attempt in range(40):
        backend.failed(now + attempt)
    assert backend.open_until <= now + 40 + pools.LONGEST_OPEN_SECONDS


async def test_slots_go_to_who_waits_longest_and_none_is_lost() -> None:
    one = pool(1, max_in_flight=2)
    order = []

    async def use(number: int, hold_s: float) -> None:
        await one.enter(max_queue=10, timeout_s=5)
        order.append(number)
        try:
            await asyncio.sleep(hold_s)
        finally:
            one.leave()

    tasks = [asyncio.create_task(use(number, 0.05)) for number in range(8)]
    await asyncio.sleep(0.01)
    assert (one.in_flight, len(one.waiting)) == (2, 6)
    tasks[3].cancel()  # in the queue
    tasks[1].cancel()  # in a slot
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [0, 1, 2, 4, 5, 6, 7]
    assert (one.in_flight, len(one.waiting)) == (0, 0)


async def test_a_slot_that_comes_together_with_a_hang_up_is_passed_on() -> None:
    one = pool(1, max_in_flight=1)
    await one.enter(10, 5)
    waiting = asyncio.create_task(one.enter(10, 5))
    await asyncio.sleep(0)
    one.leave()  # hands the slot over ...
    waiting.cancel()  # ... to someone who leaves in the same moment
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert one.in_flight == 0
    async with asyncio.timeout(1):
        await one.enter(10, 5)


async def test_the_queue_is_bounded_in_length_and_time() -> None:
    one = pool(1, max_in_flight=1)
    await one.enter(1, 5)
    with pytest.raises(NoSlotError, match="0 requests already wait"):
        await one.enter(0, 5)
    started = time.monotonic()
    with pytest.raises(NoSlotError, match=r"within 0\.1 s"):
        await one.enter(1, 0.1)
    assert 0.09 < time.monotonic() - started < 1
    assert (one.in_flight, len(one.waiting)) == (1, 0)


def test_the_retry_budget() -> None:
    budget = RetryBudget(share=0.5, per_second=0.0)
    assert not budget.withdraw()
    for _ in range(10):
        budget.deposit()
    assert [budget.withdraw() for _ in range(6)] == [True] * 5 + [False]
    assert sum(RetryBudget(0.0, 1.0).withdraw() for _ in range(5)) == 5
    fixed = RetryBudget(0.0, 0.5)
    assert sum(fixed.withdraw() for _ in range(20)) == 5


async def test_a_full_pool_queues_then_overflows_and_refuses_who_pinned_it(start: StartGateway) -> None:
    one = FakeVllm(script=Script(before_head_s=0.8))
    limits = {"max_queue": 1, "queue_timeout_s": 0.3}
    async with one, FakeVllm() as large, start([one], [large], small={"max_in_flight": 1}, limits=limits) as gateway:
        first = asyncio.create_task(gateway.chat(model="small"))
        assert await one.wait_for(lambda: bool(one.seen))
        assert await gateway.metric("gateway_in_flight_requests", pool="small") == 1
        queued = asyncio.create_task(gateway.chat(model="small"))
        await asyncio.sleep(0.1)
        beyond = await gateway.chat(model="small")
        assert (beyond.status, beyond.headers["retry-after"]) == (503, "1")
        assert "already wait" in (await beyond.json())["error"]["message"]
        late = await queued
        assert late.status == 503
        assert "within 0.3 s" in (await late.json())["error"]["message"]
        over = await gateway.chat()
        assert (over.status, over.headers["x-depo-pool"], over.headers["x-depo-reason"]) == (200, "large", "fallback")
        assert await gateway.metric("gateway_fallbacks_total", reason="full") == 1
        assert (await first).status == 200
        assert (await gateway.chat(model="small")).status == 200
        assert len(one.seen) == 2
        assert await gateway.metric("gateway_in_flight_requests") == 0


async def test_the_breaker_in_a_running_gateway(start: StartGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "OPEN_SECONDS", 0.4)
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway:
        small.script = Script(status=503, body=b"{}")
        for _ in range(pools.FAILURES_TO_OPEN):
            assert (await gateway.chat()).headers["x-depo-reason"] == "fallback"
        assert await gateway.metric("gateway_circuit_state", backend=small.url) == pools.OPEN
        asked = len(small.seen)
        assert (await gateway.chat()).headers["x-depo-pool"] == "large"
        assert len(small.seen) == asked  # left alone
        await asyncio.sleep(0.45)
        small.script = Script(before_head_s=0.2)
        trial, beside = await asyncio.gather(gateway.chat(), gateway.chat())
        assert sorted(answer.headers["x-depo-pool"] for answer in (trial, beside)) == ["large", "small"]
        assert await gateway.metric("gateway_circuit_state", backend=small.url) == pools.CLOSED
        assert (await gateway.chat()).headers["x-depo-pool"] == "small"


async def test_health_checks_take_a_backend_out_and_back(start: StartGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "HEALTH_INTERVAL_SECONDS", 0.1)
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway:
        assert await gateway.settles("gateway_backend_up", 1, backend=small.url)
        small.script = Script(healthy=False)
        assert await gateway.settles("gateway_backend_up", 0, backend=small.url)
        answer = await gateway.chat()
        assert (answer.headers["x-depo-pool"], answer.headers["x-depo-reason"]) == ("large", "fallback")
        assert not small.seen
        small.script = Script()
        assert await gateway.settles("gateway_backend_up", 1, backend=small.url)
        assert (await gateway.chat()).headers["x-depo-pool"] == "small"


async def test_one_health_check_that_goes_unanswered_is_forgiven() -> None:
    metrics = Metrics("test")
    upstream = Upstream(connect_s=2)
    async with FakeVllm(script=Script(health_s=5)) as slow:
        found = Backend(slow.url, {}, metrics)
        one = {"small": Pool("small", PoolConfig("model", (BackendConfig(slow.url),)), (found,))}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pools, "HEALTH_TIMEOUT_SECONDS", 0.1)
            await pools.check_all(one, upstream)
            assert found.up
            await pools.check_all(one, upstream)
            assert not found.up
        slow.script = Script()
        await pools.check_all(one, upstream)
        assert found.up
        await upstream.close()


async def test_a_backend_that_starts_later_is_found(start: StartGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "HEALTH_INTERVAL_SECONDS", 0.1)
    async with FakeVllm() as small, FakeVllm() as large:
        small.script = Script(healthy=False)
        async with start([small], [large]) as gateway:
            assert (await gateway.chat(model="small")).status == 503
            small.script = Script()
            assert await gateway.settles("gateway_backend_up", 1, backend=small.url)
            assert (await gateway.chat(model="small")).status == 200


async def test_requests_spread_over_a_pools_backends(start: StartGateway) -> None:
    slow = Script(before_head_s=0.1)
    async with FakeVllm(script=slow) as a, FakeVllm(script=slow) as b, FakeVllm() as large:
        async with start([a, b], [large]) as gateway:
            await asyncio.gather(*(gateway.chat(model="small") for _ in range(20)))
            assert len(a.seen) == len(b.seen) == 10
