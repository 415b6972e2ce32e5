"""One replay: a stream of questions through a running gateway with a learner beside it, and the measured results.

Traffic comes in blocks. A block asks new questions with the right answer in the header `x-depo-reference`, so that each
gives a label. Then, while the learner trains, traffic continues with questions without a reference. Real traffic would
take hours for what is asked here in seconds; waiting for the learner compensates for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from benchmarks.replay import processes
from benchmarks.replay.backends import backends
from benchmarks.replay.processes import Place
from benchmarks.replay.questions import Question, by_text
from benchmarks.replay.score import Scorer, Served, advantage, measured, outcomes, share_errors
from depo_gateway.estimator import checkpoint
from depo_gateway.estimator.records.reasons import reason_named
from depo_gateway.estimator.records.store import Store

CLIENTS = 8
POLL_SECONDS = 0.2
TRAINING_SECONDS = 600.0  # a refresh takes seconds; after so long the learner is stuck
SLOW = 8  # requests a second at most, while the learner trains
WINDOW = 2000  # routed requests


@dataclass(frozen=True, slots=True)
class Block:
    """New questions, each asked once with its reference, followed by a refresh."""

    phase: str  # before, or after the switch of traffic
    questions: Sequence[Question]
    every_labels: int  # the learner's setting; it is restarted when that changes


@dataclass(frozen=True, slots=True)
class Plan:
    """All questions of one replay."""

    name: str  # of the scenario
    seed: int
    base: Path
    cold: bool
    blocks: Sequence[Block]
    fill: Mapping[str, Sequence[Question]]  # by phase: asked without a reference
    least: Mapping[str, int]  # requests of each phase, at least: a window of shares is 2,000 of them
    later: Mapping[str, Sequence[Question]]  # by name: never asked with a reference; versions are measured on them
    large_share: float = 0.3


@dataclass(slots=True)
class Client:
    """The client, and its record of answered and failed requests."""

    session: aiohttp.ClientSession
    url: str
    served: list[Served] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    async def ask(self, phase: str, question: Question, with_reference: bool) -> None:
        body = {"model": "auto", "messages": [{"role": "user", "content": question.text}], "max_tokens": 64}
        headers = {"x-depo-reference": question.reference} if with_reference else {}
        try:
            async with self.session.post(f"{self.url}/v1/chat/completions", json=body, headers=headers) as answer:
                content = await answer.read()
                head = answer.headers
                if answer.status != 200:
                    self.failures.append(f"{answer.status} {content[:200].decode(errors='replace')}")
                    return
        except (aiohttp.ClientError, TimeoutError) as error:
            self.failures.append(f"{type(error).__name__}: {error}")
            return
        ids = (head["x-request-id"], head["x-depo-pool"], head["x-depo-reason"], head.get("x-depo-estimator", ""))
        self.served.append(Served(phase, with_reference, question, *ids))

    async def ask_all(self, phase: str, questions: Sequence[Question], with_reference: bool) -> None:
        """Asks them in order, several at once."""
        waiting = iter(questions)

        async def client() -> None:
            for question in waiting:
                await self.ask(phase, question, with_reference)

        await asyncio.gather(*(client() for _ in range(CLIENTS)))


async def replay(plan: Plan, root: Path, scorer: Scorer) -> dict[str, Any]:
    """All measurements, as plain values; the logs of the processes stay in `root`."""
    place = Place(root)
    known = by_text(
        [question for block in plan.blocks for question in block.questions]
        + [question for fill in plan.fill.values() for question in fill]
    )
    began = time.time()
    versions: list[dict[str, Any]] = []
    async with backends(known) as urls, aiohttp.ClientSession() as session:
        config = processes.gateway_config(place, urls, plan.large_share)
        with processes.gateway(place, config) as (url, admin), contextlib.ExitStack() as learning:
            client = Client(session, url)
            fills = {phase: cycle(fill) for phase, fill in plan.fill.items()}
            every, labels = 0, 0
            for block in plan.blocks:
                if block.every_labels != every:
                    learning.close()
                    every = block.every_labels
                    settings = processes.learner_config(place, urls, every)
                    learner = learning.enter_context(processes.learner(place, settings, plan.base, plan.cold))
                before = place.trained_to
                await client.ask_all(block.phase, block.questions, with_reference=True)
                labels += len(block.questions)
                await wait_for_refresh(place, before, learner.poll, client, block.phase, fills[block.phase])
                await wait_for_swap(place, admin, session)
                versions.append({"labels": labels, "phase": block.phase, "asked": len(client.served)})
                versions[-1] |= {"checkpoint": checkpoint.resolve(place.checkpoints).name}
                if block is last_of(plan, block.phase):
                    learning.close()
                    every = 0
                    short = plan.least[block.phase] - sum(one.phase == block.phase for one in client.served)
                    await client.ask_all(
                        block.phase, [next(fills[block.phase]) for _ in range(short)], with_reference=False
                    )
    result = {
        "scenario": plan.name,
        "seed": plan.seed,
        "seconds": round(time.time() - began, 1),
        "failures": client.failures,
        "requests": len(client.served),
        "versions": [version | measure_version(place, version, plan, scorer) for version in versions],
        "start": measure_version(place, {"checkpoint": "base", "labels": 0}, plan, scorer),
        "refusals": [{"labels": one["labels"], "reasons": one["reasons"]} for one in place.refusals()],
        "share": {"target": plan.large_share, **share_errors(routed(client.served), plan.large_share, WINDOW)},
        "stream": stream_of(client.served),
    }
    if "after" in plan.fill:
        result["switch"] = after_switch(place, versions, plan, client.served, scorer)
    return result


def last_of(plan: Plan, phase: str) -> Block:
    return [block for block in plan.blocks if block.phase == phase][-1]


async def wait_for_refresh(
    place: Place, before: int, ended: Any, client: Client, phase: str, fill: Iterator[Question]
) -> None:
    """Sends slow traffic until one more refresh has ended. Raises ValueError if none does."""
    until = time.monotonic() + TRAINING_SECONDS
    while place.trained_to <= before:
        if ended() is not None or time.monotonic() > until:
            raise ValueError(f"the learner does not train: {processes.last_line(place.root / 'learner.log')}")
        pause = asyncio.sleep(1 / SLOW)
        await asyncio.gather(client.ask(phase, next(fill), with_reference=False), pause)


async def wait_for_swap(place: Place, admin: str, session: aiohttp.ClientSession) -> None:
    """Returns once the gateway serves the checkpoint that `current` names."""
    version = checkpoint.load_manifest(checkpoint.resolve(place.checkpoints)).version
    until = time.monotonic() + processes.START_SECONDS
    while time.monotonic() < until:
        async with session.get(f"{admin}/metrics") as answer:
            if f'gateway_estimator_info{{version="{version}"}}' in await answer.text():
                return
        await asyncio.sleep(POLL_SECONDS)
    raise ValueError(f"the gateway does not load {version}: {processes.last_line(place.root / 'gateway.log')}")


def routed(served: Sequence[Served]) -> list[Served]:
    """The requests that scores or random routing decided."""
    return [one for one in served if (why := reason_named(one.reason)) and (why.free or why.random)]


def measure_version(place: Place, version: dict[str, Any], plan: Plan, scorer: Scorer) -> dict[str, Any]:
    """Measurements of a version on questions of each kind that it never saw."""
    where = place.checkpoints / version["checkpoint"]
    return {
        name: measured(
            scorer.quality(where, later), outcomes(later), np.array([len(question.text) for question in later], float)
        )
        for name, later in plan.later.items()
    }


def stream_of(served: Sequence[Served]) -> dict[str, Any]:
    """The decisions, request by request, for plots: 1 where the large pool served."""
    return {
        "phase": [one.phase for one in served],
        "first": [int(one.first) for one in served],
        "large": [int(one.pool == "large") for one in served],
        "small_right": [int(one.question.right[0]) for one in served],
        "large_right": [int(one.question.right[1]) for one in served],
        "reason": [one.reason for one in served],
    }


def after_switch(
    place: Place, versions: Sequence[dict[str, Any]], plan: Plan, served: Sequence[Served], scorer: Scorer
) -> list[dict[str, Any]]:
    """For each block after the switch: the decisions against random routing at the same share, and how the version that
    decided orders these questions, none of which it had seen.
    """
    by_version = {checkpoint.load_manifest(place.checkpoints / v["checkpoint"]).version: v for v in versions}
    rows = []
    blocks = [block for block in plan.blocks if block.phase == "after"]
    for block in blocks:
        texts = {question.text for question in block.questions}
        first = [one for one in served if one.phase == "after" and one.first and one.question.text in texts]
        version = first[0].version
        where = place.checkpoints / by_version[version]["checkpoint"] if version in by_version else None
        row = {"questions": len(first), "labels": by_version.get(version, {}).get("labels", 0)}
        row |= {"advantage": advantage(first), "large_share": float(np.mean([one.pool == "large" for one in first]))}
        row["gap"] = float(np.subtract(*outcomes(block.questions).mean(0)[::-1]))
        if where is not None:
            quality = scorer.quality(where, block.questions)
            row["gain"] = (quality[:, 1] - quality[:, 0]).tolist()
            row["right"] = outcomes(block.questions).astype(int).tolist()
            row["length"] = [len(question.text) for question in block.questions]
        rows.append(row)
    return rows


def run_replay(plan: Plan, root: Path, scorer: Scorer) -> dict[str, Any]:
    """The replay's measurements, and by how much the scores that were served differ from those measured here."""
    root.mkdir(parents=True)
    processes.publish_base(Place(root), plan.base)
    result = asyncio.run(replay(plan, root, scorer))
    result["score_difference"] = score_difference(Place(root), plan, scorer)
    return result


def score_difference(place: Place, plan: Plan, scorer: Scorer, most: int = 200) -> float:
    """The largest difference of a recorded quality from the scorer's, over some requests of every version."""
    store = Store(place.records)
    records = [item.record for item in store.logged(100_000)]
    store.close()
    known = by_text([q for block in plan.blocks for q in block.questions] + [q for f in plan.fill.values() for q in f])
    worst = 0.0
    for path in [place.checkpoints / "base", *sorted(place.checkpoints.glob("refresh-*"))]:
        version = checkpoint.load_manifest(path).version
        mine = [one for one in records if one.estimator == version and one.stage != "cheap" and one.quality][:most]
        if mine:
            texts = [known[one.asked[-1]["content"]] for one in mine if one.asked and not isinstance(one.asked, str)]
            quality = scorer.quality(path, texts)
            theirs = np.array([[one.quality["small"], one.quality["large"]] for one in mine])
            worst = max(worst, float(np.abs(quality - theirs).max()))
    return worst


def save(path: Path, result: dict[str, Any]) -> None:
    """Writes a result file, completely or not at all."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(result) + "\n", encoding="utf-8")
    unfinished.replace(path)
