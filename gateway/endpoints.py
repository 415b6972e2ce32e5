"""The endpoints beside the hot path: models, the decision alone, health; and the admin port's."""

import hmac
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from depo_gateway import __version__
from depo_gateway.gateway import asgi, feedback, protocol, status
from depo_gateway.gateway.config import key_digest
from depo_gateway.gateway.decide import decide
from depo_gateway.gateway.protocol import ApiError
from depo_gateway.gateway.state import Gateway
from depo_gateway.gateway.state import Request as Bookkeeping

log = logging.getLogger(__name__)

Reload = Callable[[], Awaitable[str]]
REMEDIES = {404: "GET /v1/models lists what is here", 405: "docs/operations/api.md lists each path and its method"}


def create_public(gateway: Gateway) -> FastAPI:
    """What clients reach: /v1/models, /v1/route, /v1/feedback, /livez, /readyz."""
    surface = _new("DEPO Gateway")
    started = int(time.time())

    def model(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": started, "owned_by": "depo-gateway"}

    @surface.get("/v1/models")
    async def models(request: Request) -> Response:
        asgi.authenticate(gateway.live, dict(request.headers.raw))
        return _json({"object": "list", "data": [model(name) for name in (protocol.AUTO, *gateway.live.names)]})

    @surface.get("/v1/models/{name:path}")
    async def one_model(name: str, request: Request) -> Response:
        asgi.authenticate(gateway.live, dict(request.headers.raw))
        if name not in gateway.live.names and name != protocol.AUTO:
            protocol.wanted_threshold(name) if name.startswith(protocol.AUTO + "-") else _unknown(name)
        return _json(model(name))

    @surface.post("/v1/route")
    async def route(request: Request) -> Response:
        live, headers = gateway.live, dict(request.headers.raw)
        key = asgi.authenticate(live, headers)
        gateway.control.admit(key)
        body = await asgi.read_body(request.receive, headers, live.config)
        query = protocol.parse("completions", body)
        if "messages" in query.fields:
            query = protocol.parse("chat", body)
        book = Bookkeeping(query.endpoint, asgi.request_id(headers), time.perf_counter())
        _, decision = await decide(gateway, live, query, key, book)
        told: dict[str, Any] = {
            "pool": decision.pool,
            "model": live.config.pools[decision.pool].model,
            "reason": decision.reason,
            "estimator": decision.estimator,
        }
        if live.config.routing.expose_scores:
            told |= {"confidence": decision.confidence, "threshold": decision.threshold}
        answer = _json(told)
        answer.raw_headers += asgi.decision_headers(live.config, decision) + asgi.common_headers(gateway, book)
        return answer

    @surface.post("/v1/feedback")
    async def take_feedback(request: Request) -> Response:
        live, headers = gateway.live, dict(request.headers.raw)
        key = asgi.authenticate(live, headers)
        body = await asgi.read_body(request.receive, headers, live.config)
        return _json({"status": "stored", "request_id": await feedback.take(gateway, key, body)})

    @surface.get("/livez")
    async def livez() -> Response:
        return _json({"status": "alive"})

    @surface.get("/readyz")
    async def readyz() -> Response:
        reasons = status.unready(gateway)
        return _json({"status": "not ready" if reasons else "ready", "reasons": reasons}, 503 if reasons else 200)

    return surface


def create_admin(gateway: Gateway, reload: Reload | None) -> FastAPI:
    """What operators reach: /metrics, /admin/, /admin/status, /admin/reload.

    `reload` is None where no file holds the config.
    """
    surface = _new("DEPO Gateway admin")

    @surface.get("/metrics")
    async def metrics() -> Response:
        gateway.control.show_budgets()
        return Response(generate_latest(gateway.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @surface.get("/admin/")
    async def page() -> Response:
        body, headers = status.page()
        return Response(body, headers=headers)

    @surface.get("/admin/status")
    async def describe() -> Response:
        answer = _json(status.describe(gateway))
        answer.headers.update(status.PRIVATE)
        return answer

    @surface.post("/admin/reload")
    async def reload_config(request: Request) -> Response:
        wanted = gateway.live.config.admin.key_sha256
        if wanted is None:
            raise ApiError(
                403,
                "Reloading wants an admin key: put admin.key_sha256 into the config "
                "(depo-gateway keys new admin prints one).",
                "no_admin_key",
            )
        key = asgi.bearer_key(dict(request.headers.raw))
        if not hmac.compare_digest(key_digest(key), wanted):
            raise ApiError(
                401, "The admin key is not right: send it as 'Authorization: Bearer KEY'.", "invalid_api_key"
            )
        if reload is None:
            raise ApiError(
                409, "This gateway was not started from a config file; there is nothing to reload.", "no_config"
            )
        try:
            version = await reload()
        except (ValueError, OSError) as error:
            gateway.metrics.config_reloads.labels("refused").inc()
            log.error("the old config stays: %s", error)
            stop = "" if str(error).endswith((".", "?")) else "."  # a hint may be a question
            raise ApiError(422, f"The old config stays: {error}{stop}", "invalid_config") from None
        gateway.metrics.config_reloads.labels("applied").inc()
        return _json({"status": "reloaded", "estimator": version})

    return surface


def _new(title: str) -> FastAPI:
    surface = FastAPI(title=title, version=__version__, docs_url=None, redoc_url=None, openapi_url=None)

    @surface.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return _error(error)

    @surface.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        remedy = REMEDIES.get(error.status_code)
        message = f"{request.method} {request.url.path}: {error.detail}" + (f"; {remedy}." if remedy else ".")
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        headers = tuple((name.lower().encode(), value.encode()) for name, value in (error.headers or {}).items())
        return _error(ApiError(error.status_code, message, code, headers=headers))

    return surface


def _unknown(name: str) -> None:
    raise ApiError(
        404, f"The model {name!r} does not exist; GET /v1/models lists those that do.", "model_not_found", "model"
    )


def _json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


def _error(error: ApiError) -> Response:
    headers = {name.decode(): value.decode() for name, value in error.headers}
    return Response(error.body(), error.status, headers, media_type="application/json")
