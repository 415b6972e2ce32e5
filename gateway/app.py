"""The gateway as an ASGI application. `serve_request` is the whole life of a request.

The endpoints that serve models (gateway/openai/apis.py) go through one plain ASGI endpoint; everything else is FastAPI
(gateway/endpoints.py).
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

from depo_gateway.gateway.asgi import (
    CLIENT_GONE,
    AsgiApp,
    HeaderList,
    Receive,
    Scope,
    Send,
    authenticate,
    common_headers,
    decision_headers,
    read_body,
    request_id,
)
from depo_gateway.gateway.config import last_pool
from depo_gateway.gateway.conversations import AnswerHead
from depo_gateway.gateway.decide import decide
from depo_gateway.gateway.dispatch import Exchange, obtain
from depo_gateway.gateway.openai.api import Api
from depo_gateway.gateway.openai.errors import ApiError
from depo_gateway.gateway.openai.query import Query, json_object, query_of
from depo_gateway.gateway.openai.server_sent_events import json_of
from depo_gateway.gateway.openai.usage import Usage, UsageFilter
from depo_gateway.gateway.request_notes import REFERENCE_HEADER
from depo_gateway.gateway.routing import Decision
from depo_gateway.gateway.state import Gateway, RequestState

SHARE_SMOOTHING = 0.01
JSON_TYPE = (b"content-type", b"application/json")

log = logging.getLogger(__name__)


def create_app(gateway: Gateway, other_endpoints: AsgiApp) -> AsgiApp:
    """The application on the public port; `other_endpoints` answers every path that no `Api` has."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        api = gateway.apis.get(scope["path"]) if scope["type"] == "http" else None
        if api is None:
            await other_endpoints(scope, receive, send)
            return
        request = _new_request(gateway, api, scope)
        if scope["method"] == "POST":
            await serve_request(gateway, request, receive, send)
        else:
            message = f"{scope['path']} takes POST, not {scope['method']}."
            error = ApiError(405, message, "method_not_allowed", headers=((b"allow", b"POST"),))
            await _send_error(error, request, gateway, send)

    return app


async def serve_request(gateway: Gateway, request: RequestState, receive: Receive, send: Send) -> None:
    """From the first byte of a request to the last of its answer, or until the client hangs up."""
    task = asyncio.current_task()
    assert task is not None
    gateway.begin()
    try:
        await _answer(gateway, request, task, receive, send)
    except ApiError as error:
        await _send_error(error, request, gateway, send)
    except TimeoutError:
        limit = request.live.config.timeouts.total_s
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
        failed = ApiError(500, "The gateway failed; its log says why.", "internal_error")
        await _send_error(failed, request, gateway, send)
    finally:
        gateway.end()
        _account(gateway, request)


async def _answer(
    gateway: Gateway, request: RequestState, task: "asyncio.Task[Any]", receive: Receive, send: Send
) -> None:
    """The path of a request without errors."""
    live, notes = request.live, request.notes
    watcher: asyncio.Task[None] | None = None
    exchange: Exchange | None = None
    try:
        key = authenticate(live, request.api.api_key(request.headers), request.api.key_header)
        gateway.control.admit(key)
        notes.key, notes.reference = key, request.headers.get(REFERENCE_HEADER, b"")
        body = await read_body(receive, request.headers, live.config)
        request.complete = time.perf_counter()
        watcher = asyncio.create_task(_cancel_on_disconnect(receive, task, request))
        async with asyncio.timeout(live.config.timeouts.total_s):
            query = notes.query = query_of(request.api, json_object(body), body)
            candidates, decision = await decide(gateway, request, query, key)
            decision = gateway.control.commit(request.accounting, key, query.prompt, candidates, decision)
            notes.eligible, notes.decision = candidates.pools, decision
            exchange = await obtain(gateway, request, query, candidates, decision)
            notes.decision, notes.served = exchange.decision, True
            _count_decision(gateway, request, exchange.decision)
            if exchange.streaming:
                await _send_stream(gateway, request, query, exchange, send)
            else:
                await _send_whole(gateway, request, query, exchange, send)
    finally:
        if watcher is not None:
            watcher.cancel()
        if exchange is not None:
            exchange.close()


async def _send_whole(gateway: Gateway, request: RequestState, query: Query, exchange: Exchange, send: Send) -> None:
    """Forwards an answer that is not a stream, byte for byte."""
    notes, head = request.notes, _answer_head(request, query, exchange)
    answer = json_of(exchange.body) if exchange.status == 200 else None
    if answer is not None and query.api.answer_piece is not None:
        notes.whole, notes.whole_bytes = answer, len(exchange.body)
    with _reading_answer(request):
        _count_tokens(gateway, request, exchange.decision.pool, query.api.usage(answer))
    if head is not None:
        with _reading_answer(request):
            head.whole(answer)
            _remember(gateway, request, query, exchange, head)
    headers = [*_headers(gateway, request, exchange), (b"content-length", b"%d" % len(exchange.body))]
    request.code = exchange.status
    request.answered, request.phase = True, "done"
    await send({"type": "http.response.start", "status": exchange.status, "headers": headers})
    await send({"type": "http.response.body", "body": exchange.body})


async def _send_stream(gateway: Gateway, request: RequestState, query: Query, exchange: Exchange, send: Send) -> None:
    """Forwards a stream as it arrives, without a usage chunk that the client did not request."""
    notes, head = request.notes, _answer_head(request, query, exchange)

    def usage_of(event: Any) -> Usage | None:
        usage = None
        with _reading_answer(request):
            usage = query.api.usage(event)
        return usage

    events = UsageFilter(usage_of, remove=query.adds_usage)
    copy = notes.stream = gateway.recorder.stream_copy() if gateway.recorder is not None else None
    data = exchange.body
    idle_s = request.live.config.timeouts.idle_s
    request.code, request.phase, request.answered = exchange.status, "streaming", True
    headers = _headers(gateway, request, exchange)
    await send({"type": "http.response.start", "status": exchange.status, "headers": headers})
    notes.first_token_seconds = time.perf_counter() - request.complete
    gateway.metrics.first_token.labels(exchange.decision.pool).observe(notes.first_token_seconds)
    try:
        while data:
            if out := events.feed(data):
                if copy is not None:
                    copy.add(out)
                # Before the client has it, because its follow-up may come at once.
                if head is not None and not head.complete:
                    with _reading_answer(request):
                        if head.feed(out):
                            _remember(gateway, request, query, exchange, head)
                await send({"type": "http.response.body", "body": out, "more_body": True})
            data = await exchange.next_chunk(idle_s)
        request.phase = "done"
        await send({"type": "http.response.body", "body": events.end()})
    finally:
        if head is not None and not head.complete:  # interrupted: clients continue from what they received
            with _reading_answer(request):
                _remember(gateway, request, query, exchange, head)
        _count_tokens(gateway, request, exchange.decision.pool, events.usage)


@contextlib.contextmanager
def _reading_answer(request: RequestState) -> Iterator[None]:
    """Reads an answer for counts and follow-ups. Whatever it holds, the client gets it."""
    try:
        yield
    except Exception:  # boundary: the log gets the traceback, once a request
        if not request.unreadable:
            log.exception("request %s: the answer can't be read as %s's", request.id, request.api.name)
        request.unreadable = True


def _new_request(gateway: Gateway, api: Api, scope: Scope) -> RequestState:
    headers = dict(scope["headers"])
    return RequestState(api, gateway.live, headers, request_id(headers), time.perf_counter())


def _headers(gateway: Gateway, request: RequestState, exchange: Exchange) -> HeaderList:
    decided = decision_headers(request.live.config, exchange.decision)
    return [*exchange.reply.headers, *decided, *common_headers(gateway, request)]


def _answer_head(request: RequestState, query: Query, exchange: Exchange) -> AnswerHead | None:
    """Collects the beginning of the answer, which identifies a follow-up; None where none is recognised."""
    sticky = request.live.config.routing.sticky and exchange.status == 200
    recognisable = query.messages or query.api.continues_answers
    return AnswerHead(read) if (read := query.api.answer_piece) is not None and sticky and recognisable else None


def _remember(gateway: Gateway, request: RequestState, query: Query, exchange: Exchange, head: AnswerHead) -> None:
    gateway.conversations.remember(request.notes.key or "", query.messages, head, exchange.decision.pool)


def _count_decision(gateway: Gateway, request: RequestState, decision: Decision) -> None:
    """Counts a decision that a backend has answered."""
    metrics, pools = gateway.metrics, request.live.config.pools
    metrics.decisions.labels(decision.pool, decision.reason.value).inc()
    gateway.recent.count_decision(decision, time.time())
    if request.notes.scored is not None and request.notes.scored.unfamiliar:
        metrics.unfamiliar.labels(decision.pool).inc()
    if decision.confidence is not None:
        metrics.confidence.observe(decision.confidence)
    if decision.reason.in_shares:
        for name in pools:
            share = gateway.shares.get(name, 1.0 / len(pools))
            gateway.shares[name] = share + SHARE_SMOOTHING * ((name == decision.pool) - share)


def _count_tokens(gateway: Gateway, request: RequestState, pool: str, usage: Usage | None) -> None:
    request.notes.usage = usage
    if usage is None:
        return
    pools, metrics = request.live.config.pools, gateway.metrics
    total = 0
    for kind in ("prompt", "completion"):
        tokens = usage.get(f"{kind}_tokens")
        if isinstance(tokens, int) and tokens > 0:
            metrics.tokens.labels(pool, kind).inc(tokens)
            total += tokens
    request.tokens = total
    dearest = pools[last_pool(request.live.config.pools)]
    metrics.cost.labels(pool).inc(total / 1000 * pools[pool].cost)
    metrics.cost_all_large.inc(total / 1000 * dearest.cost)


def _account(gateway: Gateway, request: RequestState) -> None:
    """Counts a request that has ended, however it ended, and hands its notes to the recorder."""
    api, notes, metrics = request.api, request.notes, gateway.metrics
    gateway.control.conclude(request.accounting, request.working, request.tokens, notes.served)
    seconds = time.perf_counter() - request.started
    metrics.requests.labels(api.name, request.pool, str(request.code)).inc()
    metrics.request_duration.labels(api.name, request.pool).observe(seconds)
    began = time.time() - seconds
    gateway.recent.add(began, request.id, api.name, notes.decision, notes.served, request.code, seconds)
    if gateway.recorder is not None and notes.key is not None:
        notes.status, notes.time, notes.total_seconds = request.code, began, seconds
        gateway.recorder.add(notes)


async def _cancel_on_disconnect(receive: Receive, task: "asyncio.Task[Any]", request: RequestState) -> None:
    """Cancels the request's task when its client hangs up, whatever the task waits for."""
    while (await receive())["type"] != "http.disconnect":
        pass
    if request.phase != "done":  # a server reports "disconnect" after a complete answer as well
        request.gone = True
        task.cancel()


async def _send_error(error: ApiError, request: RequestState, gateway: Gateway, send: Send) -> None:
    if error.status == CLIENT_GONE:
        request.code = CLIENT_GONE
        gateway.metrics.disconnects.labels(request.phase).inc()
        return
    request.code = error.status  # also of a stream that began with 200: metrics count how it ended
    begun, request.answered, request.phase = request.answered, True, "done"
    if begun:
        await send({"type": "http.response.body", "body": request.api.error_event(error)})
        return
    body = request.api.error_body(error)
    headers = [JSON_TYPE, (b"content-length", b"%d" % len(body)), *error.headers]
    headers += [item for item in common_headers(gateway, request) if item[0] not in dict(error.headers)]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
