"""A candidate scores live traffic, decides nothing and disturbs nothing."""

import asyncio
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from depo_gateway import __version__
from depo_gateway.estimator import checkpoint
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.gateway import candidate, scoring
from depo_gateway.gateway.candidate import Candidate, Offer
from depo_gateway.gateway.metrics import Metrics
from depo_gateway.gateway.routing import Eligible
from tests.gateway.backend import FakeVllm
from tests.gateway.checkpoints import version
from tests.gateway.conftest import StartGateway

BOTH = Eligible(("small", "large"))


@dataclass
class Gated:
    """A real session that waits for a gate, or fails."""

    session: Any
    gate: threading.Event
    fails: bool = False

    def run(self, *arguments: Any) -> Any:
        self.gate.wait(10)
        if self.fails:
            raise RuntimeError("the candidate is broken")
        return self.session.run(*arguments)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    made = threading.Event()
    yield made
    made.set()


def offer(text: str, pool: str | None = "small") -> Offer:
    return Offer([{"role": "user", "content": text}], BOTH, 0.85, pool)


def finish(judged: Candidate) -> None:
    """Waits until all that was offered is done."""
    judged._offers.put(None)
    judged.join()


def told(metrics: Metrics) -> dict[str, float]:
    counted = (metrics.candidate_outcomes, metrics.candidate_decisions, metrics.candidate_agreement)
    samples = [sample for metric in counted for family in metric.collect() for sample in family.samples]
    return {str(*item.labels.values()): item.value for item in samples if item.name.endswith("_total")}


def test_it_says_what_it_would_have_done(tiny_checkpoint: Path) -> None:
    runtime, columns = scoring.load_runtime(str(tiny_checkpoint), ("small", "large"), "gain")
    metrics = Metrics(__version__)
    judged = Candidate(runtime, columns, "gain", None, metrics)
    for text, pool in (("an easy sum", "small"), ("prove the hard theorem", "small"), ("hard theorem", None)):
        judged.offer(offer(text, pool))
    finish(judged)
    assert told(metrics) == {"scored": 3, "small": 1, "large": 2, "yes": 1, "no": 1}
    assert metrics.candidate_confidence._sum.get() > 0


def test_a_full_queue_is_not_waited_for(tiny_checkpoint: Path, gate: threading.Event) -> None:
    runtime, columns = scoring.load_runtime(str(tiny_checkpoint), ("small", "large"), "gain")
    metrics = Metrics(__version__)
    slow = Candidate(replace(runtime, session=Gated(runtime.session, gate)), columns, "gain", None, metrics)  # type: ignore[arg-type]
    for index in range(candidate.QUEUE + 20):
        slow.offer(offer(f"easy {index}"))
    busy = told(metrics)["busy"]
    assert 19 <= busy <= 20
    gate.set()
    finish(slow)
    assert told(metrics)["scored"] == candidate.QUEUE + 20 - busy


def test_one_that_fails_is_counted_and_goes_on(tiny_checkpoint: Path, gate: threading.Event) -> None:
    gate.set()
    runtime, columns = scoring.load_runtime(str(tiny_checkpoint), ("small", "large"), "gain")
    metrics = Metrics(__version__)
    broken = Gated(runtime.session, gate, fails=True)
    judged = Candidate(replace(runtime, session=broken), columns, "gain", None, metrics)  # type: ignore[arg-type]
    judged.offer(offer("easy"))
    judged.offer(offer("easy"))
    finish(judged)
    assert told(metrics) == {"error": 2}


def test_a_closed_one_ends_with_prompts_in_its_queue(tiny_checkpoint: Path, gate: threading.Event) -> None:
    runtime, columns = scoring.load_runtime(str(tiny_checkpoint), ("small", "large"), "gain")
    slow = Candidate(
        replace(runtime, session=Gated(runtime.session, gate)),  # type: ignore[arg-type]
        columns, "gain", None, Metrics(__version__),
    )  # fmt: skip
    for index in range(candidate.QUEUE + 20):
        slow.offer(offer(f"easy {index}"))
    slow.close()
    slow.close()
    gate.set()
    slow.join()
    assert not slow._thread.is_alive()


async def test_live_traffic_is_scored_and_nothing_else_changes(
    start: StartGateway, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from depo_gateway.gateway import checkpoint_watcher

    monkeypatch.setattr(checkpoint_watcher, "WATCH_SECONDS", 0.05)
    home = tmp_path / "candidates"
    first = version(tiny_checkpoint, home / "1", -9.0)  # to which everything is hard
    checkpoint.publish(home / "1")
    live = {"path": str(tiny_checkpoint), "deadline_ms": 5000, "candidate": str(home)}
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], estimator=live) as gateway:
        assert await gateway.metric("gateway_candidate_info", version=first) == 1
        for index in range(10):
            answer = await gateway.chat(f"easy {index}")
            assert answer.headers["x-depo-pool"] == "small"
            assert answer.headers["x-depo-estimator"] != first
        assert await gateway.settles("gateway_candidate_decisions_total", 10, pool="large")
        assert await gateway.metric("gateway_candidate_agreement_total", agrees="no") == 10
        await gateway.chat("easy", model="large")  # pinned: nothing was scored
        second = version(tiny_checkpoint, home / "2", 9.0)
        checkpoint.publish(home / "2")
        assert await gateway.settles("gateway_candidate_info", 1, 10, version=second)
        assert await gateway.metric("gateway_candidate_info") == 1
        await gateway.chat("easy again")
        assert await gateway.settles("gateway_candidate_agreement_total", 1, agrees="yes")
        async with gateway.session.get(f"{gateway.admin}/admin/status") as status:
            assert (await status.json())["candidate"] == second
        shutil.copytree(home / "2", home / "3")
        manifest = (home / "3" / checkpoint.MANIFEST).read_text().replace(second, "the-third")
        (home / "3" / checkpoint.MANIFEST).write_text(manifest)
        (home / "3" / checkpoint.ENCODER).write_bytes(b"half of it")
        checkpoint.publish(home / "3")
        assert await gateway.settles("gateway_candidate_loads_total", 1, 10, result="refused")
        assert (await gateway.chat("easy once more")).status == 200
        assert await gateway.settles("gateway_candidate_agreement_total", 2, agrees="yes")  # the second stays
        assert await gateway.metric("gateway_candidate_decisions_total") == 12


async def test_a_candidate_that_can_not_be_loaded_keeps_nobody_from_serving(
    start: StartGateway, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    live = {"path": str(tiny_checkpoint), "deadline_ms": 5000, "candidate": str(tmp_path / "nowhere")}
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], estimator=live) as gateway:
        assert (await gateway.chat("easy")).status == 200
        assert await gateway.metric("gateway_candidate_loads_total", result="refused") >= 1
        assert await gateway.metric("gateway_candidate_info") == 0


async def test_a_candidate_that_hangs_delays_no_request(
    start: StartGateway, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, gate: threading.Event
) -> None:
    from depo_gateway.gateway import checkpoint_watcher

    async def hanging(settings: Any, path: str, metrics: Metrics) -> Candidate:
        runtime, columns = scoring.load_runtime(path, ("small", "large"), "gain")
        gated: Runtime = replace(runtime, session=Gated(runtime.session, gate))  # type: ignore[arg-type]
        return Candidate(gated, columns, "gain", None, metrics)

    monkeypatch.setattr(checkpoint_watcher, "open_candidate", hanging)
    live = {"path": str(tiny_checkpoint), "deadline_ms": 5000, "candidate": str(tiny_checkpoint)}
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], estimator=live) as gateway:
        count = candidate.QUEUE + 30
        answers = await asyncio.gather(*(gateway.chat(f"easy {index}") for index in range(count)))
        assert {answer.status for answer in answers} == {200}
        assert 28 <= await gateway.metric("gateway_candidate_outcomes_total", outcome="busy") <= 30
        gate.set()
        assert await gateway.settles("gateway_candidate_outcomes_total", count, 10)
