"""Every metric of the contract, under its exact name and labels, after some traffic."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from depo_gateway import __version__
from depo_gateway.gateway.metrics import Metrics
from tests.gateway.backend import FakeVllm, Script
from tests.gateway.conftest import Running, StartGateway

# name -> (kind, labels). What is in the contract; records and feedback come with their feature.
CONTRACT: dict[str, tuple[str, set[str]]] = {
    "gateway_requests_total": ("counter", {"endpoint", "pool", "code"}),
    "gateway_request_duration_seconds": ("histogram", {"endpoint", "pool"}),
    "gateway_overhead_seconds": ("histogram", {"endpoint"}),
    "gateway_time_to_first_token_seconds": ("histogram", {"pool"}),
    "gateway_tokens_total": ("counter", {"pool", "type"}),
    "gateway_cost_total": ("counter", {"pool"}),
    "gateway_cost_all_large_total": ("counter", set()),
    "gateway_in_flight_requests": ("gauge", {"pool"}),
    "gateway_queue_wait_seconds": ("histogram", {"pool"}),
    "gateway_client_disconnects_total": ("counter", {"phase"}),
    "gateway_upstream_attempts_total": ("counter", {"backend", "outcome"}),
    "gateway_retries_total": ("counter", {"reason"}),
    "gateway_fallbacks_total": ("counter", {"from_pool", "to_pool", "reason"}),
    "gateway_backend_up": ("gauge", {"backend"}),
    "gateway_circuit_state": ("gauge", {"backend"}),
    "gateway_decisions_total": ("counter", {"pool", "reason"}),
    "gateway_confidence": ("histogram", set()),
    "gateway_threshold": ("gauge", set()),
    "gateway_estimator_duration_seconds": ("histogram", {"stage"}),
    "gateway_estimator_outcomes_total": ("counter", {"outcome"}),
    "gateway_estimator_info": ("gauge", {"version"}),
    "gateway_records_total": ("counter", {"outcome"}),
    "gateway_feedback_total": ("counter", {"outcome"}),
    "gateway_config_reloads_total": ("counter", {"result"}),
    "gateway_build_info": ("gauge", {"version"}),
}


async def families(gateway: Running) -> dict[str, Metric]:
    async with gateway.session.get(f"{gateway.admin}/metrics") as answer:
        assert answer.status == 200
        assert answer.headers["content-type"].startswith("text/plain")
        text = await answer.text()
    return {family.name: family for family in text_string_to_metric_families(text)}


def labels_of(family: Metric) -> set[str]:
    return set().union(*(sample.labels for sample in family.samples)) - {"le"}


async def test_every_metric_of_the_contract_is_there_after_some_traffic(start: StartGateway, tmp_path: Path) -> None:
    broken = Script(status=503)
    async with FakeVllm() as small, FakeVllm() as bad, FakeVllm() as large, start(
        [small, bad],
        [large],
        admin={"port": 0, "key_sha256": "0" * 64},
        records={"url": f"sqlite:///{tmp_path / 'records.db'}"},
    ) as gateway:  # fmt: skip
        bad.script = broken
        for index in range(8):
            await (await gateway.chat(f"easy {index}", stream=bool(index % 2))).read()
        small.script = broken
        assert (await gateway.chat("easy once more")).headers["x-depo-reason"] == "fallback"
        large.script = Script(before_head_s=30)
        waiting = asyncio.create_task(gateway.chat("hard " * 9))
        assert await large.wait_for(lambda: len(large.seen) >= 2)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert await gateway.settles("gateway_client_disconnects_total", 1, phase="waiting")
        await gateway.session.post(f"{gateway.url}/v1/feedback", json={"request_id": "req-1"})
        assert await gateway.settles("gateway_records_total", 10)
        found = await families(gateway)
    for name, (kind, labels) in CONTRACT.items():
        family = found.get(name.removesuffix("_total") if kind == "counter" else name)
        assert family is not None, name
        assert family.type == kind, name
        if name == "gateway_config_reloads_total":  # nothing was reloaded here; see test_surface
            continue
        assert family.samples, name
        assert labels_of(family) == labels, name
        if kind == "counter":
            assert any(sample.name == name for sample in family.samples), name


async def test_numbers_are_what_happened(start: StartGateway) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway:
        await gateway.chat("easy")
        await (await gateway.chat("hard " * 9, stream=True)).read()
        await (await gateway.chat("hard", model="large")).read()
        await gateway.chat("easy", model="nonsense")

        async def value(name: str, **labels: str) -> float:
            return await gateway.metric(f"gateway_{name}", **labels)

        assert await gateway.settles("gateway_requests_total", 4)
        assert await value("requests_total", endpoint="chat", pool="small", code="200") == 1
        assert await value("requests_total", endpoint="chat", pool="large", code="200") == 2
        assert await value("requests_total", endpoint="chat", pool="none", code="404") == 1
        assert await value("decisions_total", pool="large", reason="unsure") == 1
        assert await value("decisions_total", pool="large", reason="pinned") == 1
        assert await value("decisions_total", pool="small", reason="confident") == 1
        assert await value("confidence_count") == 2
        for pool, times in (("small", 1), ("large", 2)):
            assert await value("tokens_total", pool=pool, type="prompt") == 7 * times
            assert await value("tokens_total", pool=pool, type="completion") == 5 * times
        assert abs(await value("cost_total", pool="small") - 0.012) < 1e-9
        assert abs(await value("cost_total", pool="large") - 2 * 5 * 0.012) < 1e-9
        assert abs(await value("cost_all_large_total") - 3 * 5 * 0.012) < 1e-9
        assert await value("time_to_first_token_seconds_count") == 1
        assert await value("time_to_first_token_seconds_count", pool="large") == 1
        assert await value("overhead_seconds_count", endpoint="chat") == 3
        assert await value("queue_wait_seconds_count") == 3
        assert await value("in_flight_requests") == 0
        assert await value("backend_up") == 2
        assert await value("threshold") == 0.85
        assert await value("build_info", version=__version__) == 1
        assert await value("upstream_attempts_total", backend=small.url, outcome="ok") == 1
        assert await value("estimator_outcomes_total", outcome="full") == 2


def test_names_follow_the_rules() -> None:
    for family in Metrics("1").registry.collect():
        name = family.name
        assert name.startswith("gateway_")
        assert re.fullmatch(r"[a-z_]+", name)
        assert family.documentation
        if family.type != "counter":
            assert not name.endswith("_total"), name
        assert not re.search(r"(milliseconds|_ms|minutes)$", name), name


def test_two_gateways_in_one_process_do_not_add_up() -> None:
    one, other = Metrics("1"), Metrics("1")
    one.cost_all_large.inc(3)
    values: list[Any] = [item.registry.get_sample_value("gateway_cost_all_large_total") for item in (one, other)]
    assert values == [3, 0]


async def test_usage_of_odd_shapes_is_not_counted(start: StartGateway) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway:
        for usage in (None, 7, {"prompt_tokens": "7", "completion_tokens": -3}, {"prompt_tokens": None}):
            small.script.body = json.dumps({"choices": [], "usage": usage}).encode()
            assert (await gateway.chat("easy")).status == 200
        assert await gateway.metric("gateway_tokens_total") == 0
