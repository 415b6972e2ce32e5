"""routing.unfamiliar: where prompts go whose scores mean nothing."""

import asyncio
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from depo_gateway.estimator import checkpoint, standing
from depo_gateway.estimator.records.reasons import Reason
from depo_gateway.estimator.records.store import Store
from depo_gateway.estimator.records.types import Record
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.gateway import config, routing, scoring
from depo_gateway.gateway.candidate import Candidate, Offer
from depo_gateway.gateway.config import parse_config
from depo_gateway.gateway.control import Accounting, Control
from depo_gateway.gateway.metrics import Metrics
from depo_gateway.gateway.routing import Decision, Eligible
from depo_gateway.gateway.scoring import Scored, Scorer
from tests.gateway.backend import FakeVllm
from tests.gateway.checkpoints import version
from tests.gateway.conftest import Running, StartGateway, running, settings
from tests.gateway.knowing import UNFAMILIAR, knowing, knowing_checkpoints
from tests.gateway.test_control import ADMIN, calibrated, judged, prompts

__all__ = ["calibrated", "knowing_checkpoints"]  # fixtures
POOLS = ("small", "middle", "large")
ALL = Eligible(POOLS)
SURE = {"small": 0.9, "middle": 1.0, "large": 1.0}
STRANGE, SINCE = f"easy {UNFAMILIAR}", 400
pytestmark = pytest.mark.usefixtures("knowing_checkpoints")


async def went(gateway: Running, count: int, **fields: Any) -> Counter[tuple[str, str]]:
    """The pools and reasons of so many different unfamiliar prompts."""
    answers = [await gateway.chat(f"{STRANGE} {index}", **fields) for index in range(count)]
    return Counter((answer.headers["x-depo-pool"], answer.headers["x-depo-reason"]) for answer in answers)


# The draw.


@pytest.mark.parametrize(
    ("shares", "explore", "expected"),
    [
        ({"small": 0.5, "middle": 0.2, "large": 0.3}, 0.0, (0.5, 0.2, 0.3)),
        ({"large": 1.0}, 0.0, (0.0, 0.0, 1.0)),
        ({"large": 1.0}, 0.3, (0.1, 0.1, 0.8)),
        ({"small": 2.0, "large": 2.0}, 0.6, (0.4, 0.2, 0.4)),
        ({}, 0.0, (1 / 3, 1 / 3, 1 / 3)),
    ],
)
def test_pools_are_drawn_with_the_probability_on_record(
    shares: dict[str, float], explore: float, expected: tuple[float, ...]
) -> None:
    steps, drawn = 3000, Counter[str]()
    for step in range(steps):
        decision = routing.by_share(SURE, ALL, shares, 0.85, "v", step / steps, Reason.UNFAMILIAR, explore)
        assert (decision.reason, decision.confidence, decision.threshold) == (Reason.UNFAMILIAR, 0.9, 0.85)
        assert decision.propensity == pytest.approx(expected[POOLS.index(decision.pool)])
        drawn[decision.pool] += 1
    assert [drawn[name] / steps for name in POOLS] == pytest.approx(expected, abs=1e-3)


def test_the_only_pool_that_can_serve_is_not_drawn() -> None:
    alone = Eligible(("large",), Reason.CONTEXT)
    decision = routing.by_share(SURE, alone, {"small": 1.0}, 0.85, "v", 0.5, Reason.UNFAMILIAR)
    assert (decision.pool, decision.reason, decision.propensity) == ("large", Reason.CONTEXT, 1.0)


def test_the_ends_need_no_scores() -> None:
    for threshold, pool, reason in ((0.0, "small", "confident"), (1.0, "large", "unsure")):
        for sure in (SURE, dict.fromkeys(POOLS, 1.0), {}):
            decision = routing.at_an_end(sure, ALL, threshold, "v")
            assert (decision.pool, decision.reason, decision.propensity) == (pool, reason, 1.0)
            assert (decision.confidence, decision.threshold) == (sure.get("small"), threshold)
    assert routing.at_an_end(SURE, Eligible(("middle", "large"), Reason.ACCEPTS), 0.0, "v").reason == "accepts"


# In a gateway.


@pytest.mark.parametrize("target", [None, 0.8])
async def test_by_default_a_random_pool_serves_at_the_usual_share(
    start: StartGateway, calibrated: Path, tiny_checkpoint: Path, tmp_path: Path, target: float | None
) -> None:
    """Without a target that of the checkpoint's curve, as there are no decisions by scores; else the target's."""
    share = scoring.usual_shares(Runtime.load(calibrated), ("small", "large"), "gain", 0.5)["large"]
    assert 0.3 < share < 0.7
    url = f"sqlite:///{tmp_path / 'records.db'}"
    path, by = (
        (calibrated, {"threshold": 0.5}) if target is None else (tiny_checkpoint, {"target": {"large_share": target}})
    )
    sections = {"estimator": {"path": str(path), "deadline_ms": 5000}, "records": {"url": url}, "routing": by}
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], **sections) as gateway:
        async with gateway.session.get(f"{gateway.admin}/metrics") as answer:
            assert 'gateway_unfamiliar_total{pool="large"} 0.0' in await answer.text()
        seen = await went(gateway, SINCE)
        assert set(seen) == {("small", "unfamiliar"), ("large", "unfamiliar")}
        assert seen["large", "unfamiliar"] / SINCE == pytest.approx(target or share, abs=0.12)
        assert await gateway.metric("gateway_unfamiliar_total", pool="large") == seen["large", "unfamiliar"]
        assert (await gateway.chat("easy")).headers["x-depo-reason"] in ("confident", "unsure")
        assert await gateway.metric("gateway_unfamiliar_total") == SINCE
        assert np.isnan(await gateway.metric("gateway_score_drift"))  # 400 prompts, none of them typical
        assert await gateway.settles("gateway_records_total", SINCE + 1, 15, outcome="written")
    store = Store(url)
    records = [item.record for item in store.logged(SINCE + 1) if item.record.reason == "unfamiliar"]
    store.close()
    assert len(records) == SINCE
    assert all(record.free for record in records)
    if target is None:
        chances = {(record.pool, round(record.propensity, 6)) for record in records}
        assert chances == {("large", round(share, 6)), ("small", round(1 - share, 6))}
    else:  # the target's rank moves, and each record has its own
        assert sum((item.pool == "large") / item.propensity for item in records) / SINCE == pytest.approx(1.0, abs=0.15)


async def test_a_clients_threshold_is_the_share_of_the_curve(start: StartGateway, calibrated: Path) -> None:
    sections = {"estimator": {"path": str(calibrated), "deadline_ms": 5000}, "routing": {"threshold": 0.0}}
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], **sections) as gateway:
        runtime = Runtime.load(calibrated)
        share = scoring.usual_shares(runtime, ("small", "large"), "gain", 0.5)["large"]
        assert set(await went(gateway, 20)) == {("small", "unfamiliar")}  # usually none goes to the large one
        seen = await went(gateway, 200, model="auto-0.5")
        assert seen["large", "unfamiliar"] / 200 == pytest.approx(share, abs=0.17)
        assert set(await went(gateway, 20, model="auto-0")) == {("small", "confident")}
        assert set(await went(gateway, 20, model="auto-1.0")) == {("large", "unsure")}
        assert set(await went(gateway, 20, model="large")) == {("large", "pinned")}
        assert await gateway.metric("gateway_unfamiliar_total") == 260  # whatever the reason, but none unscored


async def test_without_a_curve_a_clients_threshold_means_the_usual_shares(start: StartGateway) -> None:
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large]) as gateway:
        seen = await went(gateway, 200, model="auto-0.999")
        assert seen["large", "unfamiliar"] / 200 == pytest.approx(0.5, abs=0.17)


@pytest.mark.parametrize(
    ("policy", "explore", "share"),
    [("large", 0.0, 1.0), ("small", 0.0, 0.0), ("large", 0.5, 0.75), ("explore", 0.0, 0.5)],
)
async def test_a_policy_replaces_the_shares(
    start: StartGateway, calibrated: Path, policy: str, explore: float, share: float
) -> None:
    estimator = {"path": str(calibrated), "deadline_ms": 5000}
    by = {"unfamiliar": policy, "explore": explore, "threshold": 0.0, "sticky": False}
    async with (
        FakeVllm() as small,
        FakeVllm() as large,
        start([small], [large], routing=by, estimator=estimator) as gateway,
    ):
        for model in ("auto", "auto-0.9"):
            seen = await went(gateway, 150, model=model)
            assert {reason for _, reason in seen} == {"unfamiliar"}
            assert seen["large", "unfamiliar"] / 150 == pytest.approx(share, abs=0.2 if 0 < share < 1 else 0)


async def test_a_pool_that_can_not_take_the_request_is_not_asked(start: StartGateway, calibrated: Path) -> None:
    estimator = {"path": str(calibrated), "deadline_ms": 5000}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": STRANGE}, image]}]
    sections = {"routing": {"unfamiliar": "small"}, "small": {"accepts": ["text"]}, "estimator": estimator}
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], **sections) as gateway:
        answer = await gateway.chat(messages=messages)
        assert (answer.headers["x-depo-pool"], answer.headers["x-depo-reason"]) == ("large", "accepts")
        assert set(await went(gateway, 5)) == {("small", "unfamiliar")}


async def test_a_conversation_keeps_its_pool_on_an_unfamiliar_turn(start: StartGateway) -> None:
    async with (
        FakeVllm() as small,
        FakeVllm() as large,
        start([small], [large], routing={"unfamiliar": "large"}) as gateway,
    ):
        answer = await gateway.chat("easy")
        assert answer.headers["x-depo-pool"] == "small"
        said = (await answer.json())["choices"][0]["message"]
        turns = [{"role": "user", "content": "easy"}, said]
        strange = {"role": "user", "content": STRANGE}
        kept = await gateway.chat(messages=[*turns, strange])
        assert (kept.headers["x-depo-pool"], kept.headers["x-depo-reason"]) == ("small", "sticky")
        up = await gateway.chat(messages=[*turns, strange], model="auto-1")
        assert (up.headers["x-depo-pool"], up.headers["x-depo-reason"]) == ("large", "unsure")
        new = await gateway.chat(STRANGE)
        assert (new.headers["x-depo-pool"], new.headers["x-depo-reason"]) == ("large", "unfamiliar")
        assert await gateway.metric("gateway_unfamiliar_total", pool="small") == 1


async def test_the_floor_takes_precedence(start: StartGateway, tiny_checkpoint: Path, tmp_path: Path) -> None:
    home = tmp_path / "checkpoints"
    first = version(tiny_checkpoint, home / "1", 0.0)
    checkpoint.publish(home / "1")
    standing.write_standing(home, judged(first, False))
    sections = {"estimator": {"path": str(home), "deadline_ms": 5000}, "routing": {"unfamiliar": "large"}}
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], **sections) as gateway:
        assert set(await went(gateway, 30)) == {("small", "explore"), ("large", "explore")}
        assert await gateway.metric("gateway_unfamiliar_total") == 30
        assert set(await went(gateway, 5, model="auto-0.9")) == {("large", "unfamiliar")}  # the floor is for auto


async def test_a_target_is_kept_by_the_familiar_prompts(start: StartGateway) -> None:
    """A third of the traffic is forced to the last pool, more than half of what the target allows."""
    chance = random.Random(3)
    texts = [
        text.replace(UNFAMILIAR, "two") + (f" {UNFAMILIAR}" if index % 3 == 0 else "")
        for index, text in enumerate(prompts(chance, "easy", 2400))
    ]
    by = {"unfamiliar": "large", "target": {"large_share": 0.5}, "sticky": False}
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], routing=by) as gateway:
        for text in texts:
            await gateway.chat(text)
        assert await gateway.metric("gateway_target_share") == pytest.approx(0.5, abs=0.02)
        assert await gateway.metric("gateway_decisions_total", reason="unfamiliar", pool="large") == 800


async def test_a_new_threshold_means_new_usual_shares(calibrated: Path, tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    async with FakeVllm() as small, FakeVllm() as large:
        raw = settings(
            [small], [large], calibrated, admin={"port": 0, "key_sha256": config.key_digest("sk-depo-admin")}
        )  # fmt: skip
        raw["routing"]["threshold"] = 0.0
        path.write_text(yaml.safe_dump(raw, sort_keys=False))
        async with running(raw, path) as gateway:
            assert set(await went(gateway, 10)) == {("small", "unfamiliar")}
            raw["routing"]["threshold"] = 0.5
            path.write_text(yaml.safe_dump(raw, sort_keys=False))
            async with gateway.session.post(f"{gateway.admin}/admin/reload", headers=ADMIN) as answer:
                assert answer.status == 200
            assert set(await went(gateway, 40)) == {("small", "unfamiliar"), ("large", "unfamiliar")}


async def test_the_cheap_stage_can_not_tell(start: StartGateway, tiny_checkpoint: Path) -> None:
    estimator = {"path": str(tiny_checkpoint), "deadline_ms": 0}
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], estimator=estimator) as gateway:
        assert set(await went(gateway, 5)) <= {("small", "confident"), ("large", "unsure")}
        assert await gateway.metric("gateway_unfamiliar_total") == 0


async def test_route_decides_alike_and_counts_nothing(start: StartGateway) -> None:
    async with (
        FakeVllm() as small,
        FakeVllm() as large,
        start([small], [large], routing={"unfamiliar": "large"}) as gateway,
    ):
        asked = {"model": "auto", "messages": [{"role": "user", "content": STRANGE}]}
        async with gateway.session.post(f"{gateway.url}/v1/route", json=asked) as answer:
            told = await answer.json()
        assert (told["pool"], told["reason"]) == ("large", "unfamiliar")
        assert await gateway.metric("gateway_unfamiliar_total") == 0


# Its parts.


async def test_cached_scores_say_it_too(tiny_checkpoint: Path) -> None:
    scorer = Scorer(knowing(Runtime.load(tiny_checkpoint)), {"small": 0, "large": 1}, 10.0, Metrics("0"), 1)
    found = [await scorer.score(text) for text in (STRANGE, STRANGE, "easy")]
    scorer.close()
    await asyncio.to_thread(scorer.join)
    assert [(item.stage, item.unfamiliar) for item in found if item] == [
        ("full", True), ("cached", True), ("full", False)
    ]  # fmt: skip


def test_the_candidate_only_counts_what_is_unfamiliar_to_it(tiny_checkpoint: Path) -> None:
    runtime, columns = scoring.load_runtime(str(tiny_checkpoint), ("small", "large"), "gain")
    metrics = Metrics("0")
    judging = Candidate(runtime, columns, "gain", None, metrics)
    for text in (STRANGE, "easy"):
        judging.offer(Offer(text, Eligible(("small", "large")), 0.85, "small"))
    judging._offers.put(None)
    judging.join()
    samples = [sample for family in metrics.candidate_outcomes.collect() for sample in family.samples]
    counts = {sample.labels["outcome"]: sample.value for sample in samples if sample.name.endswith("_total")}
    assert counts == {"unfamiliar": 1, "scored": 1}
    assert metrics.candidate_decisions.labels("small")._value.get() == 1


def controlled(tiny_checkpoint: Path) -> Control:
    control = Control()
    pools = {name: {"model": name, "backends": [{"url": "http://x"}]} for name in ("small", "large")}
    raw = {"version": 1, "pools": pools, "routing": {"target": {"large_share": 0.5}}}
    control.follow(parse_config(raw), Runtime.load(tiny_checkpoint))
    return control


@pytest.mark.parametrize(
    ("unfamiliar", "reason", "counted"),
    [
        (False, Reason.STICKY, 0.3),  # another threshold could have moved the conversation up
        (True, Reason.STICKY, np.inf),  # no threshold could
        (True, Reason.UNFAMILIAR, np.inf),
        (False, Reason.CONFIDENT, 0.3),
    ],
)
def test_a_target_knows_which_decisions_the_threshold_makes(
    tiny_checkpoint: Path, unfamiliar: bool, reason: Reason, counted: float
) -> None:
    control, accounting = controlled(tiny_checkpoint), Accounting()
    both = Eligible(("small", "large"))
    accounting.note_scores({"small": 0.3, "large": 1.0}, both, 2, Scored({}, "full", "v", unfamiliar))
    assert accounting.typical is not unfamiliar
    control.commit(accounting, "", "hi", both, Decision("small", reason, 0.3, 0.85))
    assert control._controller is not None
    assert control._controller._seen[-1] == counted


def test_a_record_is_free_also_where_a_pool_was_named() -> None:
    assert Record("id", 0.0, reason="unfamiliar", propensity=1.0).free


# The setting.


@pytest.mark.parametrize("policy", ["share", "explore", "small", "large"])
def test_a_policy_is_taken(tiny_checkpoint: Path, policy: str) -> None:
    raw = settings([], [], tiny_checkpoint) | {"routing": {"unfamiliar": policy}}
    for pool in raw["pools"].values():
        pool["backends"] = [{"url": "http://x"}]
    assert parse_config(raw).routing.unfamiliar == policy
    assert f"unfamiliar: {policy}\n" in config.resolved_yaml(parse_config(raw))
    with pytest.raises(
        ValueError, match=r"^routing.unfamiliar is 'huge'; write share, explore or a pool's name \(small, large\)$"
    ):
        parse_config(raw | {"routing": {"unfamiliar": "huge"}})
