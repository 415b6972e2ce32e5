"""The gateway as an ASGI application. `serve_request` is the whole life of a request.

Chat, completions and embeddings go through one plain ASGI endpoint; everything else is FastAPI (gateway/endpoints.py).
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from depo_gateway.gateway import protocol
from depo_gateway.gateway.asgi import (
    CLIENT_GONE,
    AsgiApp,
    Receive,
    Scope,
    Send,
    authenticate,
    common_headers,
    decision_headers,
    read_body,
    request_id,
)
from depo_gateway.gateway.conversations import AnswerHead
from depo_gateway.gateway.decide import decide
from depo_gateway.gateway.dispatch import Exchange, obtain
from depo_gateway.gateway.protocol import ApiError, Endpoint, Query, UsageTap
from depo_gateway.gateway.request_notes import REFERENCE_HEADER
from depo_gateway.gateway.state import Gateway, Live, Request

SHARE_SMOOTHING = 0.01
FREE = ("confident", "unsure", "explore", "context", "accepts")  # reasons of decisions that the scores made
JSON_TYPE = (b"content-type", b"application/json")

log = logging.getLogger(__name__)


def create_app(gateway: Gateway, surface: AsgiApp) -> AsgiApp:
    """`surface` answers whatever is no model request."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = protocol.PATHS.get(scope["path"]) if scope["type"] == "http" else None
        if endpoint is None:
            await surface(scope, receive, send)
        elif scope["method"] != "POST":
            request = Request(endpoint, request_id(dict(scope["headers"])), time.perf_counter())
            message = f"{scope['path']} takes POST, not {scope['method']}."
            error = ApiError(405, message, "method_not_allowed", headers=((b"allow", b"POST"),))
            await _send_error(error, request, gateway, send)
        else:
            await serve_request(gateway, endpoint, scope, receive, send)

    return app


async def serve_request(gateway: Gateway, endpoint: Endpoint, scope: Scope, receive: Receive, send: Send) -> None:
    """From the first byte of a request to the last of its answer, or to the client's hanging up."""
    live = gateway.live
    task = asyncio.current_task()
    assert task is not None
    headers = dict(scope["headers"])
    request = Request(endpoint, request_id(headers), time.perf_counter())
    notes = request.notes
    watcher: asyncio.Task[None] | None = None
    exchange: Exchange | None = None
    gateway.begin()
    try:
        key = authenticate(live, headers)
        gateway.control.admit(key)
        notes.key, notes.reference = key, headers.get(REFERENCE_HEADER, b"")
        body = await read_body(receive, headers, live.config)
        request.complete = time.perf_counter()
        watcher = asyncio.create_task(_watch(receive, task, request))
        async with asyncio.timeout(live.config.timeouts.total_s):
            query = notes.query = protocol.parse(endpoint, body)
            candidates, decision = await decide(gateway, live, query, key, request)
            decision = gateway.control.commit(request.accounting, key, query.asked, candidates, decision)
            notes.eligible, notes.decision = candidates.pools, decision
            exchange = await obtain(gateway, live, query, candidates, decision, request, headers)
            notes.decision, notes.served = exchange.decision, True
            note(gateway, live, exchange)
            await answer(gateway, live, query, key, exchange, request, send)
    except ApiError as error:
        await _send_error(error, request, gateway, send)
    except TimeoutError:
        limit = live.config.timeouts.total_s
        late = ApiError(504, f"The answer took longer than timeouts.total_s ({limit:g} s).", "timeout")
        await _send_error(late, request, gateway, send)
    except asyncio.CancelledError:
        task.uncancel()
        if not request.gone:  # the server stops and timeouts.drain_s is over
            await _send_error(ApiError(503, "The gateway is shutting down.", "shutting_down"), request, gateway, send)
            return
        request.code = CLIENT_GONE
        gateway.metrics.disconnects.labels(request.phase).inc()
    except Exception:  # boundary: the user gets an answer, the log gets the traceback
        log.exception("request %s failed", request.id)
        await _send_error(
            ApiError(500, "The gateway failed; its log says why.", "internal_error"), request, gateway, send
        )
    finally:
        if watcher is not None:
            watcher.cancel()
        if exchange is not None:
            exchange.close()
        gateway.end()
        gateway.control.conclude(request.accounting, request.working, request.tokens, exchange is not None)
        seconds = time.perf_counter() - request.started
        gateway.metrics.requests.labels(endpoint, request.pool, str(request.code)).inc()
        gateway.metrics.request_duration.labels(endpoint, request.pool).observe(seconds)
        began = time.time() - seconds
        gateway.recent.over(began, request.id, endpoint, notes.decision, notes.served, request.code, seconds)
        if gateway.recorder is not None and notes.key is not None:
            notes.id, notes.endpoint, notes.status = request.id, endpoint, request.code
            notes.time, notes.total_seconds = began, seconds
            gateway.recorder.add(notes)


def note(gateway: Gateway, live: Live, exchange: "Exchange") -> None:
    """Counts a decision that a backend has answered."""
    decision, metrics = exchange.decision, gateway.metrics
    metrics.decisions.labels(decision.pool, decision.reason).inc()
    gateway.recent.decided(decision, time.time())
    if decision.confidence is not None:
        metrics.confidence.observe(decision.confidence)
    if decision.reason in FREE:
        for name in live.config.pools:
            share = gateway.shares.get(name, 1.0 / len(live.config.pools))
            gateway.shares[name] = share + SHARE_SMOOTHING * ((name == decision.pool) - share)


async def answer(
    gateway: Gateway, live: Live, query: Query, key: str, exchange: "Exchange", request: Request, send: Send
) -> None:
    """Sends the backend's answer on, byte for byte, counts its tokens and remembers the conversation's pool."""
    head = AnswerHead()
    head.complete = not (exchange.status == 200 and live.config.routing.sticky and query.endpoint == "chat")

    def remember() -> None:
        gateway.conversations.remember(key, query.messages, head, exchange.decision.pool)

    request.code = exchange.status
    headers = (
        exchange.reply.headers + decision_headers(live.config, exchange.decision) + common_headers(gateway, request)
    )
    if not exchange.streaming:
        whole = protocol.answer_of(exchange.body) if exchange.status == 200 else None
        if whole is not None and query.endpoint != "embeddings":
            request.notes.whole, request.notes.whole_bytes = whole, len(exchange.body)
        count_tokens(gateway, live, request, exchange.decision.pool, protocol.usage_of(whole))
        if not head.complete:
            head.whole(whole)
            remember()
        headers.append((b"content-length", b"%d" % len(exchange.body)))
        request.answered, request.phase = True, "done"
        await send({"type": "http.response.start", "status": exchange.status, "headers": headers})
        await send({"type": "http.response.body", "body": exchange.body})
        return
    tap = UsageTap(drop=not query.asked_usage)
    kept = request.notes.stream = gateway.recorder.stream() if gateway.recorder is not None else None
    data = exchange.body
    idle_s = live.config.timeouts.idle_s
    request.phase, request.answered = "streaming", True
    await send({"type": "http.response.start", "status": exchange.status, "headers": headers})
    request.notes.first_token_seconds = time.perf_counter() - request.complete
    gateway.metrics.first_token.labels(exchange.decision.pool).observe(request.notes.first_token_seconds)
    try:
        while data:
            if out := tap.feed(data):
                if kept is not None:
                    kept.add(out)
                if not head.complete and head.feed(out):  # before the client has it: its follow-up may come at once
                    remember()
                await send({"type": "http.response.body", "body": out, "more_body": True})
            data = await exchange.next_chunk(idle_s)
        request.phase = "done"
        await send({"type": "http.response.body", "body": tap.end()})
    finally:
        if not head.complete:  # interrupted: clients go on from what they have
            remember()
        count_tokens(gateway, live, request, exchange.decision.pool, tap.usage)


def count_tokens(gateway: Gateway, live: Live, request: Request, pool: str, usage: Mapping[str, Any] | None) -> None:
    request.notes.usage = usage
    if usage is None:
        return
    config, metrics = live.config, gateway.metrics
    total = 0
    for kind in ("prompt", "completion"):
        tokens = usage.get(f"{kind}_tokens")
        if isinstance(tokens, int) and tokens > 0:
            metrics.tokens.labels(pool, kind).inc(tokens)
            total += tokens
    request.tokens = total
    dearest = next(reversed(list(config.pools.values())))
    metrics.cost.labels(pool).inc(total / 1000 * config.pools[pool].cost)
    metrics.cost_all_large.inc(total / 1000 * dearest.cost)


async def _watch(receive: Receive, task: "asyncio.Task[Any]", request: Request) -> None:
    """Cancels the request's task when its client hangs up, whatever the task waits for."""
    while (await receive())["type"] != "http.disconnect":
        pass
    if request.phase != "done":  # a server says "disconnect" after a complete answer as well
        request.gone = True
        task.cancel()


async def _send_error(error: ApiError, request: Request, gateway: Gateway, send: Send) -> None:
    if error.status == CLIENT_GONE:
        request.code = CLIENT_GONE
        gateway.metrics.disconnects.labels(request.phase).inc()
        return
    body = error.body()
    request.code = error.status  # also of a stream that began with 200: metrics count how it ended
    begun, request.answered, request.phase = request.answered, True, "done"
    if begun:  # mid-stream: one event, and no [DONE]
        await send({"type": "http.response.body", "body": b"data: " + body + b"\n\n"})
        return
    headers = [JSON_TYPE, (b"content-length", b"%d" % len(body)), *error.headers]
    headers += [item for item in common_headers(gateway, request) if item[0] not in dict(error.headers)]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
