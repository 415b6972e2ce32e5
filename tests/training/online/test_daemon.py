"""depo-train refresh --follow: the whole learner as a process, on a real database, checkpoints and servers."""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from depo_gateway.estimator import checkpoint
from depo_gateway.estimator.held_publish import read_held
from depo_gateway.estimator.records.store import Store
from depo_gateway.estimator.records.types import RoutingSettings, ServedPool
from depo_gateway.estimator.standing import read_standing
from depo_gateway.training.__main__ import main
from depo_gateway.training.online import checkpoint_retention, daemon
from depo_gateway.training.online import settings as learner_settings
from depo_gateway.training.online.daemon_state import DaemonState, read_state
from depo_gateway.training.online.metrics import Heartbeats, LearnerMetrics
from depo_gateway.training.online.trainer_process import TrainerProcess
from tests.training.fake_vllm import record, vllm
from tests.training.online.traffic import LEARN, fill, prompts, right

SECONDS = 90.0


class RunningLearner:
    """A running learner; `output()` is its stderr so far."""

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

    def output(self) -> str:
        return self._err.read_text()

    def until(self, condition: Callable[[], Any], running: bool = True) -> None:
        end = time.monotonic() + SECONDS
        while not condition() and time.monotonic() < end and (not running or self.process.poll() is None):
            time.sleep(0.02)
        assert condition(), self.output()

    def get(self, path: str) -> str:
        address = self.output().split("livez on ")[1].split()[0]
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
def learner(tmp_path: Path, base: Path, **settings: Any) -> Iterator[RunningLearner]:
    made = RunningLearner(tmp_path, base, settings)
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
    """The learner waits for records, asks the large pool, judges, trains and publishes; no label is given."""

    def large(body: dict[str, Any]) -> tuple[int, Any]:
        text = right("large", body["prompt"])
        return 200, {"choices": [{"text": text, "finish_reason": "stop", "logprobs": {"token_logprobs": [-0.2]}}]}

    with vllm(large) as server:
        pools = {
            "small": {"model": "org/small", "backends": [{"url": "http://127.0.0.1:9"}]},
            "large": {"model": "org/large", "backends": [{"url": server.url}]},
        }
        with learner(tmp_path, tiny_checkpoint, pools=pools, shadow={"share": 1.0}, judge={"kind": "exact"}) as running:
            running.until(lambda: "there are no records yet" in running.output())
            assert running.get("/livez") == "ok\n"
            fill(store, 200, 1, labelled=False)
            running.until(lambda: "published" in running.output())
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
            assert read_state(running.out).seq > 0
            assert set(os.listdir(tmp_path)) <= {
                "out",
                "err",
                "learner.yaml",
                "records.db",
                "records.db-wal",
                "records.db-shm",
            }


def test_a_checkpoint_that_costs_more_waits_until_its_owner_accepts_it(
    tmp_path: Path, store: Store, tiny_checkpoint: Path
) -> None:
    """The large pool is better on easy prompts, which are most of the traffic: from a small share it would jump."""
    pools = {"small": ServedPool("org/small", 1.0), "large": ServedPool("org/large", 5.0)}
    in_force = RoutingSettings("gain", 0.6, {}, pools)
    store.append(
        [
            replace(
                record(90_000 + number, time.time() + 60 + number / 1000, asked=text),
                reason="confident",
                threshold=0.6,
                pools=("small", "large"),
                settings=in_force,
            )
            for number, text in enumerate(prompts(400, 9))
            if "hard" not in text or number % 20 == 1
        ]
    )
    fill(store, 200, 1)
    with learner(tmp_path, tiny_checkpoint) as running:
        running.until(lambda: " is held back: " in running.output())
        running.until(lambda: running.metric("publish_held") == 1)
        assert running.metric('refreshes_total{verdict="held"}') == 1
        assert running.metric("publish_held_share_change") > 0.5
        assert running.metric("publish_held_cost_change") > 0.4
        assert not (running.out / "current").exists()
        held = read_held(running.out)
        assert held is not None
        assert held.sentence in running.output()
        assert f"publish it with `depo-train accept --out {running.out}`" in held.sentence
        assert main(["accept", "--out", str(running.out)]) == 0
        running.until(lambda: running.metric("publish_held") == 0)
        assert running.metric(f'info{{version="{held.version}"}}') == 1
        assert f"{held.checkpoint} is no longer held back" in running.output()


def test_records_without_text_are_a_mistake(tmp_path: Path, store: Store, tiny_checkpoint: Path) -> None:
    store.append([record(1, time.time(), asked=None, answer=None)])
    with learner(tmp_path, tiny_checkpoint) as running:
        assert running.process.wait(timeout=SECONDS) == 2
        last = running.output().splitlines()[-1]
    assert last.startswith("depo-train refresh: no record holds its prompt; set records.prompts: full")


def test_a_second_learner_in_the_same_directory_is_refused(tmp_path: Path, store: Store, tiny_checkpoint: Path) -> None:
    with checkpoint_retention.directory_lock(tmp_path / "out"):
        with learner(tmp_path, tiny_checkpoint) as running:
            assert running.process.wait(timeout=SECONDS) == 2
            assert running.output() == (
                f"depo-train refresh: another learner works in {running.out}: it has locked "
                f"{running.out}/.learner.lock; give this one another --out\n"
            )
    with checkpoint_retention.directory_lock(tmp_path / "out"):
        pass


def test_an_unknown_pool_is_a_mistake(tmp_path: Path, tiny_checkpoint: Path) -> None:
    pools = {"huge": {"model": "m", "backends": [{"url": "http://127.0.0.1:9"}]}}
    with learner(tmp_path, tiny_checkpoint, pools=pools) as running:
        assert running.process.wait(timeout=SECONDS) == 2
        assert "pools.huge is no pool of the checkpoint" in running.output()


def test_it_waits_for_a_database_that_is_down_and_ends_at_once_on_sigterm(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    (tmp_path / "records.db").mkdir()
    with learner(tmp_path, tiny_checkpoint) as running:
        running.until(lambda: "failed" in running.output())
        (tmp_path / "records.db").rmdir()
        running.until(lambda: "there are no records yet" in running.output())
        assert running.metric('errors_total{part="records"}') >= 1
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(timeout=15) == 0


async def test_training_is_due_by_labels_or_by_time_and_with_enough_of_them(tmp_path: Path, store: Store) -> None:
    raw: dict[str, Any] = {"records": {"url": "sqlite:///x"}, "refresh": {"every_labels": 30, "every_minutes": 10.0}}
    raw["refresh"]["learn"] = LEARN
    settings = learner_settings.parse_settings(raw)
    process = TrainerProcess(settings, tmp_path, tmp_path, False)
    resources = daemon.Daemon(settings, tmp_path, tmp_path, store, process, LearnerMetrics("0"), Heartbeats())
    now = time.time()

    async def due(state: DaemonState, began: float = now) -> int:
        return (await daemon._labels_due(resources, state, began))[1]

    assert not await due(DaemonState(), 0.0)
    fill(store, 40, 1)
    assert not await due(DaemonState())  # 40 new ones, but fewer than min_labels in all
    fill(store, 25, 2)
    assert await due(DaemonState())
    _, seq = store.count_labels()
    assert not await due(DaemonState(seq, 0.0))
    fill(store, 10, 3)
    assert not await due(DaemonState(seq, now))
    assert await due(DaemonState(seq, now - 601))
    fill(store, 20, 4)
    assert await due(DaemonState(seq, now))
    found, labels = await daemon._labels_due(resources, DaemonState(10**9, now), now)  # of another database
    assert (found, labels) == (DaemonState(0, now), 95)


def test_follow_publishes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--no-publish can't be combined with --follow"):
        daemon.run_daemon(argparse.Namespace(publish=False))


@pytest.mark.slow
def test_killed_anywhere_current_names_a_whole_checkpoint(tmp_path: Path, store: Store, tiny_checkpoint: Path) -> None:
    chance = random.Random(0)
    out, published = tmp_path / "out", set()
    for kill in range(20):
        fill(store, 70, kill + 1)
        (out / "current").unlink(missing_ok=True)  # each is better than the base, which learned the reverse
        with learner(tmp_path, tiny_checkpoint, refresh={"every_labels": 60, "keep": 2, "learn": LEARN}) as running:

            def at_work(kill: int = kill) -> bool:
                """A checkpoint is being written; has just been named; an old one is being deleted."""
                if kill % 3 == 0:
                    return any(out.glob(".refresh-*"))
                if kill % 3 == 1:
                    return any(out.glob(".current.*")) or (out / "current").exists()
                return any(out.glob(".refresh-*.old")) or "published" in running.output()

            end = time.monotonic() + SECONDS
            while not at_work() and time.monotonic() < end:
                time.sleep(0.0005)
            time.sleep(chance.random() * 0.02)
            children = running.children()
            running.process.kill()
            assert running.process.wait() == -signal.SIGKILL, running.output()
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
        running.until(lambda: "livez" in running.output())
        assert not list(out.glob(".current.*"))
        assert not [path for path in out.glob(".refresh-*") if path.is_dir()]
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(timeout=15) == 0
    assert read_state(out).seq > 0
