"""depo-train refresh --follow: the whole learner as a process, on a real database, checkpoints and servers."""

import argparse
import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from depo_gateway.estimator import checkpoint
from depo_gateway.estimator.records.store import Store
from depo_gateway.estimator.records.types import Label
from depo_gateway.estimator.standing import read_standing as read_standing
from depo_gateway.training.online import checkpoint_retention, daemon
from depo_gateway.training.online import settings as learner_settings
from depo_gateway.training.online.daemon import State
from depo_gateway.training.online.metrics import STALE_SECONDS, LearnerMetrics, MetricsServer, Pulse
from depo_gateway.training.online.trainer_process import RefreshProcess, TrainingFailed
from tests.conftest import WORDS
from tests.training.fake_vllm import record, vllm

LEARN = {"min_labels": 60, "folds": 2, "gate": {"least": 20, "resamples": 100}}
SECONDS = 90.0


def prompts(count: int, seed: int) -> list[str]:
    """Different prompts, every other with the word hard."""
    chance = random.Random(seed)
    found = []
    for index in range(count):
        words = chance.sample(WORDS[2:], 7)
        words.insert(chance.randrange(8), "hard" if index % 2 else "easy")
        found.append(" ".join(words))
    return found


def fill(store: Store, count: int, seed: int, labelled: bool = True) -> None:
    """Records, and what both pools are worth on them: here the hard prompts are the small pool's."""
    begun = time.time()
    texts = prompts(count, seed)
    store.append(
        [
            record(
                seed * 10_000 + index, begun + index / 1000, asked=text, reference="right", answer=right("small", text)
            )
            for index, text in enumerate(texts)
        ]
    )
    if labelled:
        by_id = {item.record.id: item.record for item in store.logged(10_000)}
        made = [
            Label(
                by_id[f"id-{seed * 10_000 + index}"].seq,
                pool,
                "exact",
                float(right(pool, text) == "right"),
                None,
                begun,
            )
            for index, text in enumerate(texts)
            for pool in ("small", "large")
        ]
        store.add_labels(made)


def right(pool: str, text: str) -> str:
    return "right" if ("hard" in text) == (pool == "small") else "wrong"


class Learner:
    """A running learner; `said()` is its stderr so far."""

    def __init__(self, tmp_path: Path, base: Path, settings: Mapping[str, Any]) -> None:
        self.out, self._err = tmp_path / "out", tmp_path / "err"
        config = tmp_path / "learner.yaml"
        refresh = {"every_labels": 60, "learn": LEARN}
        tree = {"records": {"url": "sqlite:///records.db"}, "refresh": refresh, "listen": {"port": 0}, **settings}
        config.write_text(yaml.safe_dump(tree))
        words = ["--follow", "--base", str(base), "--out", str(self.out), "--config", str(config)]
        with self._err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "depo_gateway.training", "refresh", *words],
                stderr=err,
                env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
                cwd=tmp_path,
            )

    def said(self) -> str:
        return self._err.read_text()

    def until(self, condition: Callable[[], Any], running: bool = True) -> None:
        end = time.monotonic() + SECONDS
        while not condition() and time.monotonic() < end and (not running or self.process.poll() is None):
            time.sleep(0.02)
        assert condition(), self.said()

    def get(self, path: str) -> str:
        address = self.said().split("livez on ")[1].split()[0]
        with urllib.request.urlopen(address + path, timeout=5) as response:
            text: str = response.read().decode()
        return text

    def metric(self, name: str) -> float:
        found = [line.split()[-1] for line in self.get("/metrics").splitlines() if line.startswith(f"learner_{name} ")]
        return float(found[0]) if found else 0.0

    def children(self) -> list[int]:
        place = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(number) for number in place.read_text().split()] if place.exists() else []


@contextmanager
def learner(tmp_path: Path, base: Path, **settings: Any) -> Iterator[Learner]:
    made = Learner(tmp_path, base, settings)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(f"sqlite:///{tmp_path}/records.db")
    made.create()
    yield made
    made.close()


def test_from_traffic_to_a_published_checkpoint(tmp_path: Path, store: Store, tiny_checkpoint: Path) -> None:
    """Nothing is labelled by hand: the learner waits for records, asks the large pool, judges, trains and publishes."""

    def large(body: dict[str, Any]) -> tuple[int, Any]:
        text = right("large", body["prompt"])
        return 200, {"choices": [{"text": text, "finish_reason": "stop", "logprobs": {"token_logprobs": [-0.2]}}]}

    with vllm(large) as server:
        pools = {
            "small": {"model": "org/small", "backends": [{"url": "http://127.0.0.1:9"}]},
            "large": {"model": "org/large", "backends": [{"url": server.url}]},
        }
        with learner(tmp_path, tiny_checkpoint, pools=pools, shadow={"share": 1.0}, judge={"kind": "exact"}) as running:
            running.until(lambda: "there are no records yet" in running.said())
            assert running.get("/livez") == "ok\n"
            fill(store, 200, 1, labelled=False)
            running.until(lambda: "published" in running.said())
            assert running.metric('refreshes_total{verdict="published"}') == 1
            assert running.metric('labels_total{source="exact"}') == 400
            assert running.metric('shadow_requests_total{outcome="ok",pool="large"}') == 200
            assert running.metric("labels_seen") >= 60
            assert running.metric("last_publish_timestamp_seconds") > time.time() - 100
            place = checkpoint.resolve(running.out)
            manifest, _ = checkpoint.load_checkpoint(place)
            assert running.metric(f'info{{version="{manifest.version}"}}') == 1
            assert "learner_calibration_error" in running.get("/metrics")
            assert manifest.parent == checkpoint.load_manifest(tiny_checkpoint).version
            standing = read_standing(running.out)
            assert standing is not None
            assert (standing.version, standing.beats_random) == (manifest.version, True)
            child = running.children()
            assert len(child) == 1
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(timeout=15) == 0
            assert not Path(f"/proc/{child[0]}").exists()
            assert daemon.read_state(running.out).seq > 0
            assert set(os.listdir(tmp_path)) <= {
                "out",
                "err",
                "learner.yaml",
                "records.db",
                "records.db-wal",
                "records.db-shm",
            }


def test_records_without_text_are_a_mistake(tmp_path: Path, store: Store, tiny_checkpoint: Path) -> None:
    store.append([record(1, time.time(), asked=None, answer=None)])
    with learner(tmp_path, tiny_checkpoint) as running:
        assert running.process.wait(timeout=SECONDS) == 2
        last = running.said().splitlines()[-1]
    assert last.startswith("depo-train refresh: no record holds its prompt: records.prompts is not full")


def test_a_second_learner_in_the_same_directory_is_refused(tmp_path: Path, store: Store, tiny_checkpoint: Path) -> None:
    with checkpoint_retention.held(tmp_path / "out"):
        with learner(tmp_path, tiny_checkpoint) as running:
            assert running.process.wait(timeout=SECONDS) == 2
            assert running.said() == (
                f"depo-train refresh: another learner works in {running.out}: it holds {running.out}/.learner.lock; "
                "give this one another --out\n"
            )
    with checkpoint_retention.held(tmp_path / "out"):
        pass


def test_an_unknown_pool_is_a_mistake(tmp_path: Path, tiny_checkpoint: Path) -> None:
    pools = {"huge": {"model": "m", "backends": [{"url": "http://127.0.0.1:9"}]}}
    with learner(tmp_path, tiny_checkpoint, pools=pools) as running:
        assert running.process.wait(timeout=SECONDS) == 2
        assert "pools.huge is no pool of the checkpoint" in running.said()


def test_it_waits_for_a_database_that_is_away_and_ends_at_once_when_told(tmp_path: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / "records.db").mkdir()
    with learner(tmp_path, tiny_checkpoint) as running:
        running.until(lambda: "failed" in running.said())
        (tmp_path / "records.db").rmdir()
        running.until(lambda: "there are no records yet" in running.said())
        assert running.metric('errors_total{part="records"}') >= 1
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(timeout=15) == 0


async def test_a_training_that_dies_is_told_and_the_next_one_works(
    tmp_path: Path, store: Store, tiny_checkpoint: Path
) -> None:
    fill(store, 120, 1)
    out = tmp_path / "out"
    raw = {"records": {"url": f"sqlite:///{tmp_path}/records.db"}, "refresh": {"learn": LEARN}}
    process = RefreshProcess(learner_settings.parse_settings(raw), tiny_checkpoint, out, False)
    try:
        training = asyncio.create_task(process.refresh())
        while process._process is None:  # noqa: ASYNC110  a fact of the code's, not the test's
            await asyncio.sleep(0.01)
        first = process._process.pid
        os.kill(first, signal.SIGKILL)
        with pytest.raises(TrainingFailed, match="the training process ended with -9"):
            await training
        trained = await process.refresh()
        assert trained.published == checkpoint.load_manifest(checkpoint.resolve(out)).version
        assert trained.seq == store.count_labels()[1]
        assert process._process is not None
        second = process._process.pid
        again = await process.refresh()
        assert process._process.pid == second  # torch and the embeddings are not loaded anew
        assert again.labels == trained.labels
    finally:
        await process.end()
    with pytest.raises(ProcessLookupError):
        os.kill(second, 0)


async def test_a_training_that_can_not_start_is_tried_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("where nothing can be written")
    settings = learner_settings.parse_settings({"records": {"url": f"sqlite:///{tmp_path}/records.db"}})
    with pytest.raises(TrainingFailed, match="no training process starts"):
        await RefreshProcess(settings, tmp_path, out, False).refresh()


async def test_what_another_try_would_repeat_is_a_mistake(tmp_path: Path, store: Store, tiny_checkpoint: Path) -> None:
    store.append([record(1, time.time(), pools=("small", "huge"))])
    (one,) = store.unshadowed(1)
    store.add_labels([Label(one.seq, "huge", "exact", 1.0)])
    settings = learner_settings.parse_settings({"records": {"url": f"sqlite:///{tmp_path}/records.db"}})
    process = RefreshProcess(settings, tiny_checkpoint, tmp_path / "out", False)
    try:
        with pytest.raises(ValueError, match="the records know the pool 'huge'"):
            await process.refresh()
    finally:
        await process.end()


def put(out: Path, tiny_checkpoint: Path, *names: str) -> None:
    for name in names:
        shutil.copytree(tiny_checkpoint, out / name)


def test_the_newest_checkpoints_are_kept_and_the_current_one_always(tmp_path: Path, tiny_checkpoint: Path) -> None:
    names = [f"refresh-2026010{day}-000000-aaaa" for day in range(1, 7)]
    put(tmp_path, tiny_checkpoint, *names, "fitted")
    assert checkpoint_retention.prune(tmp_path, 2) == []  # without a `current` nobody knows what is served
    checkpoint.publish(tmp_path / names[0])
    assert checkpoint_retention.prune(tmp_path, 2, (tmp_path / names[1],)) == names[2:4]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {names[0], names[1], names[4], names[5], "fitted", "current"}
    assert checkpoint_retention.prune(tmp_path, 2, (tmp_path / names[1],)) == []


def test_what_a_kill_leaves_is_cleared_and_nothing_else(tmp_path: Path, tiny_checkpoint: Path) -> None:
    put(tmp_path, tiny_checkpoint, "refresh-1", ".refresh-2.half", ".refresh-3.old", ".other")
    checkpoint.publish(tmp_path / "refresh-1")
    for name in (".current.17", ".standing.json.17", ".refresh-abcd", "standing.json"):
        (tmp_path / name).write_text("x")
    (tmp_path / checkpoint_retention.TEMPORARY / "deep").mkdir(parents=True)
    checkpoint_retention.clear(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"refresh-1", ".other", "current", "standing.json"}


def test_the_state_is_read_back_and_a_broken_one_is_none(tmp_path: Path) -> None:
    assert daemon.read_state(tmp_path) == State()
    daemon.write_state(tmp_path, State(17, 3.5))
    assert daemon.read_state(tmp_path) == State(17, 3.5)
    (tmp_path / daemon.STATE).write_text('{"seq": ')
    assert daemon.read_state(tmp_path) == State()


async def test_training_is_due_by_labels_or_by_time_and_with_enough_of_them(tmp_path: Path, store: Store) -> None:
    raw: dict[str, Any] = {"records": {"url": "sqlite:///x"}, "refresh": {"every_labels": 30, "every_minutes": 10.0}}
    raw["refresh"]["learn"] = LEARN
    settings = learner_settings.parse_settings(raw)
    process = RefreshProcess(settings, tmp_path, tmp_path, False)
    shared = daemon.Learner(settings, tmp_path, tmp_path, store, process, LearnerMetrics("0"), Pulse())
    now = time.time()

    async def due(state: State, began: float = now) -> bool:
        return (await daemon._due(shared, state, began))[1]

    assert not await due(State(), 0.0)
    fill(store, 40, 1)
    assert not await due(State())  # 40 new ones, but fewer than min_labels in all
    fill(store, 25, 2)
    assert await due(State())
    _, seq = store.count_labels()
    assert not await due(State(seq, 0.0))
    fill(store, 10, 3)
    assert not await due(State(seq, now))
    assert await due(State(seq, now - 601))
    fill(store, 20, 4)
    assert await due(State(seq, now))
    found, yes = await daemon._due(shared, State(10**9, now), now)  # of another database
    assert (found, yes) == (State(0, now), True)


def test_livez_tells_of_a_loop_that_stands_still() -> None:
    now = [0.0]
    pulse = Pulse(lambda: now[0])
    pulse.beat("refresh")
    pulse.beat("shadow")
    with MetricsServer("127.0.0.1", 0, LearnerMetrics("1.2"), pulse) as server:
        address = f"http://127.0.0.1:{server.port}"

        def get(path: str) -> tuple[int, str]:
            try:
                with urllib.request.urlopen(address + path, timeout=5) as response:
                    return response.status, response.read().decode()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.read().decode()

        assert get("/livez") == (200, "ok\n")
        now[0] = STALE_SECONDS + 1
        pulse.beat("refresh")
        assert get("/livez") == (503, "stands still: shadow\n")
        assert 'learner_build_info{version="1.2"} 1.0' in get("/metrics")[1]
        assert get("/")[0] == 404
        with pytest.raises(ValueError, match=f"can't listen on 127.0.0.1:{server.port}: Address already in use"):
            MetricsServer("127.0.0.1", server.port, LearnerMetrics("1"), pulse)


def test_follow_publishes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--no-publish goes without --follow"):
        daemon.run(argparse.Namespace(publish=False))


@pytest.mark.slow
def test_killed_anywhere_current_names_a_whole_checkpoint(tmp_path: Path, store: Store, tiny_checkpoint: Path) -> None:
    chance = random.Random(0)
    out, published = tmp_path / "out", set()
    for kill in range(20):
        fill(store, 70, kill + 1)
        (out / "current").unlink(missing_ok=True)  # against the base, which knows nothing of this, each is better
        with learner(tmp_path, tiny_checkpoint, refresh={"every_labels": 60, "keep": 2, "learn": LEARN}) as running:

            def at_work(kill: int = kill) -> bool:
                """A checkpoint is being written; has just been named; an old one is being deleted."""
                if kill % 3 == 0:
                    return any(out.glob(".refresh-*"))
                if kill % 3 == 1:
                    return any(out.glob(".current.*")) or (out / "current").exists()
                return any(out.glob(".refresh-*.old")) or "published" in running.said()

            end = time.monotonic() + SECONDS
            while not at_work() and time.monotonic() < end:
                time.sleep(0.0005)
            time.sleep(chance.random() * 0.02)
            children = running.children()
            running.process.kill()
            assert running.process.wait() == -signal.SIGKILL, running.said()
            for child in children:
                with suppress(FileNotFoundError, ProcessLookupError):
                    while Path(f"/proc/{child}/cmdline").read_bytes():  # "": a zombie
                        assert time.monotonic() < end
                        time.sleep(0.01)
        if (out / "current").exists():
            manifest, _ = checkpoint.load_checkpoint(checkpoint.resolve(out))
            published.add(manifest.version)
        for path in out.glob("refresh-*"):
            checkpoint.load_checkpoint(path)
        standing = read_standing(out)
        assert standing is None or standing.labels > 0
    assert len(published) >= 6
    with learner(tmp_path, tiny_checkpoint) as running:
        running.until(lambda: "livez" in running.said())
        assert not list(out.glob(".current.*"))
        assert not [path for path in out.glob(".refresh-*") if path.is_dir()]
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(timeout=15) == 0
    assert daemon.read_state(out).seq > 0
