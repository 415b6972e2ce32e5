"""Finds a backend that answers: slots, second attempts, other pools. The client has received nothing yet."""

import asyncio
import re
import time
from dataclasses import dataclass, replace

from depo_gateway.estimator.records.reasons import Reason
from depo_gateway.gateway.config import last_pool
from depo_gateway.gateway.control import share_used_up
from depo_gateway.gateway.openai.errors import ApiError
from depo_gateway.gateway.openai.query import Query, forwarded_body
from depo_gateway.gateway.pools import Backend, NoSlotError, Pool
from depo_gateway.gateway.routing import Decision, Eligible
from depo_gateway.gateway.state import Gateway, RequestState
from depo_gateway.gateway.upstream import Reply, UpstreamError

RETRIED_STATUS = (502, 503, 504)
BACKENDS_PER_POOL = 2
# How vLLM, llama.cpp and SGLang say that a prompt is too long for the model.
PROMPT_TOO_LONG = re.compile(rb"context[ _](length|size)|exceed_context", re.IGNORECASE)


@dataclass(slots=True, eq=False)
class Slot:
    """A place in a pool, counted in the gauge of requests in flight."""

    gateway: Gateway
    pool: Pool
    backend: Backend | None = None

    def use(self, backend: Backend) -> None:
        """Counts the request at this backend instead of the one before."""
        if self.backend is not None:
            self.backend.released()
        self.backend = backend
        backend.taken()

    def close(self) -> None:
        if self.backend is not None:
            self.backend.released()
        self.pool.leave()
        self.gateway.metrics.in_flight.labels(self.pool.name).dec()


@dataclass(slots=True, eq=False)
class Exchange:
    """A backend's answer from its first bytes on. It holds its slot until `close`."""

    decision: Decision
    pool: Pool
    backend: Backend
    reply: Reply
    status: int
    streaming: bool
    body: bytes  # the whole of it, or a stream's first bytes
    slot: Slot

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


async def obtain(
    gateway: Gateway, request: RequestState, query: Query, candidates: Eligible, decision: Decision
) -> Exchange:
    """The first answer that can go to the client: from the decision's pool, from another backend of it, or, unless the
    client named the pool, from another pool.

    Raises:
        ApiError: 503 when no backend answered, 504 when a stream's first token did not come in time, 429 when the
            prompt is too long for all but the last pool and the key's share of that one is used up.
    """
    gateway.retry_budget.deposit()
    search = _Search(gateway, request, query, decision, _order(decision, candidates))
    for name in search.order:
        exchange = await search.ask_pool(name)
        if exchange is not None:
            return exchange
    raise search.unavailable(search.failure)


@dataclass(slots=True, eq=False)
class _Search:
    """One request's search for a backend that answers, through the pools in `order`."""

    gateway: Gateway
    request: RequestState
    query: Query
    decision: Decision  # replaced after a backend reports that the prompt is too long
    order: list[str]
    failure: str = "none of its backends is up"  # the last one, for the error's message
    cause: str = "down"  # the same as a label of metrics
    attempts: int = 0

    async def ask_pool(self, name: str) -> Exchange | None:
        """A pool's answer for the client; None if the next pool is to be asked."""
        pool = self.request.live.pools[name]
        if not pool.usable() or not self._within_budget(name):
            return None
        decision = self.decision
        if name != decision.pool:
            decision = replace(decision, pool=name, reason=Reason.FALLBACK, propensity=1.0)
        self.request.pool = name
        try:
            slot = await _enter(self.gateway, self.request, pool)
        except NoSlotError as error:
            self.failure, self.cause = f"it is full, {error}", "full"
            return None
        try:
            exchange = await self._ask_backends(slot, decision)
            if exchange is not None and not self._too_long_here(exchange):
                if decision is not self.decision:
                    self.gateway.metrics.fallbacks.labels(self.decision.pool, name, self.cause).inc()
                return exchange
            if exchange is not None:
                self._move_up(exchange)
        except BaseException:
            slot.close()
            raise
        slot.close()
        return None

    def unavailable(self, failure: str) -> ApiError:
        order = self.order
        pools = f"pool {order[0]}" if len(order) == 1 else f"any of the pools {', '.join(order)}"
        message = f"No answer from {pools}: {failure}. Try again later."
        return ApiError(503, message, "pool_unavailable", headers=((b"retry-after", b"1"),))

    async def _ask_backends(self, slot: Slot, decision: Decision) -> Exchange | None:
        """The answer of one of a pool's backends; None if none of those tried gave one."""
        tried: tuple[Backend, ...] = ()
        while len(tried) < BACKENDS_PER_POOL:
            backend = slot.pool.pick(tried)
            if backend is None and self.cause == "reset" and tried and tried[0].usable(time.monotonic()):
                backend = tried[0]  # an idle connection that closed as it was used: a new one may work
            if backend is None:
                return None
            self._pay_for_retry()
            tried += (backend,)
            try:
                return await _attempt(self.gateway, self.request, self.query, slot, backend, decision)
            except UpstreamError as error:
                self.failure, self.cause = str(error), error.outcome
        return None

    def _pay_for_retry(self) -> None:
        """Counts an attempt; every one but the first takes from the budget of retries."""
        if self.attempts:
            if not self.gateway.retry_budget.withdraw():
                raise self.unavailable(f"{self.failure}; retries are bounded by the retries section of the config")
            self.gateway.metrics.retries.labels(self.cause).inc()
        self.attempts += 1

    def _within_budget(self, name: str) -> bool:
        """Whether the key's share lets this pool answer, where it is the last one and was not the first choice."""
        accounting, last = self.request.accounting, last_pool(self.request.live.config.pools)
        if name != last or name == self.order[0] or accounting.pay():
            return True
        if (
            name == self.decision.pool and accounting.account is not None
        ):  # reason CONTEXT: no other pool is long enough
            raise share_used_up(accounting.account, last)
        self.failure, self.cause = "the key's share of the last pool is used up", "budget"
        return False

    def _too_long_here(self, exchange: Exchange) -> bool:
        """Whether the backend found the prompt too long, and a dearer pool follows whose context may be longer."""
        if exchange.status != 400 or not PROMPT_TOO_LONG.search(exchange.body):
            return False
        pools, order = self.request.live.pools, self.order
        names, after = list(pools), order.index(exchange.pool.name) + 1
        if after >= len(order) or names.index(order[after]) < names.index(exchange.pool.name):
            return False
        here, there = exchange.pool.config.context_tokens, pools[order[after]].config.context_tokens
        return here is None or there is None or there > here

    def _move_up(self, exchange: Exchange) -> None:
        """Decides for the next pool, because the prompt is longer than it was estimated."""
        exchange.reply.close()
        self.request.working = None
        after = self.order[self.order.index(exchange.pool.name) + 1]
        self.decision = replace(self.decision, pool=after, reason=Reason.CONTEXT, propensity=1.0)
        self.attempts = 0


async def _attempt(
    gateway: Gateway, request: RequestState, query: Query, slot: Slot, backend: Backend, decision: Decision
) -> Exchange:
    """One exchange with one backend up to its first bytes.

    Raises:
        UpstreamError: it failed in a way that another attempt may mend.
        ApiError: 504, the first token did not come in time. The backend is at work; a second one would double that.
    """
    api = query.api
    body, headers = forwarded_body(query, slot.pool.config.model), _backend_headers(request, query, backend)
    outcome = "cancelled"
    slot.use(backend)
    reply: Reply | None = None
    answered = False
    request.phase, request.working = "waiting", slot.pool.name
    if not request.departed:
        request.departed = time.perf_counter()
        gateway.metrics.overhead.labels(api.name).observe(request.departed - request.complete - request.queued)
    limit = request.live.config.timeouts.first_token_s if query.stream else None
    try:
        async with asyncio.timeout(limit):
            reply = await gateway.upstream.send("POST", backend.url + api.path, headers, body)
            streaming = query.stream and reply.status == 200
            first = await (reply.chunk() if streaming else reply.read())
        if streaming and not first:
            raise UpstreamError("reset", "the stream ended before its first byte")
        if reply.status in RETRIED_STATUS:
            raise UpstreamError(f"status_{reply.status}", f"a backend answered {reply.status}")
        backend.succeeded()
        outcome = "ok" if reply.status < 400 else "client_error" if reply.status < 500 else "error"
        answered = True
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
        if not request.gone:  # timeouts.total_s is over, without a byte of an answer
            outcome = "timeout"
            backend.failed(time.monotonic())
        raise
    finally:
        gateway.metrics.attempts.labels(backend.url, outcome).inc()
        if reply is not None and not answered:
            reply.close()


def _backend_headers(request: RequestState, query: Query, backend: Backend) -> dict[str, str]:
    headers = {"content-type": "application/json", "x-request-id": request.id, **backend.headers}
    for name in query.api.forwarded_headers:
        if name in request.headers:
            headers[name.decode()] = request.headers[name].decode("latin-1")
    return headers


async def _enter(gateway: Gateway, request: RequestState, pool: Pool) -> Slot:
    limits = request.live.config.limits
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
