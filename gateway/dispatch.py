"""Finding a backend that answers: slots, second attempts, other pools. Nothing has gone to the client yet."""

import asyncio
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from depo_gateway.gateway import protocol
from depo_gateway.gateway.control import share_used_up
from depo_gateway.gateway.pools import Backend, NoSlotError, Pool
from depo_gateway.gateway.protocol import ApiError, Query
from depo_gateway.gateway.routing import Decision, Eligible
from depo_gateway.gateway.state import Gateway, Live, Request
from depo_gateway.gateway.upstream import Reply, UpstreamError

RETRIED_STATUS = (502, 503, 504)
UPSTREAM_PATHS = {path: name for name, path in protocol.PATHS.items()}
# How vLLM, llama.cpp and SGLang say that a prompt is too long for the model.
TOO_LONG = re.compile(rb"context[ _](length|size)|exceed_context", re.IGNORECASE)
FORWARDED_HEADERS = (b"traceparent", b"tracestate", b"accept")


@dataclass(slots=True, eq=False)
class Exchange:
    """A backend's answer from its first bytes on, with the slot it holds until `close`."""

    decision: Decision
    pool: Pool
    backend: Backend
    reply: Reply
    status: int
    streaming: bool
    body: bytes  # the whole of it, or a stream's first bytes
    slot: "Slot"

    async def next_chunk(self, idle_s: float) -> bytes:
        """The stream's next bytes, b"" at its end.

        Raises:
            ApiError: 502 or 504; the stream has begun, so it becomes the stream's last event.
        """
        try:
            async with asyncio.timeout(idle_s):
                return await self.reply.chunk()
        except TimeoutError:
            self.backend.failed(time.monotonic())
            raise ApiError(
                504, f"The backend paused for longer than timeouts.idle_s ({idle_s:g} s).", "timeout"
            ) from None
        except UpstreamError:
            self.backend.failed(time.monotonic())
            raise ApiError(502, "The backend broke off in mid-stream.", "backend_broke_off") from None

    def close(self) -> None:
        self.reply.close()
        self.slot.close()


@dataclass(slots=True, eq=False)
class Slot:
    """A place in a pool, and a gauge that says so."""

    gateway: Gateway
    pool: Pool
    backend: Backend | None = None

    def close(self) -> None:
        if self.backend is not None:
            self.backend.released()
        self.pool.leave()
        self.gateway.metrics.in_flight.labels(self.pool.name).dec()


async def obtain(
    gateway: Gateway,
    live: Live,
    query: Query,
    candidates: Eligible,
    decision: Decision,
    request: Request,
    headers: Mapping[bytes, bytes],
) -> Exchange:
    """The first answer that can go to the client: from the decision's pool, from another backend of it, or, unless the
    pool was pinned, from another pool.

    Raises:
        ApiError: 503 when nobody answered, 504 when a stream's first token did not come in time, 429 when the prompt
            is too long for all but the last pool, and the key's share of that one is used up.
    """
    gateway.budget.deposit()
    failure, why = "none of its backends is up", "down"
    attempts = 0
    order, first, last = _order(decision, candidates), decision.pool, list(live.pools)[-1]
    for name in order:
        pool = live.pools[name]
        chosen = decision if name == decision.pool else replace(decision, pool=name, reason="fallback", propensity=1.0)
        if not pool.usable():
            continue
        if name == last != first and not request.accounting.pays():
            if name == decision.pool and request.accounting.account is not None:  # for its room, not for an outage
                raise share_used_up(request.accounting.account, last)
            failure, why = "the key's share of the last pool is used up", "budget"
            continue
        request.pool = name
        try:
            slot = await _enter(gateway, live, pool, request)
        except NoSlotError as error:
            failure, why = f"it is full, {error}", "full"
            continue
        tried: tuple[Backend, ...] = ()
        exchange = None
        try:
            while exchange is None and len(tried) < 2:
                backend = pool.pick(tried)
                if backend is None and why == "reset" and tried and tried[0].usable(time.monotonic()):
                    backend = tried[0]  # an idle connection that closed as it was used: a new one may do
                if backend is None:
                    break
                if attempts:
                    if not gateway.budget.withdraw():
                        raise _unavailable(
                            order, f"{failure}; retries are bounded by the retries section of the config"
                        )
                    gateway.metrics.retries.labels(why).inc()
                attempts += 1
                tried += (backend,)
                try:
                    exchange = await _attempt(gateway, live, query, slot, backend, chosen, request, headers)
                except UpstreamError as error:
                    failure, why = str(error), error.outcome
            if exchange is not None and not _goes_up(live, query, exchange, order):
                if chosen.reason == "fallback":
                    gateway.metrics.fallbacks.labels(decision.pool, name, why).inc()
                return exchange
            if exchange is not None:  # a prompt longer than we thought: the next pool has room for it
                exchange.reply.close()
                request.working = None
                decision = replace(decision, pool=order[order.index(name) + 1], reason="context", propensity=1.0)
                attempts, exchange = 0, None
        except BaseException:
            slot.close()
            raise
        slot.close()
    raise _unavailable(order, failure)


async def _attempt(
    gateway: Gateway,
    live: Live,
    query: Query,
    slot: Slot,
    backend: Backend,
    decision: Decision,
    request: Request,
    headers: Mapping[bytes, bytes],
) -> Exchange:
    """One exchange with one backend up to its first bytes.

    Raises:
        UpstreamError: it failed in a way that another attempt may mend.
        ApiError: 504, the first token did not come in time: the backend is at work, a second one would double it.
    """
    body = protocol.forwarded(query, slot.pool.config.model)
    sent = {"content-type": "application/json", "x-request-id": request.id, **backend.headers}
    sent |= {name.decode(): headers[name].decode("latin-1") for name in FORWARDED_HEADERS if name in headers}
    outcome = "cancelled"
    if slot.backend is not None:
        slot.backend.released()
    slot.backend = backend
    backend.taken()
    reply: Reply | None = None
    kept = False
    request.phase, request.working = "waiting", slot.pool.name
    if not request.departed:
        request.departed = time.perf_counter()
        gateway.metrics.overhead.labels(query.endpoint).observe(request.departed - request.complete - request.queued)
    limit = live.config.timeouts.first_token_s if query.stream else None
    try:
        async with asyncio.timeout(limit):
            reply = await gateway.upstream.send("POST", backend.url + UPSTREAM_PATHS[query.endpoint], sent, body)
            streaming = query.stream and reply.status == 200
            first = await (reply.chunk() if streaming else reply.read())
        if streaming and not first:
            raise UpstreamError("reset", "the stream ended before its first byte")
        if reply.status in RETRIED_STATUS:
            raise UpstreamError(f"status_{reply.status}", f"a backend answered {reply.status}")
        backend.succeeded()
        outcome = "ok" if reply.status < 400 else "client_error" if reply.status < 500 else "error"
        kept = True
        return Exchange(decision, slot.pool, backend, reply, reply.status, streaming, first, slot)
    except UpstreamError as error:
        outcome, request.working = error.outcome, None
        backend.failed(time.monotonic(), refused=outcome == "refused")
        raise
    except TimeoutError:
        outcome = "timeout"
        backend.failed(time.monotonic())
        raise ApiError(504, f"No first token within timeouts.first_token_s ({limit:g} s).", "timeout") from None
    except asyncio.CancelledError:
        if not request.gone:  # timeouts.total_s, and not a byte of an answer
            outcome = "timeout"
            backend.failed(time.monotonic())
        raise
    finally:
        gateway.metrics.attempts.labels(backend.url, outcome).inc()
        if reply is not None and not kept:
            reply.close()


async def _enter(gateway: Gateway, live: Live, pool: Pool, request: Request) -> Slot:
    limits = live.config.limits
    request.phase = "queue"
    started = time.perf_counter()
    await pool.enter(limits.max_queue, limits.queue_timeout_s)
    waited = time.perf_counter() - started
    request.queued += waited
    gateway.metrics.queue_wait.labels(pool.name).observe(waited)
    gateway.metrics.in_flight.labels(pool.name).inc()
    return Slot(gateway, pool)


def _order(decision: Decision, candidates: Eligible) -> list[str]:
    """The chosen pool, then dearer ones, which answer at least as well, then cheaper ones, the dearest first."""
    pools = candidates.pools
    at = pools.index(decision.pool)
    return [*pools[at:], *reversed(pools[:at])]


def _goes_up(live: Live, query: Query, exchange: Exchange, order: list[str]) -> bool:
    """Whether a backend found the prompt too long and a dearer pool follows, not known to have as short a context."""
    if exchange.status != 400 or not TOO_LONG.search(exchange.body):
        return False
    after = order.index(exchange.pool.name) + 1
    names = list(live.pools)
    if after >= len(order) or names.index(order[after]) < names.index(exchange.pool.name):
        return False
    here, there = exchange.pool.config.context_tokens, live.pools[order[after]].config.context_tokens
    return here is None or there is None or there > here


def _unavailable(order: list[str], failure: str) -> ApiError:
    which = f"pool {order[0]}" if len(order) == 1 else f"any of the pools {', '.join(order)}"
    return ApiError(
        503,
        f"No answer from {which}: {failure}. Try again later.",
        "pool_unavailable",
        headers=((b"retry-after", b"1"),),
    )
