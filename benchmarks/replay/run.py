"""One replay: a stream of questions through a running gateway, a learner beside it, and what became of both.

Traffic comes in blocks. A block asks so many new questions that the client can say the right answer of (its header
`x-depo-reference`), so many labels; then, while the learner trains, traffic goes on with questions whose answer nobody
tells. Real traffic would take hours over what is asked here in seconds: waiting for the learner makes up for that.
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
TRAINING_SECONDS = 600.0  # a refresh takes seconds; more, and the learner is stuck
SLOW = 8  # requests a second while the learner trains, at most
WINDOW = 2000  # routed requests


@dataclass(frozen=True, slots=True)
class Block:
    """New questions, each asked once with its reference, then a refresh is waited for."""

    phase: str  # before, or after the switch of traffic
    questions: Sequence[Question]
    every_labels: int  # the learner's, which is killed and started again where that changes


@dataclass(frozen=True, slots=True)
class Plan:
    """All that one replay asks."""

    name: str  # of the scenario
    seed: int
    base: Path
    cold: bool
    blocks: Sequence[Block]
    fill: Mapping[str, Sequence[Question]]  # by phase: what is asked without a reference
    least: Mapping[str, int]  # requests of each phase, at least: a window of shares is 2,000 of them
    later: Mapping[str, Sequence[Question]]  # by name: never asked with a reference; versions are measured on them
    large_share: float = 0.3


@dataclass(slots=True)
class Asked:
    """The client's books."""

    session: aiohttp.ClientSession
    url: str
    served: list[Served] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    async def ask(self, phase: str, question: Question, told: bool) -> None:
        body = {"model": "auto", "messages": [{"role": "user", "content": question.text}], "max_tokens": 64}
        headers = {"x-depo-reference": question.reference} if told else {}
        try:
            async with self.session.post(f"{self.url}/v1/chat/completions", json=body, headers=headers) as answer:
                said = await answer.read()
                head = answer.headers
                if answer.status != 200:
                    self.failures.append(f"{answer.status} {said[:200].decode(errors='replace')}")
                    return
        except (aiohttp.ClientError, TimeoutError) as error:
            self.failures.append(f"{type(error).__name__}: {error}")
            return
        ids = (head["x-request-id"], head["x-depo-pool"], head["x-depo-reason"], head.get("x-depo-estimator", ""))
        self.served.append(Served(phase, told, question, *ids))

    async def all(self, phase: str, questions: Sequence[Question], told: bool) -> None:
        """Several clients at once, in order."""
        waiting = iter(questions)

        async def client() -> None:
            for question in waiting:
                await self.ask(phase, question, told)

        await asyncio.gather(*(client() for _ in range(CLIENTS)))


async def replay(plan: Plan, root: Path, scorer: Scorer) -> dict[str, Any]:
    """Everything measured, as plain values; what the processes said stays in `root`."""
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
            asked = Asked(session, url)
            fills = {phase: cycle(fill) for phase, fill in plan.fill.items()}
            every, labels = 0, 0
            for block in plan.blocks:
                if block.every_labels != every:
                    learning.close()
                    every = block.every_labels
                    settings = processes.learner_config(place, urls, every)
                    learner = learning.enter_context(processes.learner(place, settings, plan.base, plan.cold))
                before = place.trained_to
                await asked.all(block.phase, block.questions, told=True)
                labels += len(block.questions)
                await trained(place, before, learner.poll, asked, block.phase, fills[block.phase])
                await swapped(place, admin, session)
                versions.append({"labels": labels, "phase": block.phase, "asked": len(asked.served)})
                versions[-1] |= {"checkpoint": checkpoint.resolve(place.checkpoints).name}
                if block is last_of(plan, block.phase):
                    learning.close()
                    every = 0
                    short = plan.least[block.phase] - sum(one.phase == block.phase for one in asked.served)
                    await asked.all(block.phase, [next(fills[block.phase]) for _ in range(short)], told=False)
    result = {
        "scenario": plan.name,
        "seed": plan.seed,
        "seconds": round(time.time() - began, 1),
        "failures": asked.failures,
        "requests": len(asked.served),
        "versions": [version | judged(place, version, plan, scorer) for version in versions],
        "start": judged(place, {"checkpoint": "base", "labels": 0}, plan, scorer),
        "refusals": [{"labels": one["labels"], "reasons": one["reasons"]} for one in place.refusals()],
        "share": {"target": plan.large_share, **share_errors(routed(asked.served), plan.large_share, WINDOW)},
        "stream": stream_of(asked.served),
    }
    if "after" in plan.fill:
        result["switch"] = after_switch(place, versions, plan, asked.served, scorer)
    return result


def last_of(plan: Plan, phase: str) -> Block:
    return [block for block in plan.blocks if block.phase == phase][-1]


async def trained(place: Place, before: int, ended: Any, asked: Asked, phase: str, fill: Iterator[Question]) -> None:
    """Until one more refresh has ended; traffic goes on, slowly. Raises ValueError if none does."""
    until = time.monotonic() + TRAINING_SECONDS
    while place.trained_to <= before:
        if ended() is not None or time.monotonic() > until:
            raise ValueError(f"the learner does not train: {processes.last_line(place.root / 'learner.log')}")
        pause = asyncio.sleep(1 / SLOW)
        await asyncio.gather(asked.ask(phase, next(fill), told=False), pause)


async def swapped(place: Place, admin: str, session: aiohttp.ClientSession) -> None:
    """Until the gateway serves what `current` names."""
    version = checkpoint.load_manifest(checkpoint.resolve(place.checkpoints)).version
    until = time.monotonic() + processes.START_SECONDS
    while time.monotonic() < until:
        async with session.get(f"{admin}/metrics") as answer:
            if f'gateway_estimator_info{{version="{version}"}}' in await answer.text():
                return
        await asyncio.sleep(POLL_SECONDS)
    raise ValueError(f"the gateway does not take up {version}: {processes.last_line(place.root / 'gateway.log')}")


def routed(served: Sequence[Served]) -> list[Served]:
    """What scores or chance decided."""
    return [one for one in served if (why := reason_named(one.reason)) and (why.free or why.random)]


def judged(place: Place, version: dict[str, Any], plan: Plan, scorer: Scorer) -> dict[str, Any]:
    """A version on questions of each kind that it never saw."""
    where = place.checkpoints / version["checkpoint"]
    return {
        name: measured(
            scorer.quality(where, later), outcomes(later), np.array([len(question.text) for question in later], float)
        )
        for name, later in plan.later.items()
    }


def stream_of(served: Sequence[Served]) -> dict[str, Any]:
    """What was decided, request by request, for plots: 1 where the large pool served."""
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
    """Block by block after the switch: what was decided then against a coin at the same share, and how the version
    that decided orders these questions, none of which it had seen."""
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


def run(plan: Plan, root: Path, scorer: Scorer) -> dict[str, Any]:
    """replay(), and whether the runtime that served gave the scores that are measured here."""
    root.mkdir(parents=True)
    processes.begin(Place(root), plan.base)
    result = asyncio.run(replay(plan, root, scorer))
    result["score_difference"] = score_difference(Place(root), plan, scorer)
    return result


def score_difference(place: Place, plan: Plan, scorer: Scorer, most: int = 200) -> float:
    """The largest difference of a quality on record from the scorer's, over some requests of every version."""

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
    """A result file, whole or not at all."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(result) + "\n", encoding="utf-8")
    unfinished.replace(path)
