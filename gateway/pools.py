"""Pools of backends: choice of a backend, circuit breakers, health checks, slots and their queue, budget of retries."""

import asyncio
import contextlib
import logging
import os
import random
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from depo_gateway.gateway.config import Config, PoolConfig
from depo_gateway.gateway.metrics import Metrics
from depo_gateway.gateway.upstream import Upstream, UpstreamError

HEALTH_INTERVAL_SECONDS = 2.0
HEALTH_TIMEOUT_SECONDS = 5.0
MISSES_TO_GO_DOWN = 2
FAILURES_TO_OPEN = 3  # consecutive
OPEN_SECONDS = 2.0  # doubled with every failed trial, up to:
LONGEST_OPEN_SECONDS = 30.0
RETRY_WINDOW_SECONDS = 10.0
BUSY_RATE = 100  # requests a second, up to which RetryBudget saves its share of them
CLOSED, HALF_OPEN, OPEN = 0, 1, 2


log = logging.getLogger(__name__)


class NoSlotError(Exception):
    """A pool is full and so is its queue, or the wait in it was too long."""


@dataclass(slots=True, eq=False)
class Backend:
    """One vLLM server as this gateway sees it."""

    url: str  # without /v1
    headers: dict[str, str]
    metrics: Metrics
    in_flight: int = 0
    up: bool = True
    failures: int = 0
    missed: int = 0  # consecutive health checks without an answer
    opened: int = 0  # consecutive openings, up to 10
    open_until: float = 0.0
    state: int = CLOSED

    def usable(self, now: float) -> bool:
        """Whether a request may go there: healthy, and the breaker closed or due for a trial."""
        return self.up and (self.state == CLOSED or (self.state == OPEN and now >= self.open_until))

    def succeeded(self) -> None:
        self.failures = self.opened = 0
        self._enter(CLOSED)

    def failed(self, now: float, refused: bool = False) -> None:
        """Counts a timeout, a broken connection, or a 502, 503 or 504.

        After a refused connection the backend is down until a health check passes.
        """
        if refused:
            self.set_up(False)
        self.failures += 1
        if self.state == HALF_OPEN or self.failures >= FAILURES_TO_OPEN:
            self.open_until = now + min(LONGEST_OPEN_SECONDS, OPEN_SECONDS * 2**self.opened)
            self.opened = min(self.opened + 1, 10)
            self._enter(OPEN)

    def taken(self) -> None:
        self.in_flight += 1
        if self.state == OPEN:
            self._enter(HALF_OPEN)  # this request is the trial

    def released(self) -> None:
        self.in_flight -= 1
        if self.state == HALF_OPEN:  # the trial ended without a result: its client hung up
            self._enter(OPEN)

    def set_up(self, up: bool) -> None:
        if up != self.up:
            log.log(logging.INFO if up else logging.WARNING, "backend %s is %s", self.url, "up" if up else "down")
        self.up = up
        self.metrics.backend_up.labels(self.url).set(up)
        if up and self.state != CLOSED:
            self.succeeded()

    def _enter(self, state: int) -> None:
        if state != self.state:
            if state == OPEN and self.state == CLOSED:
                seconds = self.open_until - time.monotonic()
                log.warning(
                    "circuit of backend %s is open for %.0f s after %d failures", self.url, seconds, self.failures
                )
            elif state == CLOSED:
                log.info("backend %s answers again", self.url)
            self.state = state
            self.metrics.circuit.labels(self.url).set(state)


@dataclass(slots=True, eq=False)
class Pool:
    """One model's backends, and the slots that limit how many requests they serve at once."""

    name: str
    config: PoolConfig
    backends: tuple[Backend, ...]
    in_flight: int = 0
    waiting: deque[asyncio.Future[None]] = field(default_factory=deque)

    def usable(self) -> bool:
        now = time.monotonic()
        return any(backend.usable(now) for backend in self.backends)

    def pick(self, tried: tuple[Backend, ...] = ()) -> Backend | None:
        """The less busy of two random usable backends that were not tried before; None if there is none."""
        now = time.monotonic()
        candidates = [backend for backend in self.backends if backend not in tried and backend.usable(now)]
        if len(candidates) > 2:
            candidates = random.sample(candidates, 2)
        return min(candidates, key=lambda backend: (backend.in_flight, random.random()), default=None)

    async def enter(self, max_queue: int, timeout_s: float) -> None:
        """Takes a slot, after waiting in the queue if the pool is full; `leave` gives it back.

        Raises:
            NoSlotError: `max_queue` requests already wait, or `timeout_s` passed.
        """
        if self.in_flight < self.config.max_in_flight and not self.waiting:
            self.in_flight += 1
            return
        if len(self.waiting) >= max_queue:
            raise NoSlotError(f"{max_queue} requests already wait")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append(turn)
        try:
            async with asyncio.timeout(timeout_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self.leave()  # the slot came together with the timeout or the hang-up: pass it on
            else:
                with contextlib.suppress(ValueError):  # `leave` may have passed over it already
                    self.waiting.remove(turn)
            if isinstance(error, TimeoutError):
                raise NoSlotError(f"no slot came free within {timeout_s:g} s") from None
            raise

    def leave(self) -> None:
        while self.waiting:
            turn = self.waiting.popleft()
            if not turn.done():
                turn.set_result(None)  # the slot changes hands without becoming free
                return
        self.in_flight -= 1


class RetryBudget:
    """Limits second attempts to a share of the requests, so that retries can't multiply an outage.

    A token bucket as in Finagle's RetryBudget: every request adds `share`, every retry takes 1, and `per_second` are
    added besides. It holds what ten seconds add, of up to BUSY_RATE requests a second.
    """

    def __init__(self, share: float, per_second: float) -> None:
        self._share, self._per_second = share, per_second
        self._most = RETRY_WINDOW_SECONDS * per_second
        self._tokens, self._then = self._most, time.monotonic()

    def deposit(self) -> None:
        self._tokens = min(self._most + RETRY_WINDOW_SECONDS * BUSY_RATE * self._share, self._tokens + self._share)

    def withdraw(self) -> bool:
        now = time.monotonic()
        if self._tokens < self._most:
            self._tokens = min(self._most, self._tokens + (now - self._then) * self._per_second)
        self._then = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


def open_pools(config: Config, metrics: Metrics) -> dict[str, Pool]:
    """The pools of a config. Every backend counts as up until a health check or a request fails."""
    metrics.backend_up.clear()  # a reload may remove some
    metrics.circuit.clear()
    pools = {}
    for name, pool in config.pools.items():
        backends = []
        for backend in pool.backends:
            headers = {}
            if backend.api_key_env:
                headers["authorization"] = f"Bearer {os.environ[backend.api_key_env]}"
            backends.append(Backend(backend.url.rstrip("/").removesuffix("/v1"), headers, metrics))
            metrics.backend_up.labels(backends[-1].url).set(1)
            metrics.circuit.labels(backends[-1].url).set(CLOSED)
        metrics.in_flight.labels(name)  # exported from the start; after a reload the old pool's requests still count
        metrics.cost.labels(name)
        metrics.unfamiliar.labels(name)
        pools[name] = Pool(name, pool, tuple(backends))
    return pools


async def watch_health(pools: Mapping[str, Pool], upstream: Upstream) -> None:
    """Checks the health of every backend, forever. The caller awaits `check_all` for the first round."""
    while True:
        await asyncio.sleep(HEALTH_INTERVAL_SECONDS * random.uniform(0.8, 1.2))
        await check_all(pools, upstream)


async def check_all(pools: Mapping[str, Pool], upstream: Upstream) -> None:
    await asyncio.gather(*(_check(backend, upstream) for pool in pools.values() for backend in pool.backends))


async def _check(backend: Backend, upstream: Upstream) -> None:
    """One health check. A busy server may answer late, so only a second miss in a row takes a backend down."""
    try:
        async with asyncio.timeout(HEALTH_TIMEOUT_SECONDS):
            up = await _healthy(backend, upstream)
    except TimeoutError:
        backend.missed += 1
        up = backend.up and backend.missed < MISSES_TO_GO_DOWN
    else:
        backend.missed = 0
    if up != backend.up:
        backend.set_up(up)


async def _healthy(backend: Backend, upstream: Upstream) -> bool:
    # /health is vLLM's, llama.cpp's and SGLang's; a server without it is healthy if it lists its models.
    for path in ("/health", "/v1/models"):
        try:
            reply = await upstream.send("GET", backend.url + path, backend.headers, None)
        except UpstreamError:
            return False
        try:
            await reply.read()
        except UpstreamError:
            return False
        finally:
            reply.close()
        if reply.status not in (404, 405):
            break
    return reply.status == 200
