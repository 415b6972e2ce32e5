"""A gateway and a learner as processes, and traffic that reaches every phase of a request and of learning.

Two rounds of the same trouble, seconds apart: of a counter that appears with its first event Prometheus knows no
increase.
"""

import asyncio
import contextlib
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from depo_gateway.estimator import checkpoint
from depo_gateway.gateway.config import key_digest
from tests.conftest import WORDS
from tests.gateway.backend import FakeVllm, Script
from tests.gateway.checkpoints import version
from tests.training.fake_vllm import Served, chat, vllm

ROOT = Path(__file__).parents[2]
KEYS = {"team-a": "sk-depo-a", "team-b": "sk-depo-b", "admin": "sk-depo-admin"}
LESSONS = 240  # requests that the learner gets to see
READY_SECONDS = 90.0
LEARN_SECONDS = 150.0
SETTLE_SECONDS = 30.0
REST_SECONDS = 15.0
AWAY = Script(healthy=False, status=503)
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@dataclass
class Program:
    """A process of ours; its stderr is a file."""

    words: list[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __enter__(self) -> "Program":
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self.words],
                cwd=self.log.parent,
                env={**os.environ, **ENVIRONMENT, **self.environment},
                stdout=log,
                stderr=log,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def says(self, pattern: str) -> str:
        """Waits until its log matches, and gives the first group."""
        self.until(lambda: re.search(pattern, self.said()) is not None, READY_SECONDS)
        found = re.search(pattern, self.said())
        assert found is not None
        return found[1]

    def until(self, condition: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition() and self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        assert condition(), self.said()[-3000:]


def prompt(chance: random.Random) -> str:
    words = chance.sample(WORDS[2:], 7)
    words.insert(chance.randrange(8), chance.choice(("hard", "easy")))
    return " ".join(words)


def answers(pool: str) -> Callable[[dict[str, Any]], tuple[int, Any]]:
    """The large pool is always right, the small one on hard prompts: their first estimator has to learn anew."""

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        text = str(body.get("messages", [{}])[-1].get("content", ""))
        return 200, chat("right" if pool == "large" or "hard" in text else "wrong")

    return reply


class Stage:
    """A gateway in front of two good backends, with all its features on, and its learner."""

    def __init__(self, place: Path, tiny: Path, small: Served, large: Served) -> None:
        self.small, self.large = small, large
        self.out, self.config = place / "checkpoints", place / "gateway.yaml"
        shutil.copytree(tiny, self.out / "first")
        checkpoint.publish(self.out / "first")
        version(tiny, place / "candidate", -1.0)
        records = {"url": f"sqlite:///{place / 'records.db'}"}
        pools = {
            name: {"model": f"org/{name}", "cost": cost, "backends": [{"url": served.url}]}
            for name, served, cost in (("small", small, 1.0), ("large", large, 5.0))
        }
        self.raw: dict[str, Any] = {
            "version": 1,
            "listen": {"port": 0},
            "admin": {"port": 0, "key_sha256": key_digest(KEYS["admin"])},
            "pools": pools,
            "routing": {"target": {"large_share": 0.4}, "explore": 0.2},
            "estimator": {"path": str(self.out), "deadline_ms": 2000, "candidate": str(place / "candidate")},
            "auth": {
                "keys": [
                    {"name": "team-a", "sha256": key_digest(KEYS["team-a"])},
                    {"name": "team-b", "sha256": key_digest(KEYS["team-b"]), "large_share": 0.1},
                ]
            },
            "records": {**records, "prompts": "full"},
        }
        self.write(self.raw)
        learning = {
            "records": records,
            "pools": pools,
            "shadow": {"share": 0.9},
            "judge": {"kind": "exact"},
            "listen": {"port": 0},
            "refresh": {"every_labels": 60, "learn": {"min_labels": 60, "folds": 2, "gate": {"least": 20}}},
        }
        (place / "learner.yaml").write_text(yaml.safe_dump(learning))
        self.gateway = Program(["gateway", "serve", "--config", "gateway.yaml"], place / "gateway.log")
        words = ["--follow", "--base", str(tiny), "--out", str(self.out), "--config", "learner.yaml"]
        self.learner = Program(["training", "refresh", *words], place / "learner.log")

    def write(self, raw: dict[str, Any]) -> None:
        self.config.write_text(yaml.safe_dump(raw, sort_keys=False))

    @property
    def url(self) -> str:
        return self.gateway.says(r"serving (\S+)/v1,")

    @property
    def admin(self) -> str:
        return self.gateway.says(r"metrics at (\S+)/metrics")

    def rest(self) -> None:
        """Returns when the learner is done with all that it has got: no label and no training's end for a while."""
        address, seen, since = self.learner.says(r"livez on (\S+)"), [""], time.monotonic()
        until = since + LEARN_SECONDS
        while time.monotonic() < min(since + REST_SECONDS, until):
            with urllib.request.urlopen(f"{address}/metrics") as answer:
                lines = answer.read().decode().splitlines()
            counts = [line for line in lines if line.startswith(("learner_labels_total", "learner_refreshes_total"))]
            if counts != seen:
                seen, since = counts, time.monotonic()
            time.sleep(0.5)
        assert time.monotonic() < until, "the learner goes on learning"

    def published(self) -> bool:
        return (self.out / "current").read_text().strip() != "first"


@contextlib.contextmanager
def stage(place: Path, tiny: Path) -> Iterator[Stage]:
    """Everything up: two backends, the gateway, the learner."""
    with vllm(answers("small")) as small, vllm(answers("large")) as large:
        made = Stage(place, tiny, small, large)
        with made.gateway, made.learner:
            yield made


async def play(stage: Stage) -> None:
    """All of the traffic. It ends when the learner has published and everything has gone wrong twice."""
    async with aiohttp.ClientSession() as session:
        client = Client(session, stage.url, stage.admin)
        chance = random.Random(1)
        async with FakeVllm(script=AWAY) as other_small, FakeVllm(script=AWAY) as other_large:
            others = (other_small, other_large)
            await reload(stage, client, *others)  # before any checkpoint is published: a reload would load it uncounted
            await lessons(client, chance)
            for other in others:
                other.script = Script()
                await client.settles(f'gateway_backend_up{{backend="{other.url}"}}', 1)
            for _ in range(2):
                await trouble(stage, client, *others)
                await asyncio.sleep(2.5)  # two scrapes
            for other in others:
                other.script = AWAY
            await asyncio.to_thread(stage.learner.until, stage.published, LEARN_SECONDS)
            await client.settles('gateway_estimator_loads_total{result="applied"}', 1)
            await asyncio.to_thread(stage.rest)  # a newer version would begin to tell drift anew
            await lessons(client, chance, labelled=False)
            await asyncio.sleep(3)  # scrapes, and the rules after them
            assert not math.isnan(await client.metric("gateway_score_drift "))


@dataclass
class Client:
    """Asks the gateway."""

    session: aiohttp.ClientSession
    url: str
    admin: str

    async def ask(
        self, text: str, model: str = "auto", key: str = "team-a", reference: str | None = "right", **fields: Any
    ) -> tuple[int, str]:
        """The status, and the request's id."""
        body = {"model": model, "messages": [{"role": "user", "content": text}], **fields}
        headers = {"authorization": f"Bearer {KEYS.get(key, key)}"}
        if reference is not None:
            headers["x-depo-reference"] = reference
        async with self.session.post(f"{self.url}/v1/chat/completions", json=body, headers=headers) as answer:
            await answer.read()
            return answer.status, answer.headers["x-request-id"]

    async def rate(self, request: str, score: float) -> int:
        body = {"request_id": request, "score": score}
        headers = {"authorization": f"Bearer {KEYS['team-a']}"}
        async with self.session.post(f"{self.url}/v1/feedback", json=body, headers=headers) as answer:
            return answer.status

    async def reload(self) -> int:
        headers = {"authorization": f"Bearer {KEYS['admin']}"}
        async with self.session.post(f"{self.admin}/admin/reload", headers=headers) as answer:
            return answer.status

    async def metric(self, series: str) -> float:
        """The value of a series as /metrics writes it; of the sum of those that begin so. 0 if there is none."""
        async with self.session.get(f"{self.admin}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(series))

    async def settles(self, series: str, at_least: float) -> None:
        until = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < until:
            if await self.metric(series) >= at_least:
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"{series} stays below {at_least}")


async def calm(stage: Stage, requests: int) -> None:
    """A little traffic, and nothing goes wrong."""
    async with aiohttp.ClientSession() as session:
        client = Client(session, stage.url, stage.admin)
        for index in range(requests):
            assert (await client.ask(f"{('easy', 'hard')[index % 2]} {index}", stream=index % 4 < 2))[0] == 200
            await asyncio.sleep(0.1)


async def lessons(client: Client, chance: random.Random, labelled: bool = True) -> None:
    """Ordinary requests, every fourth streamed, every fifth with feedback, and with what a judge needs."""
    for index in range(LESSONS):
        reference = "right" if labelled else None
        status, request = await client.ask(prompt(chance), reference=reference, stream=index % 4 == 0)
        assert status == 200
        if labelled and index % 5 == 0:
            assert await client.rate(request, 1.0) == 200
    assert await client.rate("req-nobody-s", 1.0) == 404


async def reload(stage: Stage, client: Client, other_small: FakeVllm, other_large: FakeVllm) -> None:
    """Each pool gets a second backend, away for now, and the large one few places."""
    pools = {name: dict(pool) for name, pool in stage.raw["pools"].items()}
    for name, other in (("small", other_small), ("large", other_large)):
        pools[name]["backends"] = [*pools[name]["backends"], {"url": other.url}]
    pools["large"]["max_in_flight"] = 6
    raw = {**stage.raw, "pools": pools}
    stage.write({**raw, "routing": {"threshold": 7}})
    assert await client.reload() == 422
    stage.write(raw)
    assert await client.reload() == 200


async def trouble(stage: Stage, client: Client, other_small: FakeVllm, other_large: FakeVllm) -> None:
    """Everything that can go wrong with a request."""
    good = [client.ask(f"{text} please {index}", stream=True) for text in ("easy", "hard") for index in range(4)]
    await asyncio.gather(*good)
    await _hang_ups(stage, client, other_large)
    assert (await client.ask("easy", model="nonsense"))[0] == 404
    assert (await client.ask("easy", key="nobody"))[0] == 401

    pinned = [(await client.ask(f"large please {index}", model="large", key="team-b"))[0] for index in range(16)]
    assert set(pinned[:-4]) <= {200, 429}
    assert set(pinned[-4:]) == {429}  # its share is spent
    down = [(await client.ask(f"large if you can {index}", model="auto-0.999", key="team-b"))[0] for index in range(16)]
    assert set(down) == {200}

    other_small.script = Script(status=503)  # every second attempt goes elsewhere, until its circuit opens
    tried = [await client.ask(f"again {index}", model="small") for index in range(12)]
    assert {status for status, _ in tried} == {200}
    stage.small.reply = lambda body: (503, {})  # and now the whole pool is away
    fallen = [await client.ask(f"{text} {index}") for text in ("easy", "hard") for index in range(8)]
    assert {status for status, _ in fallen} == {200}
    assert (await client.ask("nobody is there", model="small"))[0] == 503
    stage.small.reply, other_small.script = answers("small"), Script()


async def _hang_ups(stage: Stage, client: Client, other: FakeVllm) -> None:
    """Clients that leave while their body is coming, in line, before and amid the answer."""
    host, port = client.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEYS['team-a']}\r\n"
    writer.write(f"{head}content-type: application/json\r\ncontent-length: 99\r\n\r\n{{".encode())
    await writer.drain()
    await asyncio.sleep(0.1)
    writer.close()

    slow = answers("large")
    stage.large.reply = lambda body: (time.sleep(0.5), slow(body))[1]
    other.script = Script(before_head_s=0.5)
    many = [asyncio.create_task(client.ask(f"many {index}", model="large")) for index in range(20)]
    await asyncio.sleep(0.2)
    for task in many[-3:]:  # in line
        task.cancel()
    await asyncio.gather(*many, return_exceptions=True)
    stage.large.reply = slow

    other.script = Script(before_head_s=30)
    early = [asyncio.create_task(client.ask(f"early {index}", model="large")) for index in range(6)]
    await asyncio.sleep(0.5)
    for task in early:  # those that the other backend has
        task.cancel()
    await asyncio.gather(*early, return_exceptions=True)

    other.script = Script(events=1000, between_s=0.1)
    amid = [asyncio.create_task(client.ask(f"amid {index}", model="large", stream=True)) for index in range(6)]
    await asyncio.sleep(0.5)
    for task in amid:
        task.cancel()
    await asyncio.gather(*amid, return_exceptions=True)
    other.script = Script()
    for phase in ("reading", "queue", "waiting", "streaming"):
        await client.settles(f'gateway_client_disconnects_total{{phase="{phase}"}}', 1)
