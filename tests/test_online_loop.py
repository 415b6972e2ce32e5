"""Two gateways on one PostgreSQL and one learner beside them: traffic becomes labels, labels an estimator, which both
gateways take up while they serve."""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from depo_gateway.estimator import checkpoint
from depo_gateway.estimator.records.store import Store
from depo_gateway.estimator.records.types import FEEDBACK
from tests.conftest import WORDS
from tests.gateway.conftest import Running, running
from tests.postgres import Postgres
from tests.training.fake_vllm import chat, vllm

pytestmark = pytest.mark.slow
REQUESTS = 240
FRESH = 40  # asked while everything is being killed, swapped and taken away


def prompt(chance: random.Random) -> str:
    words = chance.sample(WORDS[2:], 7)
    words.insert(chance.randrange(8), chance.choice(("hard", "easy")))
    return " ".join(words)


def right(pool: str, text: str) -> bool:
    """Here the large pool alone can do what is easy for the estimator that they start with: it has to learn anew."""
    return pool == "large" or "hard" in text


def answers(pool: str) -> Callable[[dict[str, Any]], tuple[int, Any]]:
    return lambda body: (200, chat("right" if right(pool, body["messages"][-1]["content"]) else "wrong"))


class Learner:
    """The learner as a process, that can be killed and started again."""

    def __init__(self, place: Path, words: list[str]) -> None:
        self.place, self.words = place, words
        self.start()

    def start(self) -> None:
        with (self.place / "err").open("a") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "depo_gateway.training", "refresh", "--follow", *self.words],
                stderr=err,
                env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
                cwd=self.place,
            )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def said(self) -> str:
        return (self.place / "err").read_text()


async def until(condition: Callable[[], bool], learner: Learner, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:  # noqa: ASYNC110  facts of other processes
        await asyncio.sleep(0.1)
    assert condition(), learner.said()


async def ask(gateway: Running, text: str) -> tuple[str, str, bool]:
    """The request's id, its pool, whether the answer is right."""
    body = {"model": "auto", "messages": [{"role": "user", "content": text}]}
    headers = {"x-depo-reference": "right"}
    async with gateway.session.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers) as answer:
        told = await answer.json(content_type=None)
        assert answer.status == 200, told
        good = told["choices"][0]["message"]["content"] == "right"
        return answer.headers["x-request-id"], answer.headers["x-depo-pool"], good


async def rate(gateway: Running, request: str, good: bool) -> int:
    body = {"request_id": request, "score": float(good)}
    async with gateway.session.post(f"{gateway.url}/v1/feedback", json=body) as answer:
        await answer.read()
        return answer.status


async def test_two_gateways_one_postgresql_one_learner(
    postgres: Postgres, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    url = postgres.database()
    out = tmp_path / "checkpoints"
    shutil.copytree(tiny_checkpoint, out / "first")
    checkpoint.publish(out / "first")
    chance = random.Random(1)
    with vllm(answers("small")) as small, vllm(answers("large")) as large:
        servers = {"small": (small.url, 1.0), "large": (large.url, 5.0)}
        pools = {
            name: {"model": f"org/{name}", "cost": cost, "backends": [{"url": place}]}
            for name, (place, cost) in servers.items()
        }
        raw = {
            "version": 1,
            "listen": {"port": 0},
            "admin": {"port": 0},
            "pools": pools,
            "routing": {"threshold": 0.7, "explore": 0.2, "sticky": False},
            "estimator": {"path": str(out), "deadline_ms": 2000},
            "records": {"url": url, "prompts": "full"},
        }
        learning = {
            "records": {"url": url},
            "pools": pools,
            "shadow": {"share": 0.7},
            "judge": {"kind": "exact"},
            "listen": {"port": 0},
            "refresh": {"every_labels": 60, "learn": {"min_labels": 60, "folds": 2, "gate": {"least": 20}}},
            "gate": {"max_cost_increase": 1.0},  # labels are the reverse of what the first checkpoint learned
        }
        (tmp_path / "learner.yaml").write_text(yaml.safe_dump(learning))
        async with contextlib.AsyncExitStack() as stack:
            gateways = [await stack.enter_async_context(running(raw)) for _ in range(2)]
            words = ["--base", str(tiny_checkpoint), "--out", str(out), "--config", "learner.yaml"]
            learner = Learner(tmp_path, words)
            stack.callback(learner.kill)
            scored: dict[str, float] = {}

            async def serve(index: int) -> None:
                gateway, other = gateways[index % 2], gateways[1 - index % 2]
                request, _, good = await ask(gateway, prompt(chance))
                if index % 2:  # rated through the replica that did not serve it
                    assert await rate(other, request, good) == 200
                    scored[request] = float(good)

            def published() -> bool:
                return (out / "current").read_text().strip() != "first"

            for index in range(REQUESTS):
                await serve(index)
                if index == REQUESTS // 2:
                    learner.kill()
                    learner.start()
            served = REQUESTS
            while not published() and served < 4 * REQUESTS:  # a candidate may be refused; the next has more labels
                await serve(served)
                served += 1
                await asyncio.sleep(0.1)
            await until(published, learner)
            fresh = checkpoint.load_checkpoint(checkpoint.resolve(out))[0].version
            for gateway in gateways:
                assert await gateway.settles("gateway_estimator_info", 1, 20.0, version=fresh)

            # the database goes away for a while: serving goes on, feedback is refused, and nothing accepted is lost
            postgres.stop()
            for index in range(FRESH):
                request, _, good = await ask(gateways[index % 2], prompt(chance))
            assert await rate(gateways[0], request, good) == 503
            postgres.start()
            assert learner.process.poll() is None
            request, _, good = await ask(gateways[0], prompt(chance))
            for _ in range(30):  # as its Retry-After says: the writers try again, ever more seldom
                if (status := await rate(gateways[1], request, good)) != 503:
                    break
                await asyncio.sleep(1)
            assert status == 200
            scored[request] = float(good)
            for gateway in gateways:
                assert await gateway.metric("gateway_records_total", outcome="dropped") == 0

            store = Store(url)
            known = {
                item.record.id: label.quality
                for item in store.logged(10_000)
                for label in item.labels
                if label.source == FEEDBACK
            }
            assert known == scored
            assert len(store.logged(10_000)) == served + FRESH + 1
            store.close()

            # and the new estimator knows better: easy prompts are the large pool's, hard ones either's
            last = [await ask(gateways[index % 2], prompt(chance)) for index in range(FRESH)]
            assert sum(good for *_, good in last) >= 0.85 * FRESH
            learner.process.send_signal(signal.SIGTERM)
            assert learner.process.wait(15) == 0
