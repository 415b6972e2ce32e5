"""routing.target, the floor and drift in a running gateway; what is swapped while it serves."""

import asyncio
import dataclasses
import logging
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from depo_gateway.estimator import calibration, checkpoint, standing
from depo_gateway.estimator.calibration import Curve
from depo_gateway.estimator.records.reasons import Reason
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.estimator.standing import Standing
from depo_gateway.gateway import checkpoint_watcher, config
from depo_gateway.gateway.control import Accounting, Control
from depo_gateway.gateway.routing import Decision, Eligible
from depo_gateway.gateway.threshold_controller import SHARE_WINDOW
from tests.conftest import WORDS
from tests.gateway.backend import FakeVllm, Script
from tests.gateway.checkpoints import version
from tests.gateway.conftest import Running, StartGateway, running, settings

ADMIN = {"authorization": "Bearer sk-depo-admin"}


def prompts(chance: random.Random, word: str, count: int) -> list[str]:
    return [" ".join([word, *chance.choices(WORDS[2:], k=8)]) for _ in range(count)]


async def pools_of(gateway: Running, texts: Sequence[str], lanes: int = 8, **fields: Any) -> list[str]:
    """Where prompts went, in the order in which they were answered; `lanes` of them are under way at a time."""
    waiting, went = iter(texts), []

    async def lane() -> None:
        for text in waiting:
            async with await gateway.chat(text, **fields) as answer:
                assert answer.status == 200
                await answer.read()
                went.append(answer.headers["x-depo-pool"])

    await asyncio.gather(*(lane() for _ in range(lanes)))
    return went


def worst(went: Sequence[str], wanted: float) -> float:
    sums = np.concatenate([[0], np.cumsum([name == "large" for name in went])])
    return float(np.abs((sums[SHARE_WINDOW:] - sums[:-SHARE_WINDOW]) / SHARE_WINDOW - wanted).max())


def measured(runtime: Runtime, texts: Sequence[str]) -> Curve:
    """What a calibration on these prompts says; the small pool is right where it is said to be."""
    scores = runtime.score([runtime.prepare(text) for text in texts])
    quality = np.array([item.quality for item in scores])
    return calibration.measure_curve(quality, (quality > 0.5).astype(float), np.ones(len(texts)), "gain")


@pytest.fixture(scope="module")
def calibrated(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a curve, of easy prompts and hard ones half and half."""
    chance = random.Random(7)
    texts = prompts(chance, "easy", 300) + prompts(chance, "hard", 300)
    place = tmp_path_factory.mktemp("calibrated") / "one"
    version(tiny_checkpoint, place, 0.0, {"gain": measured(Runtime.load(tiny_checkpoint), texts)})
    return place


# The target.


async def test_the_share_holds_through_a_change_of_traffic(start: StartGateway) -> None:
    chance = random.Random(0)
    easy, hard = prompts(chance, "easy", 2200), prompts(chance, "hard", 2200)
    async with (
        FakeVllm() as small,
        FakeVllm() as large,
        start([small], [large], routing={"target": {"large_share": 0.3}, "sticky": False}) as gateway,
    ):
        went = await pools_of(gateway, [*easy, *hard])
        assert len(went) == 4400
        assert worst(went, 0.3) < 0.02
        assert await gateway.metric("gateway_target_share") == pytest.approx(
            went[-SHARE_WINDOW:].count("large") / SHARE_WINDOW, abs=0.005
        )
        ties = await pools_of(gateway, ["the same easy question"] * 2200)
        assert worst([*went, *ties], 0.3) < 0.02


async def test_the_threshold_shown_is_the_one_used_and_asking_alone_does_not_move_it(start: StartGateway) -> None:
    routing = {"target": {"large_share": 0.3}, "expose_scores": True}
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], routing=routing) as gateway:
        body = {"messages": [{"role": "user", "content": "prove the hard theorem"}]}
        for _ in range(50):
            answer = await gateway.session.post(f"{gateway.url}/v1/route", json={"model": "auto", **body})
            told = await answer.json()
        before = await gateway.metric("gateway_threshold")
        assert told["threshold"] == pytest.approx(before)
        first = await gateway.chat("prove the hard theorem")
        assert float(first.headers["x-depo-threshold"]) == pytest.approx(before, abs=1e-4)
        await gateway.chat("easy", model="large")  # pinned: it is not routed
        assert await gateway.metric("gateway_target_share") in (0.0, 1.0)
        for index in range(60):  # a threshold of its own, but it counts
            own = await gateway.chat(f"easy {index}", model="auto-1.0")
            assert own.headers["x-depo-threshold"] == "1.0000"
        share = await gateway.metric("gateway_target_share")
        assert share == pytest.approx(len(large.seen[:-1]) / 61, abs=0.05)
        after = await gateway.chat("easy at last")
        assert float(after.headers["x-depo-threshold"]) != pytest.approx(before, abs=1e-4)
        async with gateway.session.get(f"{gateway.admin}/admin/status") as status:
            assert (await status.json())["target"]["wanted"] == 0.3


@pytest.mark.parametrize("answers", ["small", "large"])
async def test_what_fell_back_or_failed_is_put_right(start: StartGateway, answers: str) -> None:
    """Whatever was decided, one pool alone answers, and then none does."""
    fails = Script(status=503, body=b"{}")
    sections = {"retries": {"budget": 10.0, "per_second": 1000.0}, "routing": {"target": {"large_share": 0.5}}}
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], **sections) as gateway:
        up, down = (small, large) if answers == "small" else (large, small)
        down.script = fails
        for index in range(20):
            assert (await gateway.chat(f"easy {index}")).headers["x-depo-pool"] == answers
        assert await gateway.metric("gateway_target_share") == (answers == "large")
        up.script = fails
        assert {(await gateway.chat(f"hard {index}")).status for index in range(20)} == {503}
        assert await gateway.metric("gateway_target_share") == (answers == "large")  # of those that were answered


async def test_a_cost_is_kept_too(start: StartGateway) -> None:
    chance = random.Random(1)
    async with (
        FakeVllm() as small,
        FakeVllm() as large,
        start([small], [large], routing={"target": {"cost": 0.6}, "sticky": False}) as gateway,
    ):
        await pools_of(gateway, prompts(chance, "hard", 1500))
        paid = await gateway.metric("gateway_cost_total")
        assert paid / await gateway.metric("gateway_cost_all_large_total") == pytest.approx(0.6, abs=0.02)
        assert await gateway.metric("gateway_target_share") == pytest.approx(0.6, abs=0.02)


async def test_a_quality_is_the_checkpoints_to_say(
    start: StartGateway, calibrated: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_watcher, "WATCH_SECONDS", 0.05)
    home = tmp_path / "checkpoints"
    shutil.copytree(calibrated, home / "1")
    checkpoint.publish(home / "1")
    routing, estimator = {"target": {"quality": 0.9}}, {"path": str(home), "deadline_ms": 5000}
    curve = Runtime.load(calibrated).calibration
    async with FakeVllm() as small, FakeVllm() as large:
        with pytest.raises(ValueError, match=r"routing.target.quality can't be kept .* no curve for the rule gain"):
            async with start([small], [large], routing=routing):
                raise AssertionError("it serves")
        async with start([small], [large], routing=routing, estimator=estimator) as gateway:
            expected = curve.threshold("gain", quality=0.9)
            assert await gateway.metric("gateway_threshold") == pytest.approx(expected)
            assert 0 < expected < 1
            version(tiny_checkpoint, home / "2", 0.0)  # which can't say
            checkpoint.publish(home / "2")
            assert await gateway.settles("gateway_estimator_loads_total", 1, 15, result="refused")
            half = {
                "gain": dataclasses.replace(curve.curves["gain"], quality=(1.0,) * len(curve.curves["gain"].thresholds))
            }
            version(tiny_checkpoint, home / "3", 0.0, half)
            checkpoint.publish(home / "3")
            assert await gateway.settles("gateway_estimator_loads_total", 1, 15, result="applied")
            assert await gateway.metric("gateway_threshold") == 0.0


def test_requests_under_way_over_a_reload_are_put_right_where_they_were_counted(tiny_checkpoint: Path) -> None:
    runtime, control = Runtime.load(tiny_checkpoint), Control()
    read = [config.parse_config(settings([], [], tiny_checkpoint) | {
        "pools": {name: {"model": name, "backends": [{"url": "http://x"}]} for name in ("small", "large")},
        "routing": {"target": {"large_share": share}},
    }) for share in (0.3, 0.5)]  # fmt: skip
    control.follow(read[0], runtime)
    accountings = [Accounting(decisive_confidence=0.5) for _ in range(300)]
    both, large = Eligible(("small", "large")), Decision("large", Reason.UNSURE, 0.5, 0.9)
    for accounting in accountings:
        control.commit(accounting, "", "hi", both, large)
    old = control._controller
    control.follow(read[1], runtime)
    assert control._controller is not old is not None
    control.commit(Accounting(decisive_confidence=0.5), "", "hi", both, large)
    assert control._controller is not None
    before = (control._controller.balance, control.target_share)
    for accounting in accountings:
        control.conclude(accounting, None, 0)
    assert (control._controller.balance, control.target_share) == before
    assert np.isnan(old.realised)


def test_gateway_and_checkpoint_that_differ_about_groups_are_warned_of(
    tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At the start, with another checkpoint, and when a reload changes `routing.group`; once each."""
    plain = Runtime.load(tiny_checkpoint)
    knows = dataclasses.replace(plain, groups={"law": 0})
    pools = {name: {"model": name, "backends": [{"url": "http://x"}]} for name in ("small", "large")}
    unset, named = (
        config.parse_config(settings([], [], tiny_checkpoint) | {"pools": pools, "routing": routing})
        for routing in ({}, {"group": {"from": "key"}})
    )
    cases = [
        ((unset, plain), ""),
        ((unset, knows), "was fitted with groups, but routing.group isn't set"),
        ((named, plain), "routing.group is set, but the estimator"),
        ((named, knows), ""),
    ]
    for (settled, runtime), words in cases:
        caplog.clear()
        Control().follow(settled, runtime)
        assert [words in line for line in caplog.messages] == ([True] if words else [])
    control = Control()
    control.follow(unset, plain)
    caplog.clear()
    control.follow(named, plain)
    control.follow(named, plain)
    assert len(caplog.messages) == 1


# The floor.


async def test_what_labels_say_is_known_before_the_first_request(
    start: StartGateway, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    home = tmp_path / "checkpoints"
    first = version(tiny_checkpoint, home / "1", 9.0)
    checkpoint.publish(home / "1")
    standing.write_standing(home, judged(first, False))
    async with FakeVllm() as small, FakeVllm() as large:
        for watches in (True, False):
            sections = {"estimator": {"path": str(home), "deadline_ms": 5000, "watch": watches}}
            async with start([small], [large], **sections) as gateway:
                assert ((await gateway.chat("easy")).headers["x-depo-reason"] == "explore") is watches


def judged(name: str, beats_random: bool) -> Standing:
    return Standing(name, 1.0, 400, -0.01, -0.02, 0.0, beats_random, 0.4)


@pytest.mark.parametrize("target", [None, {"large_share": 0.25}])
async def test_a_router_no_better_than_a_coin_becomes_one(
    start: StartGateway,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    target: dict[str, float] | None,
) -> None:
    monkeypatch.setattr(checkpoint_watcher, "WATCH_SECONDS", 0.05)
    home = tmp_path / "checkpoints"
    first = version(tiny_checkpoint, home / "1", 9.0)  # the small pool can do everything, it says
    checkpoint.publish(home / "1")
    sections = {"estimator": {"path": str(home), "deadline_ms": 5000}, "routing": {"target": target} if target else {}}
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], **sections) as gateway:
        standing.write_standing(home, judged("another", False))
        await asyncio.sleep(0.2)
        assert await gateway.metric("gateway_router_floor") == 0
        with caplog.at_level(logging.ERROR):
            standing.write_standing(home, judged(first, False))
            assert await gateway.settles("gateway_router_floor", 1)
        assert f"labels show the estimator {first} to be no better than random routing" in caplog.text
        answers = [await gateway.chat(f"easy {index}") for index in range(300)]
        assert {answer.headers["x-depo-reason"] for answer in answers} == {"explore"}
        share = sum(answer.headers["x-depo-pool"] == "large" for answer in answers) / 300
        assert share == pytest.approx(0.25 if target else 0.4, abs=0.08 if target else 0.12)
        async with gateway.session.get(f"{gateway.admin}/admin/status") as status:
            told = await status.json()
        assert (told["routes_by_share"], told["standing"]["labels"]) == (True, 400)
        own = await gateway.chat("easy", model="auto-0.0")  # a threshold of the caller's own
        assert own.headers["x-depo-reason"] == "confident"
        (home / standing.STANDING).write_text("{")  # unreadable: nothing changes
        await asyncio.sleep(0.2)
        assert await gateway.metric("gateway_router_floor") == 1
        standing.write_standing(home, judged(first, True))
        assert await gateway.settles("gateway_router_floor", 0)
        standing.write_standing(home, judged(first, False))
        assert await gateway.settles("gateway_router_floor", 1)
        second = version(tiny_checkpoint, home / "2", 8.0)  # the same content in the same second has the same name
        checkpoint.publish(home / "2")
        assert await gateway.settles("gateway_estimator_info", 1, 15, version=second)
        assert await gateway.settles("gateway_router_floor", 0)
        assert (await gateway.chat("easy")).headers["x-depo-reason"] != "explore"


# Drift.


async def test_drift_tells_other_traffic_from_the_calibrations(start: StartGateway, calibrated: Path) -> None:
    chance = random.Random(2)
    mixed = [
        text for pair in zip(prompts(chance, "easy", 150), prompts(chance, "hard", 150), strict=True) for text in pair
    ]
    estimator = {"path": str(calibrated), "deadline_ms": 5000}
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], estimator=estimator) as gateway:
        assert np.isnan(await gateway.metric("gateway_score_drift"))
        await pools_of(gateway, mixed)
        near = await gateway.metric("gateway_score_drift")
        await pools_of(gateway, prompts(chance, "hard", 900))
        far = await gateway.metric("gateway_score_drift")
        assert near < 0.15
        assert far > near + 0.15


# Swapping and reloading while it serves.


async def test_fifty_streams_see_checkpoints_and_configs_come_and_go(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_watcher, "WATCH_SECONDS", 0.05)
    home, path = tmp_path / "checkpoints", tmp_path / "gateway.yaml"
    version(tiny_checkpoint, home / "0", 9.0)
    checkpoint.publish(home / "0")
    async with (
        FakeVllm(script=Script(between_s=0.01, events=10)) as small,
        FakeVllm(script=Script(between_s=0.01, events=10)) as large,
    ):
        raw = settings(
            [small], [large], tiny_checkpoint,
            admin={"port": 0, "key_sha256": config.key_digest("sk-depo-admin")},
            estimator={"path": str(home), "deadline_ms": 5000},
        )  # fmt: skip
        path.write_text(yaml.safe_dump(raw, sort_keys=False))
        async with running(raw, path) as gateway:
            stop, versions, whole = asyncio.Event(), set[str](), list[bool]()

            async def stream(number: int) -> None:
                while not stop.is_set():
                    async with await gateway.chat(f"hard {number} {len(whole)}", stream=True) as answer:
                        text = await answer.text()
                    versions.add(answer.headers["x-depo-estimator"])
                    whole.append(answer.status == 200 and text.endswith("data: [DONE]\n\n") and "error" not in text)

            streams = [asyncio.create_task(stream(number)) for number in range(50)]
            names = []
            for index in range(1, 4):
                names.append(version(tiny_checkpoint, home / str(index), 9.0 if index % 2 == 0 else -9.0))
                checkpoint.publish(home / str(index))
                assert await gateway.settles("gateway_estimator_info", 1, 20, version=names[-1])
                raw["routing"]["threshold"] = 0.5 + index / 10
                path.write_text(yaml.safe_dump(raw, sort_keys=False))
                async with gateway.session.post(f"{gateway.admin}/admin/reload", headers=ADMIN) as answer:
                    assert answer.status == 200
                assert await gateway.metric("gateway_threshold") == pytest.approx(0.5 + index / 10)
                path.write_text("version: 1\npools: [")
                async with gateway.session.post(f"{gateway.admin}/admin/reload", headers=ADMIN) as answer:
                    assert answer.status == 422
                seen = len(whole)
                while len(whole) < seen + 50:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            stop.set()
            await asyncio.gather(*streams)
            assert all(whole)
            assert len(whole) > 150
            assert set(names) <= versions
            assert await gateway.metric("gateway_requests_total", code="200") == len(whole)
            assert await gateway.metric("gateway_requests_total") == len(whole)


async def test_what_is_half_published_is_never_loaded(
    start: StartGateway, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that dies at any moment, and files that are cut off at any length."""
    monkeypatch.setattr(checkpoint_watcher, "WATCH_SECONDS", 0.02)
    home = tmp_path / "checkpoints"
    first = version(tiny_checkpoint, home / "1", 9.0)
    checkpoint.publish(home / "1")
    sections = {"estimator": {"path": str(home), "deadline_ms": 5000}}

    def cut(name: str, keep: float) -> None:
        place = home / f"cut-{name}-{keep}"
        shutil.copytree(home / "2", place)
        data = (place / name).read_bytes()
        (place / name).write_bytes(data[: int(len(data) * keep)])
        (home / "current").write_text(place.name + "\n")

    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], **sections) as gateway:
        second = version(tiny_checkpoint, home / "2", -9.0)
        seen = set()
        for name in (*checkpoint.FILES, checkpoint.MANIFEST):
            for keep in (0.0, 0.5, 0.99):
                cut(name, keep)
                await asyncio.sleep(0.1)
                seen.add((await gateway.chat(f"hard {name} {keep}")).headers["x-depo-estimator"])
        for pointer in ("", "\n", "nowhere\n", ".2.half\n", "../2", "2/manifest.json\n"):
            (home / "current").write_text(pointer)
            await asyncio.sleep(0.06)
            seen.add((await gateway.chat(f"hard {pointer!r}")).headers["x-depo-estimator"])
        (home / "current").unlink()
        await asyncio.sleep(0.06)
        seen.add((await gateway.chat("hard")).headers["x-depo-estimator"])
        assert seen == {first}
        assert await gateway.metric("gateway_estimator_loads_total", result="applied") == 0
        assert await gateway.metric("gateway_estimator_loads_total", result="refused") >= 15
        checkpoint.publish(home / "2")
        assert await gateway.settles("gateway_estimator_info", 1, 15, version=second)
