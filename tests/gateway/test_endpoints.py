"""The endpoints beside the hot path, keys, and the admin port's."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from depo_gateway.gateway import config
from tests.gateway.backend import FakeVllm, Script
from tests.gateway.conftest import Running, StartGateway, running, settings

KEY, OTHER, ADMIN = "sk-depo-one", "sk-depo-two", "sk-depo-admin"


def bearer(key: str, scheme: str = "Bearer") -> dict[str, str]:
    return {"authorization": f"{scheme} {key}"}


async def openai_error(answer: aiohttp.ClientResponse, status: int) -> dict[str, Any]:
    assert answer.status == status, await answer.text()
    assert answer.headers["content-type"] == "application/json"
    body = await answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert re.search(r"[^.?][.?]$", body["error"]["message"])
    return body["error"]  # type: ignore[no-any-return]


async def test_models_lists_what_a_request_may_name(start: StartGateway) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway:
        async with gateway.session.get(f"{gateway.url}/v1/models") as answer:
            listed = await answer.json()
        assert listed["object"] == "list"
        assert [item["id"] for item in listed["data"]] == ["auto", "small", "large", "org/small-1b", "org/large-9b"]
        for name in ("auto", "auto-0.85", "small", "org/small-1b", "org%2Fsmall-1b", "o%72g%2Flarge-9b"):
            async with gateway.session.get(
                aiohttp.client.URL(f"{gateway.url}/v1/models/{name}", encoded=True)
            ) as answer:
                assert answer.status == 200, name
                one = await answer.json()
                assert one["object"] == "model"
                assert one["id"] == name.replace("%2F", "/").replace("%72", "r")
        for name in ("nonsense", "auto-2", "auto-", "org/nothing", "org", ""):
            async with gateway.session.get(f"{gateway.url}/v1/models/{name}") as answer:
                error = await openai_error(answer, 404)
                assert (error["code"], error["param"]) == ("model_not_found", "model")


async def route(gateway: Running, **body: Any) -> aiohttp.ClientResponse:
    return await gateway.session.post(f"{gateway.url}/v1/route", json=body)


async def test_route_tells_the_decision_without_a_backend(start: StartGateway) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway:
        hard = await route(gateway, model="auto", messages=[{"role": "user", "content": "hard " * 9}])
        told = await hard.json()
        assert (told["pool"], told["model"], told["reason"]) == ("large", "org/large-9b", "unsure")
        assert told["confidence"] < told["threshold"] == 0.85
        assert (hard.headers["x-depo-pool"], hard.headers["x-depo-reason"]) == ("large", "unsure")
        assert hard.headers["x-depo-estimator"] == told["estimator"] != ""
        assert hard.headers["x-request-id"].startswith("req-")
        prompt = await (await route(gateway, model="auto", prompt='the easy "messages"')).json()
        assert (prompt["pool"], prompt["reason"]) == ("small", "confident")
        quoted = await (await route(gateway, model="auto", prompt="messages")).json()
        assert quoted["pool"] in ("small", "large")
        pinned = await (await route(gateway, model="org/large-9b", prompt="easy")).json()
        assert (pinned["pool"], pinned["reason"], pinned["confidence"]) == ("large", "pinned", None)
        loose = await (await route(gateway, model="auto-0", prompt="hard hard hard")).json()
        assert (loose["pool"], loose["threshold"]) == ("small", 0.0)
        strict = await (await route(gateway, model="auto-1.0", prompt="hard hard hard")).json()
        assert (strict["pool"], strict["threshold"]) == ("large", 1.0)
        await openai_error(await route(gateway, model="nonsense", prompt="easy"), 404)
        await openai_error(await route(gateway, model="auto-7", prompt="easy"), 404)
        await openai_error(await route(gateway, model="auto", messages=[]), 400)
        await openai_error(await gateway.session.post(f"{gateway.url}/v1/route", data=b"{"), 400)
        assert not small.seen
        assert not large.seen
        assert await gateway.metric("gateway_decisions_total") == 0


async def test_scores_are_in_headers_only_if_exposed(start: StartGateway) -> None:
    async with (
        FakeVllm() as small,
        FakeVllm() as large,
        start([small], [large], routing={"expose_scores": False}) as gateway,
    ):
        routed = await route(gateway, model="auto", prompt="easy")
        assert set(await routed.json()) == {"pool", "model", "reason", "estimator"}
        for answer in (routed, await gateway.chat("easy")):
            assert "x-depo-pool" in answer.headers
            assert "x-depo-confidence" not in answer.headers
            assert "x-depo-threshold" not in answer.headers


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/audio/speech", 404),
        ("GET", "/openapi.json", 404),
        ("GET", "/docs", 404),
        ("GET", "/metrics", 404),
        ("GET", "/admin/status", 404),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/route", 405),
        ("DELETE", "/livez", 405),
        ("GET", "/v1/chat/completions", 405),
        ("PUT", "/v1/completions", 405),
        ("DELETE", "/v1/embeddings", 405),
    ],
)
async def test_other_paths_and_methods_are_openai_errors(
    start: StartGateway, method: str, path: str, status: int
) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway:
        answer = await gateway.session.request(method, gateway.url + path)
        error = await openai_error(answer, status)
        assert path in error["message"]
        assert ("allow" in answer.headers) == (status == 405)


async def test_health(start: StartGateway) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway:

        async def ready() -> tuple[int, Any]:
            async with gateway.session.get(f"{gateway.url}/readyz") as answer:
                return answer.status, (await answer.json())["reasons"]

        async with gateway.session.get(f"{gateway.url}/livez") as answer:
            assert (answer.status, await answer.json()) == (200, {"status": "alive"})
        assert await ready() == (200, [])
        await small.kill()
        await gateway.chat("easy")
        assert await ready() == (200, [])  # the other pool still serves
        await large.kill()
        assert (await gateway.chat("easy")).status == 503
        assert await ready() == (503, ["no pool has a usable backend"])
        async with gateway.session.get(f"{gateway.url}/livez") as answer:
            assert answer.status == 200
        async with gateway.session.get(f"{gateway.admin}/admin/status") as answer:
            status = await answer.json()
        assert (status["ready"], status["reasons"]) == (False, ["no pool has a usable backend"])
        assert [pool["backends"][0]["up"] for pool in status["pools"].values()] == [False, False]


async def test_keys_open_the_gateway(start: StartGateway) -> None:
    auth = {"keys": [{"name": "team-a", "sha256": config.key_digest(KEY)}]}
    body = {"model": "auto", "messages": [{"role": "user", "content": "easy"}], "prompt": "x", "input": "x"}
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], auth=auth) as gateway:
        posts = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/route")
        calls = [("POST", path) for path in posts] + [("GET", "/v1/models"), ("GET", "/v1/models/auto")]
        for method, path in calls:
            for headers, code in (
                ({}, "missing_api_key"),
                (bearer(""), "missing_api_key"),
                (bearer(KEY, "Basic"), "missing_api_key"),
                ({"authorization": KEY}, "missing_api_key"),
                (bearer(KEY + "x"), "invalid_api_key"),
                (bearer(KEY.upper()), "invalid_api_key"),
                (bearer(config.key_digest(KEY)), "invalid_api_key"),
                (bearer("schlüssel"), "invalid_api_key"),
            ):
                async with gateway.session.request(method, gateway.url + path, json=body, headers=headers) as answer:
                    error = await openai_error(answer, 401)
                    assert (error["code"], error["type"]) == (code, "authentication_error")
            body["model"] = "small" if path == "/v1/embeddings" else "auto"
            for scheme in ("Bearer", "bearer"):
                async with gateway.session.request(
                    method, gateway.url + path, json=body, headers=bearer(KEY, scheme)
                ) as answer:
                    assert answer.status == 200, path
        assert all("authorization" not in seen.headers for seen in small.seen + large.seen)
        for path in ("/livez", "/readyz"):
            async with gateway.session.get(gateway.url + path) as answer:
                assert answer.status == 200


async def test_a_backend_gets_its_own_key(start: StartGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALL_KEY", "sk-backend")
    async with FakeVllm() as small, FakeVllm() as large:
        pool = {"backends": [{"url": small.url, "api_key_env": "SMALL_KEY"}]}
        async with start([small], [large], small=pool) as gateway:
            await gateway.chat("easy")
        assert small.seen[0].headers["authorization"] == "Bearer sk-backend"


async def test_embeddings_go_to_the_pool_named(start: StartGateway) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway:

        async def embed(model: str) -> aiohttp.ClientResponse:
            return await gateway.session.post(
                f"{gateway.url}/v1/embeddings", json={"model": model, "input": ["a", "b"]}
            )

        large.script.body = b'{"data": [ {"embedding": [0.1, 1e-5]} ], "usage": {"prompt_tokens": 2}}'
        answer = await embed("org/large-9b")
        assert await answer.read() == large.script.body
        assert (answer.headers["x-depo-pool"], answer.headers["x-depo-reason"]) == ("large", "pinned")
        assert (large.seen[0].path, large.seen[0].json) == (
            "/v1/embeddings",
            {"model": "org/large-9b", "input": ["a", "b"]},
        )
        for model in ("auto", "auto-0.5"):
            error = await openai_error(await embed(model), 400)
            assert (error["code"], error["param"]) == ("model_not_routable", "model")
            assert "small, large" in error["message"]
        await openai_error(await embed("nonsense"), 404)


# Reloading.


def write(path: Path, raw: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(raw, sort_keys=False))


async def test_a_reload_swaps_pools_threshold_and_keys_while_requests_run(
    tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "gateway.yaml"

    def auth(*keys: str) -> dict[str, Any]:
        return {"keys": [{"name": key, "sha256": config.key_digest(key)} for key in keys]}

    admin = {"port": 0, "key_sha256": config.key_digest(ADMIN)}
    async with FakeVllm() as small, FakeVllm() as large, FakeVllm() as fresh:
        raw = settings([small], [large], tiny_checkpoint, auth=auth(KEY), admin=admin)
        write(path, raw)
        async with running(raw, path) as gateway:
            gateway.session.headers.update(bearer(KEY))

            async def reload(key: str = ADMIN) -> aiohttp.ClientResponse:
                return await gateway.session.post(f"{gateway.admin}/admin/reload", headers=bearer(key))

            small.script = Script(between_s=0.1, events=10)
            streaming = await gateway.chat("easy", stream=True)
            assert streaming.headers["x-depo-pool"] == "small"
            # Whoever has no admin key reloads nothing.
            write(path, settings([fresh], [large], tiny_checkpoint, auth=auth(OTHER), admin=admin))
            for key in (KEY, "", config.key_digest(ADMIN)):
                assert (await openai_error(await reload(key), 401))["code"] == "invalid_api_key"
            # A bad config keeps the old one.
            for broken in (
                {**raw, "routin": {}},
                {**raw, "estimator": {"path": str(tmp_path / "nowhere")}},
                {**raw, "listen": {"port": 1}},
            ):
                write(path, broken)
                error = await openai_error(await reload(), 422)
                assert error["message"].startswith("The old config stays: ")
                assert re.search(r"[^.?][.?]$", error["message"]), error["message"]  # one mark at its end
                assert error["message"].endswith("did you mean 'routing'?") == ("routin" in broken)
                assert error["code"] == "invalid_config"
            path.write_text("version: [")
            await openai_error(await reload(), 422)
            assert (await gateway.chat("easy")).status == 200
            assert await gateway.metric("gateway_config_reloads_total", result="refused") == 4
            # A good one swaps.
            changed = settings([fresh], [large], tiny_checkpoint, auth=auth(OTHER), admin=admin)
            changed["routing"]["threshold"] = 0.25
            write(path, changed)
            applied = await reload()
            assert (applied.status, (await applied.json())["status"]) == (200, "reloaded")
            assert (await gateway.chat("easy")).status == 401
            gateway.session.headers.update(bearer(OTHER))
            answer = await gateway.chat("easy")
            assert (answer.status, answer.headers["x-depo-threshold"]) == (200, "0.2500")
            assert len(fresh.seen) == 1
            assert await gateway.metric("gateway_threshold") == 0.25
            assert await gateway.metric("gateway_config_reloads_total", result="applied") == 1
            # What ran meanwhile ends as it began.
            body = await streaming.read()
            assert body.count(b'"delta"') == 10
            assert body.endswith(b"data: [DONE]\n\n")
            assert await gateway.settles("gateway_in_flight_requests", 0, pool="small")
            # A backend that is gone from the config is gone from the metrics.
            assert await gateway.metric("gateway_backend_up", backend=small.url) == 0
            assert await gateway.metric("gateway_backend_up", backend=fresh.url) == 1
    for secret in (KEY, OTHER, ADMIN):
        assert config.key_digest(secret) not in caplog.text


async def test_reloading_wants_an_admin_key_in_the_config(start: StartGateway) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway:
        answer = await gateway.session.post(f"{gateway.admin}/admin/reload", headers=bearer(""))
        assert "admin.key_sha256" in (await openai_error(answer, 403))["message"]


async def test_reloading_without_a_file_says_so(start: StartGateway) -> None:
    admin = {"port": 0, "key_sha256": config.key_digest(ADMIN)}
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], admin=admin) as gateway:
        answer = await gateway.session.post(f"{gateway.admin}/admin/reload", headers=bearer(ADMIN, "bearer"))
        await openai_error(answer, 409)


async def test_status_tells_no_secrets(start: StartGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALL_KEY", "sk-backend")
    auth = {"keys": [{"name": "team-a", "sha256": config.key_digest(KEY)}]}
    async with FakeVllm() as small, FakeVllm() as large:
        pool = {"backends": [{"url": small.url, "api_key_env": "SMALL_KEY"}]}
        async with start([small], [large], small=pool, auth=auth) as gateway:
            answer = await gateway.session.get(f"{gateway.admin}/admin/status")
            status = await answer.json()
    assert (status["ready"], status["rule"], status["threshold"]) == (True, "gain", 0.85)
    assert list(status["pools"]) == ["small", "large"]
    assert "sk-backend" not in json.dumps(status)
    assert config.key_digest(KEY) not in json.dumps(status)
