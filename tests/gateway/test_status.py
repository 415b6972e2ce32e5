"""/admin/status, the headers of the page, and the metric of the keys' budgets. The page itself: test_status_page.py."""

import asyncio
import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from depo_gateway.estimator.calibration import Curve
from depo_gateway.estimator.records.reasons import Reason
from depo_gateway.gateway import config, status
from depo_gateway.gateway.recent_requests import DECISIONS, SLICE_SECONDS, SLICES, RecentRequests
from depo_gateway.gateway.routing import Decision
from tests.gateway import checkpoints
from tests.gateway.backend import FakeVllm, Script
from tests.gateway.conftest import Running, StartGateway, running, settings

KEY = "sk-depo-one"
SMALL = Decision("small", Reason.CONFIDENT, 0.9, 0.85, "v1")
LARGE = Decision("large", Reason.UNSURE, 0.3, 0.85, "v1")
CURVE = Curve((0.0, 0.5, 0.9), ((1.0, 0.0), (0.75, 0.25), (0.4, 0.6)), (0.5, 0.7, 0.85), 0.9)


async def status_of(gateway: Running) -> dict[str, Any]:
    async with gateway.session.get(f"{gateway.admin}/admin/status") as answer:
        assert answer.status == 200
        return await answer.json()  # type: ignore[no-any-return]


def auth(**limits: Any) -> dict[str, Any]:
    return {"keys": [{"name": "team-a", "sha256": config.key_digest(KEY), **limits}]}


def ended(recent: RecentRequests, began: float, name: str, decision: Decision | None = SMALL, code: int = 200) -> None:
    recent.add(began, name, "chat", decision, code == 200, code, 0.5)


# What is remembered.


def test_the_last_decisions_are_kept_newest_first() -> None:
    recent = RecentRequests(1000.0)
    for index in range(DECISIONS + 7):
        ended(recent, 1000.0 + index, f"req-{index}")
    ended(recent, 2000.0, "refused", None, 429)
    kept = recent.decisions()
    assert [item.id for item in kept] == [f"req-{index}" for index in range(DECISIONS + 6, 6, -1)]
    assert (kept[0].time, kept[0].seconds, kept[0].decision) == (1000.0 + DECISIONS + 6, 0.5, SMALL)


def test_slices_count_what_falls_into_them_and_have_no_gaps() -> None:
    recent = RecentRequests(1000.0)
    for now, decision in ((1000.0, SMALL), (1009.999, SMALL), (1010.0, LARGE), (1045.0, SMALL)):
        recent.count_decision(decision, now)
    ended(recent, 1044.0, "a", SMALL, 200)
    ended(recent, 1044.6, "b", None, 503)
    ended(recent, 1044.7, "c", None, 404)
    slices = recent.slices(1046.0)
    assert [item.number * SLICE_SECONDS for item in slices] == [1000, 1010, 1020, 1030, 1040]
    assert [sum(item.decisions.values()) for item in slices] == [2, 1, 0, 0, 1]
    assert slices[1].decisions == {("large", "unsure"): 1}
    assert [(item.requests, item.failed) for item in slices[-1:]] == [(3, 1)]


def test_slices_end_after_five_minutes_and_begin_with_the_process() -> None:
    recent = RecentRequests(1000.0)
    recent.count_decision(SMALL, 1000.0)
    assert len(recent.slices(1000.0)) == 1
    last = 1000.0 + SLICE_SECONDS * (SLICES - 1)
    assert sum(bool(item.decisions) for item in recent.slices(last)) == 1
    assert len(recent.slices(last)) == len(recent.slices(last + SLICE_SECONDS)) == SLICES
    assert not any(item.decisions for item in recent.slices(last + SLICE_SECONDS))


def test_a_clock_that_is_set_back_loses_nothing_new() -> None:
    recent = RecentRequests(1000.0)
    recent.count_decision(SMALL, 5000.0)
    recent.count_decision(LARGE, 1200.0)
    assert [dict(item.decisions) for item in recent.slices(1205.0)][-1] == {("large", "unsure"): 1}
    recent.count_decision(SMALL, 700.0)  # before the start
    assert [dict(item.decisions) for item in recent.slices(705.0)] == [{("small", "confident"): 1}]


# The content of /admin/status.


async def test_counts_and_costs_are_those_of_the_metrics(start: StartGateway) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway:
        for text, model in (("easy", "auto"), ("easy too", "auto"), ("hard " * 9, "auto"), ("easy", "org/large-9b")):
            await (await gateway.chat(text, model)).read()
        await gateway.chat("easy", "nobody")
        small.script = large.script = Script(status=503)
        assert (await gateway.chat("easy", "small")).status == 503
        state = await status_of(gateway)
        for kind in ("since_start", "lately"):
            found = state[kind]
            assert found["decisions"] == {"small": {"confident": 2}, "large": {"unsure": 1, "pinned": 1}}, kind
            assert (found["requests"], found["failed"]) == (6, 1), kind
        cost = state["since_start"]["cost"]
        assert cost["by_pool"] == pytest.approx({"small": 0.024, "large": 0.12})
        assert cost["total"] == pytest.approx(await gateway.metric("gateway_cost_total"))
        assert cost["all_large"] == pytest.approx(await gateway.metric("gateway_cost_all_large_total")) == 0.24
        assert cost["saved"] == pytest.approx(0.4)
        slices = state["lately"]["slices"]
        assert sum(sum(item["decisions"].values()) for item in slices) == 4
        assert slices[-1]["time"] <= state["time"] < slices[-1]["time"] + SLICE_SECONDS + 1
        assert state["started"] <= state["time"]


async def test_a_gateway_without_traffic_claims_nothing(start: StartGateway) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway:
        state = await status_of(gateway)
    assert state["since_start"]["decisions"] == state["lately"]["decisions"] == {}
    assert state["since_start"]["cost"]["saved"] is None
    assert state["recent"] == []
    assert state["curve"] is None  # this checkpoint's calibration has none


async def test_recent_decisions_tell_who_served_and_why_but_nothing_private(start: StartGateway) -> None:
    headers = {"authorization": f"Bearer {KEY}", "x-depo-reference": "the-reference", "x-request-id": "mine-1"}
    script = Script(text="the-answer")
    async with FakeVllm(script=script) as small, FakeVllm(script=script) as large:
        async with start([small], [large], auth=auth()) as gateway:
            gateway.session.headers.update(headers)
            await (await gateway.chat("easy the-prompt", user="the-user", stream=True)).read()
            del gateway.session.headers["x-request-id"]
            await (await gateway.chat("hard " * 9 + "the-prompt")).read()
            await gateway.chat("easy", "auto-2")  # 404: nothing was decided
            state = await status_of(gateway)
    second, first = state["recent"]
    assert (first["id"], first["endpoint"], first["pool"], first["reason"]) == ("mine-1", "chat", "small", "confident")
    assert first["confidence"] >= first["threshold"] == 0.85
    assert (second["pool"], second["reason"], second["status"], second["answered"]) == ("large", "unsure", 200, True)
    assert second["confidence"] < 0.85
    assert second["time"] >= first["time"] >= state["started"] - 1
    assert 0 < second["seconds"] < 10
    text = json.dumps(state)
    for private in (KEY, "team-a", "the-prompt", "the-answer", "the-reference", "the-user", config.key_digest(KEY)):
        assert private not in text, private


async def test_recent_decisions_that_nobody_answered_say_so(start: StartGateway) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway:
        small.script = Script(before_head_s=30)
        waiting = asyncio.create_task(gateway.chat("easy", "small"))
        assert await small.wait_for(lambda: bool(small.seen))
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert await gateway.settles("gateway_client_disconnects_total", 1)
        large.script = Script(status=503)
        await gateway.chat("easy", "large")
        second, first = (await status_of(gateway))["recent"]
    assert (first["status"], first["answered"], first["pool"]) == (499, False, "small")
    assert (second["status"], second["answered"], second["reason"]) == (503, False, "pinned")


async def test_a_fallback_is_shown_with_the_pool_that_served(start: StartGateway) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway:
        small.script = Script(status=503)
        await (await gateway.chat("easy")).read()
        state = await status_of(gateway)
    assert [(item["pool"], item["reason"]) for item in state["recent"]] == [("large", "fallback")]
    assert state["lately"]["decisions"] == {"large": {"fallback": 1}}


# The curve.


async def test_the_curve_is_the_loaded_checkpoints_and_moves_with_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoints.version(tiny_checkpoint, tmp_path / "one", 0.0, {"gain": CURVE})
    async with FakeVllm() as small, FakeVllm() as large:
        raw = settings([small], [large], tmp_path / "one", routing={"threshold": 0.6})
        async with running(raw) as gateway:
            curve = (await status_of(gateway))["curve"]
            assert curve["thresholds"] == [0.0, 0.5, 0.9]
            assert curve["large_share"] == [0.0, 0.25, 0.6]
            assert curve["quality"] == [0.5, 0.7, 0.85]
            assert curve["cost"] == pytest.approx([0.2, 0.4, 0.68])  # small costs a fifth of large
            assert curve["all_large"] == 0.9
            # Between two thresholds everything below the next one goes, as in Calibration.large_share.
            assert curve["now"] == {"threshold": 0.6, "large_share": 0.6, "cost": pytest.approx(0.68), "quality": 0.85}
        raw["routing"]["threshold"] = 0.95
        async with running(raw) as gateway:
            now = (await status_of(gateway))["curve"]["now"]
            assert now == {"threshold": 0.95, "large_share": 1.0, "cost": 1.0, "quality": 0.9}
        raw["routing"]["rule"] = "difficulty"
        async with running(raw) as gateway:
            assert (await status_of(gateway))["curve"] is None


async def test_a_policys_curve_has_no_quality(tiny_policy_checkpoint: Path) -> None:
    async with FakeVllm() as small, FakeVllm() as large:
        raw = settings([small], [large], tiny_policy_checkpoint, routing={"rule": "difficulty", "threshold": 0.5})
        async with running(raw) as gateway:
            curve = (await status_of(gateway))["curve"]
    assert curve["quality"] is curve["all_large"] is None
    assert curve["cost"] == pytest.approx([0.2 + 0.8 * share for share in curve["large_share"]], abs=1e-5)
    assert 0.0 <= curve["now"]["large_share"] <= 1.0


def test_cost_is_relative_to_the_last_pool() -> None:
    def pools(*costs: float) -> config.Config:
        backends = [{"url": "http://127.0.0.1:1"}]
        named = {f"p{i}": {"model": f"m{i}", "cost": cost, "backends": backends} for i, cost in enumerate(costs)}
        return config.parse_config({"version": 1, "pools": named})

    three = Curve((0.0, 1.0), ((1.0, 0.0, 0.0), (0.5, 0.25, 0.25)), None)
    assert status.relative_cost(three, pools(1, 2, 4)) == pytest.approx([0.25, 0.5])
    assert status.relative_cost(CURVE, pools(3, 3)) == pytest.approx([1.0, 1.0, 1.0])
    assert status.relative_cost(CURVE, pools(0, 0)) is None
    policy = Curve((0.0, 1.0), ((0.0,), (0.5,)), None)
    assert status.relative_cost(policy, pools(1, 2, 4)) == pytest.approx([0.25, 0.625])


# The page's address and headers.


async def test_the_page_may_load_nothing_but_the_status(start: StartGateway) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway:
        async with gateway.session.get(f"{gateway.admin}/admin") as answer:  # led on to /admin/
            assert (answer.status, answer.url.path) == (200, "/admin/")
            text, headers = await answer.text(), answer.headers
        async with gateway.session.get(f"{gateway.url}/admin/") as answer:
            assert answer.status == 404  # clients don't reach it
        async with gateway.session.get(f"{gateway.admin}/admin/status") as answer:
            assert (answer.headers["cache-control"], answer.headers["x-content-type-options"]) == (
                "no-store",
                "nosniff",
            )
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    rules = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    assert rules["default-src"] == rules["form-action"] == rules["base-uri"] == rules["frame-ancestors"] == "'none'"
    assert rules["connect-src"] == "'self'"
    for element in ("style", "script"):
        (inline,) = re.findall(f"<{element}>(.*?)</{element}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert rules[f"{element}-src"] == f"'sha256-{digest}'"
    assert set(re.findall(r"https?://[^\"'`\s]+", text)) == {"http://www.w3.org/2000/svg"}  # a namespace, not loaded
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)


# The budgets' metric.


async def test_a_keys_budget_is_shown_while_the_config_has_the_key(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path, admin = tmp_path / "gateway.yaml", {"port": 0, "key_sha256": config.key_digest("sk-admin")}
    other = {"name": "none", "sha256": "0" * 64, "large_share": 0.0}
    free = {"name": "free", "sha256": "1" * 64}
    async with FakeVllm() as small, FakeVllm() as large:
        raw = settings([small], [large], tiny_checkpoint, auth=auth(large_share=0.25), admin=admin)
        raw["auth"]["keys"] += [other, free]
        path.write_text(yaml.safe_dump(raw, sort_keys=False))
        async with running(raw, path) as gateway:

            async def left() -> dict[str, float]:
                async with gateway.session.get(f"{gateway.admin}/metrics") as answer:
                    lines = (await answer.text()).splitlines()
                found = [re.fullmatch(r'gateway_key_large_share_left\{key="(.*)"\} (.*)', line) for line in lines]
                return {match[1]: float(match[2]) for match in found if match}

            gateway.session.headers["authorization"] = f"Bearer {KEY}"
            assert await left() == {"team-a": 10.0}  # who has no share can't use it up, who has no limit neither
            for _ in range(4):
                assert (await gateway.chat("easy", "large")).status == 200
            assert await left() == {"team-a": pytest.approx(10.0 - 4 * 0.75)}
            assert (await gateway.chat("easy", "small")).status == 200
            assert await left() == {"team-a": pytest.approx(7.25)}
            large.script = Script(status=503)
            assert (await gateway.chat("easy", "large")).status == 503  # given back
            assert await left() == {"team-a": pytest.approx(7.25)}
            raw["auth"]["keys"] = [free]
            path.write_text(yaml.safe_dump(raw, sort_keys=False))
            key = {"authorization": "Bearer sk-admin"}
            assert (await gateway.session.post(f"{gateway.admin}/admin/reload", headers=key)).status == 200
            assert await left() == {}
