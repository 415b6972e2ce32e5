"""The endpoints that serve no model: models, /v1/route, feedback, health, the admin port. Others: gateway/openai/."""

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
from depo_gateway.gateway import asgi, feedback, status
from depo_gateway.gateway.config import key_digest
from depo_gateway.gateway.decide import decide
from depo_gateway.gateway.model_names import AUTO, requested_threshold, unknown_model
from depo_gateway.gateway.openai.apis import api_of_body
from depo_gateway.gateway.openai.authorization import bearer_key
from depo_gateway.gateway.openai.errors import ApiError, error_body
from depo_gateway.gateway.openai.query import json_object, query_of
from depo_gateway.gateway.state import Gateway, RequestState
from depo_gateway.gateway.state_metrics import show_state

log = logging.getLogger(__name__)

Reload = Callable[[], Awaitable[str]]
REMEDIES = {404: "GET /v1/models lists what is here", 405: "docs/operations/api.md lists each path and its method"}


def create_public(gateway: Gateway) -> FastAPI:
    """The public port's: /v1/models, /v1/route, /v1/feedback, /livez, /readyz."""
    app = _new_app("DEPO Gateway")
    started = int(time.time())

    def model(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": started, "owned_by": "depo-gateway"}

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        asgi.authenticate(gateway.live, bearer_key(dict(request.headers.raw)))
        return _json({"object": "list", "data": [model(name) for name in (AUTO, *gateway.live.names)]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str, request: Request) -> Response:
        asgi.authenticate(gateway.live, bearer_key(dict(request.headers.raw)))
        if name not in gateway.live.names and name != AUTO:
            if not name.startswith(AUTO + "-"):
                raise unknown_model(f"The model {name!r} does not exist; GET /v1/models lists those that do.")
            requested_threshold(name, gateway.live.config.pools)
        return _json(model(name))

    @app.post("/v1/route")
    async def route(request: Request) -> Response:
        return await _decision(gateway, request)

    @app.post("/v1/feedback")
    async def add_feedback(request: Request) -> Response:
        live, headers = gateway.live, dict(request.headers.raw)
        key = asgi.authenticate(live, bearer_key(headers))
        body = await asgi.read_body(request.receive, headers, live.config)
        return _json({"status": "stored", "request_id": await feedback.store_feedback(gateway, key, body)})

    @app.get("/livez")
    async def livez() -> Response:
        return _json({"status": "alive"})

    @app.get("/readyz")
    async def readyz() -> Response:
        reasons = status.unready(gateway)
        return _json({"status": "not ready" if reasons else "ready", "reasons": reasons}, 503 if reasons else 200)

    return app


def create_admin(gateway: Gateway, reload: Reload | None) -> FastAPI:
    """The admin port's: /metrics, /admin/, /admin/status, /admin/reload.

    `reload` is None where no file holds the config.
    """
    app = _new_app("DEPO Gateway admin")

    @app.get("/metrics")
    async def metrics() -> Response:
        show_state(gateway)
        return Response(generate_latest(gateway.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/admin/")
    async def page() -> Response:
        body, headers = status.page()
        return Response(body, headers=headers)

    @app.get("/admin/status")
    async def admin_status() -> Response:
        answer = _json(status.describe(gateway))
        answer.headers.update(status.PRIVATE)
        return answer

    @app.post("/admin/reload")
    async def reload_config(request: Request) -> Response:
        _authenticate_admin(gateway, request)
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

    return app


async def _decision(gateway: Gateway, request: Request) -> Response:
    """Decides as for a request with the same body, without calling a backend."""
    live, headers = gateway.live, dict(request.headers.raw)
    key = asgi.authenticate(live, bearer_key(headers))
    gateway.control.admit(key)
    body = await asgi.read_body(request.receive, headers, live.config)
    fields = json_object(body)
    query = query_of(api_of_body(gateway.apis, fields), fields, body)
    state = RequestState(query.api, live, headers, asgi.request_id(headers), time.perf_counter())
    _, decision = await decide(gateway, state, query, key)
    described: dict[str, Any] = {
        "pool": decision.pool,
        "model": live.config.pools[decision.pool].model,
        "reason": decision.reason,
        "estimator": decision.estimator,
    }
    if live.config.routing.expose_scores:
        described |= {"confidence": decision.confidence, "threshold": decision.threshold}
    answer = _json(described)
    answer.raw_headers += asgi.decision_headers(live.config, decision) + asgi.common_headers(gateway, state)
    return answer


def _authenticate_admin(gateway: Gateway, request: Request) -> None:
    """Raises ApiError, 403 or 401, unless the request carries the admin key."""
    expected = gateway.live.config.admin.key_sha256
    if expected is None:
        raise ApiError(
            403,
            "Reloading requires an admin key: put admin.key_sha256 into the config "
            "(depo-gateway keys new admin prints one).",
            "no_admin_key",
        )
    key = bearer_key(dict(request.headers.raw))
    if not hmac.compare_digest(key_digest(key), expected):
        raise ApiError(401, "The admin key is not valid: send it as 'Authorization: Bearer KEY'.", "invalid_api_key")


def _new_app(title: str) -> FastAPI:
    app = FastAPI(title=title, version=__version__, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return _error(error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        remedy = REMEDIES.get(error.status_code)
        message = f"{request.method} {request.url.path}: {error.detail}" + (f"; {remedy}." if remedy else ".")
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        headers = tuple((name.lower().encode(), value.encode()) for name, value in (error.headers or {}).items())
        return _error(ApiError(error.status_code, message, code, headers=headers))

    return app


def _json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


def _error(error: ApiError) -> Response:
    headers = {name.decode(): value.decode() for name, value in error.headers}
    return Response(error_body(error), error.status, headers, media_type="application/json")
