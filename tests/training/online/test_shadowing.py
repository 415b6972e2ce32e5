"""Shadowing against servers that play vLLM, on a real store."""

import asyncio
import itertools
import logging
import math
import re
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from depo_gateway.estimator.configuration.shared import BackendConfig, PoolBackends
from depo_gateway.estimator.records.store import Store
from depo_gateway.estimator.records.types import Label, Record
from depo_gateway.estimator.text import TextConfig
from depo_gateway.training.evaluation.logged_traffic import traffic_of
from depo_gateway.training.judging import label_sources, openai_client, pool_client
from depo_gateway.training.judging.judges import Judge, JudgeConfig
from depo_gateway.training.judging.label_sources import LabelSource, open_judge
from depo_gateway.training.judging.pool_client import PoolClient
from depo_gateway.training.online import settings as learner_settings
from depo_gateway.training.online import shadowing
from depo_gateway.training.online.metrics import LearnerMetrics
from depo_gateway.training.online.settings import ShadowConfig
from depo_gateway.training.online.shadowing import Shadow, in_shadow_share
from depo_gateway.training.online.spend_ledger import SpendLedger
from depo_gateway.training.outcomes.label_precedence import preferred_qualities
from depo_gateway.training.outcomes.traffic_config import TrafficConfig
from depo_gateway.training.outcomes.traffic_examples import examples_of_traffic
from tests.training.fake_vllm import chat, record, says, vllm

REAL = time.time()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_client, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(pool_client, "QUEUE_LENGTH_SECONDS", 0.0)
    monkeypatch.setattr(shadowing, "SHADOW_POLL_SECONDS", 0.01)
    monkeypatch.setattr(shadowing, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(shadowing, "LONGEST_SHADOW_WAIT_SECONDS", 0.05)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(f"sqlite:///{tmp_path}/records.db")
    made.create()
    yield made
    made.close()


@dataclass
class Running:
    shadow: Shadow
    metrics: LearnerMetrics
    task: asyncio.Task[None]

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"learner_{name}", labels) or 0.0

    async def until(self, condition: Callable[[], Any]) -> None:
        for _ in range(2000):
            if condition() or self.task.done():
                break
            await asyncio.sleep(0.01)
        if self.task.done():
            self.task.result()
        assert condition()


@asynccontextmanager
async def running_shadow(
    store: Store,
    urls: Mapping[str, str],
    kind: str = "exact",
    clock: Callable[[], float] = time.monotonic,
    ledger: SpendLedger | None = None,
    **settings: Any,
) -> Any:
    metrics = LearnerMetrics("0")
    costs = {"small": 1.0, "large": 5.0}
    pools = {
        name: PoolBackends(f"org/{name}", (BackendConfig(f"{url}/v1/"),), costs[name]) for name, url in urls.items()
    }
    async with aiohttp.ClientSession() as session:
        config = ShadowConfig(**{"share": 1.0, **settings})
        client = PoolClient(session, pools, metrics, config.priority, config.timeout_s)
        async with open_judge(JudgeConfig(kind), session, client, metrics.count_verdict) as judge:
            spent = SpendLedger(Path(tempfile.mkdtemp()), clock) if ledger is None else ledger
            made = Shadow(store, client, judge, kind, config, metrics, spent, clock=clock)
            running = Running(made, metrics, asyncio.create_task(made.run()))
            try:
                yield running
            finally:
                running.task.cancel()
                await asyncio.gather(running.task, return_exceptions=True)


def labels(store: Store) -> dict[str, dict[str, tuple[float | None, float | None]]]:
    """By request id and pool: (quality, token confidence)."""
    return {
        item.record.id: {label.pool: (label.quality, label.token_confidence) for label in item.labels}
        for item in store.labelled(1000)
    }


async def test_the_pool_that_did_not_serve_is_asked_as_the_client_asked(store: Store) -> None:
    parameters = {
        "temperature": 0.3,
        "max_tokens": 4000,
        "min_tokens": 2000,
        "stream": True,
        "stream_options": {"include_usage": True},
        "n": 4,
        "tools": [{"type": "function"}],
        "tomorrow": {"x": 1},
    }
    store.append([record(7, REAL, parameters=parameters, reference="7")])
    with vllm(says("8")) as large, vllm(says("never asked")) as small:
        async with running_shadow(store, {"small": small.url, "large": large.url}, max_tokens=500) as running:
            await running.until(lambda: running.count("shadowed_records_total", outcome="done"))
            await running.until(lambda: running.count("labels_total", source="exact") == 2)
        assert small.bodies == []
        assert large.paths == ["/v1/chat/completions"]
        assert large.bodies == [
            {
                "model": "org/large",
                "messages": [{"role": "user", "content": "what is 7+0"}],
                "temperature": 0.3,
                "tools": [{"type": "function"}],
                "tomorrow": {"x": 1},
                "logprobs": True,
                "top_logprobs": 1,
                "priority": 10,
                "max_tokens": 500,
                "min_tokens": 500,
            }
        ]
    assert labels(store) == {"id-7": {"small": (1.0, None), "large": (0.0, pytest.approx(math.exp(-0.5)))}}
    (item,) = store.labelled(1)
    assert {label.source for label in item.labels} == {"exact"}
    assert running.count("labels_total", source="exact") == 2
    assert running.count("shadow_requests_total", pool="large", outcome="ok") == 1
    assert running.count("shadow_cost_total") == pytest.approx(0.5)  # 100 tokens at 5 for 1,000


async def test_a_completion_is_asked_as_one(store: Store) -> None:
    store.append([record(1, REAL, endpoint="completions", asked="1+0=", parameters={"max_tokens": 5})])
    answer = {"choices": [{"text": "1", "finish_reason": "length", "logprobs": {"token_logprobs": [None, -0.1, -0.3]}}]}
    with vllm(lambda body: (200, answer)) as large:
        async with running_shadow(store, {"large": large.url}, "none") as running:
            await running.until(lambda: store.labelled(1))
        assert large.paths == ["/v1/completions"]
        body = large.bodies[0]
        assert (body["prompt"], body["logprobs"], body["max_tokens"]) == ("1+0=", 1, 5)
    assert labels(store) == {"id-1": {"large": (None, pytest.approx(math.exp(-0.2)))}}
    assert running.count("shadow_cost_total") > 0  # estimated where the server reports no usage


async def test_an_answer_that_our_own_limit_cut_is_not_judged(store: Store) -> None:
    store.append([record(1, REAL, reference="1"), record(2, REAL, reference="2", parameters={"max_tokens": 3})])
    with vllm(lambda body: (200, chat("1", finish="length"))) as large:
        async with running_shadow(store, {"large": large.url}, max_tokens=20) as running:
            await running.until(lambda: not store.unshadowed(10))
    found = labels(store)
    assert found["id-1"]["large"][0] is None
    assert found["id-2"]["large"][0] == 0.0  # the client's own limit: this is what it would have got


@pytest.mark.parametrize("fields", [{"answer": None}, {"answer": "1", "finish_reason": ""}, {"answer": ""}])
async def test_the_serving_pool_is_asked_again_where_its_answer_is_not_whole(
    store: Store, fields: dict[str, Any]
) -> None:
    store.append([record(1, REAL, reference="1", **fields), record(2, REAL, **fields)])
    with vllm(says("1")) as small, vllm(says("2")) as large:
        async with running_shadow(store, {"small": small.url, "large": large.url}) as running:
            await running.until(lambda: not store.unshadowed(10))
        assert len(small.bodies) == 1  # not for the record without a reference: nothing could be judged
    assert {pool: quality for pool, (quality, _) in labels(store)["id-1"].items()} == {"small": 1.0, "large": 0.0}


async def test_confidence_of_the_serving_pool_is_asked_for_where_wanted(store: Store) -> None:
    store.append([record(1, REAL, reference="1")])
    with vllm(says("other")) as small, vllm(says("2")) as large:
        urls = {"small": small.url, "large": large.url}
        async with running_shadow(store, urls, confidence_of_served=True) as running:
            await running.until(lambda: not store.unshadowed(10))
    assert labels(store)["id-1"]["small"] == (1.0, pytest.approx(math.exp(-0.5)))  # the served answer is judged


async def test_a_call_of_tools_is_an_answer(store: Store) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    wanted = '{"arguments": "{}", "name": "add"}'
    store.append([record(1, REAL, reference=wanted)])
    with vllm(lambda body: (200, chat(None, tool_calls=[call]))) as large:
        async with running_shadow(store, {"large": large.url}) as running:
            await running.until(lambda: not store.unshadowed(10))
    assert labels(store)["id-1"]["large"][0] == 1.0


async def test_the_share_is_chosen_by_a_hash_and_other_records_are_skipped(store: Store) -> None:
    store.append([record(number, REAL + number / 1000) for number in range(300)])
    wanted = {item.id for item in store.unshadowed(1000) if in_shadow_share(item, 0.25)}
    assert 45 <= len(wanted) <= 105
    with vllm(says("x")) as large:
        async with running_shadow(store, {"large": large.url}, "none", share=0.25) as running:
            await running.until(lambda: not store.unshadowed(10))
    assert set(labels(store)) == wanted
    assert running.count("shadowed_records_total", outcome="passed") == 300 - len(wanted)


async def test_old_records_are_skipped(store: Store) -> None:
    store.append([record(1, REAL - 7200), record(2, REAL)])
    with vllm(says("x")) as large:
        async with running_shadow(store, {"large": large.url}, "none", max_age_hours=1.0, max_concurrent=1) as running:
            await running.until(lambda: store.labelled(1))
    assert set(labels(store)) == {"id-2"}


async def test_concurrency_is_bounded(store: Store) -> None:
    store.append([record(number, REAL) for number in range(30)])

    def slowly(body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.02)
        return 200, chat("x")

    with vllm(slowly) as large:
        async with running_shadow(store, {"large": large.url}, "none", max_concurrent=3) as running:
            await running.until(lambda: not store.unshadowed(10))
        assert large.most_at_once == 3


async def test_the_cost_cap_holds_until_the_hour_is_over(store: Store) -> None:
    store.append([record(number, REAL) for number in range(10)])
    now = [0.0]
    with vllm(says("x")) as large:  # each call costs 0.5
        async with running_shadow(
            store, {"large": large.url}, "none", clock=lambda: now[0], max_concurrent=1, cost_per_hour=1.5
        ) as running:
            await running.until(lambda: running.count("shadow_paused", reason="cost") == 1)
            assert len(large.bodies) == 3
            now[0] = 3599.0
            await asyncio.sleep(0.1)
            assert len(large.bodies) == 3
            now[0] = 3600.0
            await running.until(lambda: len(large.bodies) == 6)
            await running.until(lambda: running.count("shadow_paused", reason="cost") == 1)


@pytest.mark.parametrize(
    ("cap", "calls"), [({"tokens_per_day": 250}, 3), ({"cost_per_day": 1.0}, 2), ({"records_per_day": 4}, 4)]
)
async def test_a_daily_cap_holds_over_a_restart_until_midnight_and_is_logged_once(
    store: Store, tmp_path: Path, cap: dict[str, float], calls: int, caplog: pytest.LogCaptureFixture
) -> None:
    store.append([record(number, REAL) for number in range(20)])
    now = [86_400.0 * 20_000 + 3_600]
    with vllm(says("x")) as large, caplog.at_level(logging.INFO):  # each call takes 100 tokens and costs 0.5

        def learner() -> Any:
            spent = SpendLedger(tmp_path, lambda: now[0])
            return running_shadow(store, {"large": large.url}, "none", lambda: now[0], spent, max_concurrent=1, **cap)

        async with learner() as first:
            await first.until(lambda: first.count("shadow_paused", reason="day") == 1)
            assert first.count("spent_today", unit="tokens") == first.count("shadow_tokens_total") == 100 * calls
            assert first.count("spent_today", unit="records") == calls
        assert len(large.bodies) == calls
        (warning,) = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING]
        (name,) = cap
        unit = name.removesuffix("_per_day")
        said = rf"shadowing pauses until midnight UTC: today's {unit}, [0-9.]+, reach shadow\.{name}: {cap[name]:g}"
        assert re.fullmatch(said, warning)
        async with learner() as second:
            await second.until(lambda: second.count("shadow_paused", reason="day") == 1)
            assert second.count("spent_today", unit="records") == calls
            assert len(large.bodies) == calls
            now[0] += 86_400
            await second.until(lambda: len(large.bodies) == 2 * calls)
        assert [entry.getMessage() for entry in caplog.records].count("shadowing continues: a new day has begun") == 1


async def test_shadowing_pauses_while_pools_are_busy(store: Store) -> None:
    store.append([record(1, REAL)])
    with vllm(says("x")) as large, vllm(says("y")) as small:
        large.waiting = 3.0
        urls = {"small": small.url, "large": large.url}
        async with running_shadow(store, urls, "none", busy_waiting=2.0) as running:
            await running.until(lambda: running.count("shadow_paused", reason="busy") == 1)
            await asyncio.sleep(0.05)
            assert large.bodies == []
            large.waiting = 2.0
            await running.until(lambda: store.labelled(1))
            assert running.count("shadow_paused", reason="busy") == 0


async def test_a_server_that_refuses_priority_or_logprobs_is_asked_without(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    store.append([record(number, REAL) for number in range(3)])

    def old(body: dict[str, Any]) -> tuple[int, Any]:
        if "priority" in body:
            message = f"Got priority {body['priority']} but Priority scheduling is not enabled."
            return 400, {"error": {"message": message}}
        if "logprobs" in body or "top_logprobs" in body:
            return 400, {"error": {"message": "logprobs are not supported"}}
        return 200, chat("0", logprob=None)

    with vllm(old) as large:
        async with running_shadow(store, {"large": large.url}, "exact", max_concurrent=1) as running:
            await running.until(lambda: not store.unshadowed(10))
        assert ["priority" in body for body in large.bodies] == [True, False, False, False, False]
    assert running.count("priority_refused", pool="large") == 1
    assert sum("--scheduling-policy priority" in line for line in caplog.messages) == 1


async def test_a_refused_request_is_marked_and_not_asked_again(store: Store) -> None:
    store.append([record(1, REAL, reference="1")])
    refusal = (400, {"error": {"message": "this prompt of yours, priority or not, is too long"}})
    with vllm(lambda body: refusal) as large:
        async with running_shadow(store, {"large": large.url}) as running:
            await running.until(lambda: not store.unshadowed(10))
        assert len(large.bodies) == 2  # once more without the field that its words name
        assert running.count("priority_refused", pool="large") == 0  # which was not the cause
    assert labels(store) == {"id-1": {"small": (1.0, None)}}
    assert running.count("shadow_requests_total", pool="large", outcome="refused") == 1


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_a_mistake_in_the_settings_loses_no_record(store: Store, status: int) -> None:
    """A wrong key, address or model: no request is at fault, so none is taken for refused."""
    store.append([record(1, REAL)])
    with vllm(lambda body: (status, {})) as large:
        async with running_shadow(store, {"large": large.url}, "none") as running:
            await running.until(lambda: running.count("shadow_paused", reason="unreachable") == 1)
    assert store.unshadowed(10)
    assert running.count("shadow_requests_total", pool="large", outcome="refused") == 0


async def test_an_outage_loses_no_record(store: Store) -> None:
    store.append([record(number, REAL) for number in range(8)])
    with vllm(lambda body: (503, {})) as large:
        async with running_shadow(store, {"large": large.url}, "none", max_concurrent=2) as running:
            await running.until(lambda: running.count("shadow_paused", reason="unreachable") == 1)
            await running.until(lambda: len(large.bodies) > 60)  # far beyond what gives a lone bad record up
            large.reply = says("x")
            await running.until(lambda: not store.unshadowed(10))
    assert len(labels(store)) == 8
    assert running.count("shadowed_records_total", outcome="given_up") == 0


async def test_a_record_that_always_fails_is_given_up_while_others_succeed(store: Store) -> None:
    store.append([record(0, REAL)])

    def choking(body: dict[str, Any]) -> tuple[int, Any]:
        return (500, {}) if body["messages"][0]["content"] == "what is 0+0" else (200, chat("x"))

    numbers = itertools.count(1)
    with vllm(choking) as large:
        async with running_shadow(store, {"large": large.url}, "none") as running:
            for _ in range(400):
                store.append([record(next(numbers), time.time())])
                await asyncio.sleep(0.01)
                if running.count("shadowed_records_total", outcome="given_up"):
                    break
            await running.until(lambda: not store.unshadowed(10))
    assert "id-0" not in labels(store)
    assert len(labels(store)) == next(numbers) - 1


async def test_answers_wait_while_the_database_is_down(store: Store, tmp_path: Path) -> None:
    store.append([record(1, REAL, reference="1")])
    aside, place = tmp_path / "aside", tmp_path / "records.db"

    def take_away(body: dict[str, Any]) -> tuple[int, Any]:
        store.close()
        for name in ("", "-wal", "-shm"):
            file = place.with_name(place.name + name)
            if file.exists():
                file.rename(aside.with_name(aside.name + name))
        place.mkdir()
        return 200, chat("1")

    with vllm(take_away) as large:
        async with running_shadow(store, {"large": large.url}) as running:
            await running.until(lambda: running.count("errors_total", part="records") >= 2)
            assert running.count("shadow_paused", reason="records") == 1
            place.rmdir()
            for name in ("-wal", "-shm", ""):
                file = aside.with_name(aside.name + name)
                if file.exists():
                    file.rename(place.with_name(place.name + name))
            await running.until(lambda: running.count("labels_total", source="exact") == 2)
            await running.until(lambda: running.count("shadow_paused", reason="records") == 0)
        assert len(large.bodies) == 1
    assert labels(store)["id-1"] == {"small": (1.0, None), "large": (1.0, pytest.approx(math.exp(-0.5)))}


async def test_shadowed_twice_is_labelled_once(store: Store) -> None:
    """A kill between the labels and the mark: the next learner does the record again."""
    store.append([record(1, REAL, reference="1")])
    (item,) = store.unshadowed(1)
    store.add_labels([Label(item.seq, "large", "exact", 0.0, 0.5, REAL), Label(item.seq, "small", "exact", 1.0)])
    with vllm(says("1")) as large:
        async with running_shadow(store, {"large": large.url}) as running:
            await running.until(lambda: not store.unshadowed(10))
    assert labels(store)["id-1"] == {"small": (1.0, None), "large": (1.0, pytest.approx(math.exp(-0.5)))}
    assert len(store.labelled(10)[0].labels) == 2


def test_which_records_are_shadowed_no_client_can_choose() -> None:
    same = [Record("mine", 0.0, seq=number) for number in range(2000)]
    kept = [item for item in same if in_shadow_share(item, 0.1)]
    assert 140 <= len(kept) <= 260
    assert kept == [item for item in same if in_shadow_share(item, 0.1)]
    assert not any(in_shadow_share(item, 0.0) for item in same)
    assert all(in_shadow_share(item, 1.0) for item in same)


@asynccontextmanager
async def open_toy(config: JudgeConfig, session: aiohttp.ClientSession, pools: PoolClient) -> AsyncIterator[Judge]:
    async def longer_is_better(record: Record, answers: Mapping[str, str]) -> Mapping[str, float]:
        longest = max(map(len, answers.values()))
        return {pool: len(text) / longest for pool, text in answers.items()}

    yield longer_is_better


async def test_a_new_judge_is_one_row(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings take its name, shadowing asks it, and its labels count by their rank, for learning and evaluation."""
    with pytest.raises(ValueError, match=r"judge\.kind is 'toy'"):
        learner_settings.parse_settings({"records": {"url": "sqlite:////x"}, "judge": {"kind": "toy"}})
    monkeypatch.setitem(label_sources.SOURCES, "toy", LabelSource("toy", False, 35, open_toy))
    settings = learner_settings.parse_settings({"records": {"url": "sqlite:////x"}, "judge": {"kind": "toy"}})
    store.append([record(1, REAL, answer="1234", finish_reason=""), record(2, REAL, asked="why two")])
    with vllm(says("12345678")) as small, vllm(says("12")) as large:
        async with running_shadow(store, {"small": small.url, "large": large.url}, settings.judge.kind) as running:
            await running.until(lambda: running.count("labels_total", source="toy") == 4)
        assert len(small.bodies) == 1  # the judge needs no reference, so the incomplete answer is asked for again
    assert running.count("verdicts_total", outcome="labelled") == 2
    (one,) = [item.record.seq for item in store.logged(10) if item.record.id == "id-1"]
    pools = ("small", "large")
    for source, quality in (("model", 1.0), ("webhook", 1.0), ("exact", 0.0)):  # the toy's rank is before these two
        store.add_labels([Label(one, pool, source, quality) for pool in pools])
        found = {item.record.seq: item for item in store.labelled(10)}
        first = {"small": quality, "large": quality} if source == "exact" else {"small": 1.0, "large": 0.25}
        assert preferred_qualities(found[one].labels, pools) == first
        traffic = examples_of_traffic(list(found.values()), pools, TextConfig(), TrafficConfig())
        assert {example.prompt: example.quality for example in traffic.examples} == {
            "what is 1+0": first,
            "why two": {"small": 0.5, "large": 1.0},
        }
        logs = traffic_of(list(found.values()), pools, TextConfig(), "records")
        assert logs.observed.tolist() == [[first[pool] for pool in pools], [0.5, 1.0]]
