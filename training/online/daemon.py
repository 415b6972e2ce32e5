"""`depo-train refresh --follow`: for ever, shadow what was served and train when there is something new to learn.

Two loops in one process: shadowing (shadow.py), and this file's, which counts labels and has a process of its own train
(refresh_process.py). Nothing here is needed to serve, and every file is written whole or not at all: the learner may be
killed at any moment, and goes on from the database and the checkpoints when it is started again.
"""

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from depo_gateway import __version__
from depo_gateway.estimator import checkpoint
from depo_gateway.estimator.records.store import Store, StoreError
from depo_gateway.training.judging.judges import open_judge
from depo_gateway.training.judging.pool_client import PoolClient
from depo_gateway.training.online import checkpoint_retention
from depo_gateway.training.online import settings as learner_settings
from depo_gateway.training.online.metrics import LearnerMetrics, MetricsServer, Pulse
from depo_gateway.training.online.reference_set import reference_rows
from depo_gateway.training.online.refresh_config import NO_TEXT
from depo_gateway.training.online.settings import LearnerSettings
from depo_gateway.training.online.shadowing import Shadow
from depo_gateway.training.online.trainer_process import RefreshProcess, Trained, TrainingFailed

POLL_SECONDS = 2.0  # between two counts of new labels
LONGEST_WAIT_SECONDS = 60.0  # for a database that is away
LONGEST_RETRY_SECONDS = 1800.0  # after a training that failed
STOP_SECONDS = 8.0  # after SIGTERM; what still runs then is cut off, which is no harm
STATE = "learner.json"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class State:
    """What the last training saw, so that a restart doesn't repeat it. Lost, it costs one training."""

    seq: int = 0  # the highest label
    time: float = 0.0  # Unix seconds


@dataclass(frozen=True, slots=True)
class Learner:
    """What the loops share."""

    settings: LearnerSettings
    base: Path
    out: Path
    store: Store
    process: RefreshProcess
    metrics: LearnerMetrics
    pulse: Pulse


def run(args: argparse.Namespace) -> int:
    """0 after SIGTERM or SIGINT. ValueError for the user's mistakes, records without text among them."""
    if not args.publish:
        raise ValueError("--no-publish goes without --follow, which publishes what is better and nothing else")
    settings = learner_settings.load_settings(args.config, args.records)
    out = Path(args.out)
    base = checkpoint.resolve(args.base)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    metrics, pulse = LearnerMetrics(__version__), Pulse()
    with checkpoint_retention.held(out):
        checkpoint_retention.clear(out)
        _check_pools(settings, champion(base, out), args.cold)
        reference_rows(settings, base, out)  # a table that can't be read is told now, not at the first training
        store = Store(learner_settings.database_url(settings.records))
        process = RefreshProcess(settings, base, out, args.cold)
        learner = Learner(settings, base, out, store, process, metrics, pulse)
        with MetricsServer(settings.listen.host, settings.listen.port, metrics, pulse) as server:
            log.info("metrics and livez on http://%s:%d", settings.listen.host, server.port)
            asyncio.run(_until_told(learner))
    return 0


def champion(base: Path, out: Path) -> Path:
    """The checkpoint that a refresh starts from: what `current` names, else the base."""
    return checkpoint.resolve(out) if (out / "current").exists() else base


async def _until_told(learner: Learner) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    work = asyncio.create_task(_work(learner))
    told = asyncio.create_task(stop.wait())
    await asyncio.wait((work, told), return_when=asyncio.FIRST_COMPLETED)
    if stop.is_set():
        log.info("stopping")
        # A thread may hang in a database's driver, and the interpreter would wait for it.
        watch = threading.Timer(STOP_SECONDS, os._exit, (0,))
        watch.daemon = True
        watch.start()
        work.cancel()
    told.cancel()
    with suppress(asyncio.CancelledError):
        await work


async def _work(learner: Learner) -> None:
    try:
        await _wait_for_text(learner)
        async with asyncio.TaskGroup() as group:
            group.create_task(_refreshes(learner))
            if learner.settings.shadow.share > 0:
                group.create_task(_shadow(learner))
    except* ValueError as mistakes:
        raise mistakes.exceptions[0] from None
    finally:
        await learner.process.end()
        learner.store.close()


async def _wait_for_text(learner: Learner) -> None:
    """Returns once a record with its prompt is there. ValueError if there are records, and none holds its prompt."""
    wait, told = 1.0, False
    while True:
        learner.pulse.beat("refresh")
        try:
            await asyncio.to_thread(learner.store.create)
            records, with_text = await asyncio.to_thread(learner.store.count_records)
        except StoreError as error:
            log.warning("%s; trying again", error)
            learner.metrics.errors.labels("records").inc()
            await asyncio.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)
            continue
        if with_text:
            return
        if records:
            raise ValueError(NO_TEXT)
        if not told:
            log.info("there are no records yet; waiting for the gateways to write some (records.prompts: full)")
            told = True
        await asyncio.sleep(POLL_SECONDS)


async def _shadow(learner: Learner) -> None:
    settings, metrics = learner.settings, learner.metrics
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
    ) as session:
        pools = PoolClient(session, settings.pools, metrics, settings.shadow.priority, settings.shadow.timeout_s)
        async with open_judge(settings.judge, session, pools, metrics) as judge:
            await Shadow(
                learner.store,
                pools,
                judge,
                settings.judge.kind,
                settings.shadow,
                metrics,
                lambda: learner.pulse.beat("shadow"),
            ).run()


async def _refreshes(learner: Learner) -> None:
    """Counts labels; trains when there are enough new ones, or any and it is time; says what came of it."""
    _show_current(learner)
    state = read_state(learner.out)
    began = time.time()
    away, retry, not_before = 1.0, 60.0, 0.0
    while True:
        learner.pulse.beat("refresh")
        await asyncio.sleep(POLL_SECONDS)
        try:
            state, due = await _due(learner, state, began)
            away = 1.0
        except StoreError as error:
            log.warning("%s; trying again", error)
            learner.metrics.errors.labels("records").inc()
            await asyncio.sleep(away)
            away = min(2 * away, LONGEST_WAIT_SECONDS)
            continue
        if not due or time.time() < not_before:
            continue
        try:
            trained = await _train(learner)
        except TrainingFailed as error:
            log.error("%s; the next try in %.0f s", error, retry)
            learner.metrics.refreshes.labels("failed").inc()
            learner.metrics.errors.labels("refresh").inc()
            not_before = time.time() + retry
            retry = min(2 * retry, LONGEST_RETRY_SECONDS)
            continue
        retry = 60.0
        state = State(trained.seq, time.time())
        _report(learner, trained)
        try:
            write_state(learner.out, state)
            checkpoint_retention.prune(learner.out, learner.settings.refresh.keep, (learner.base,))
        except OSError as error:
            log.warning("%s: %s", error.filename or learner.out, error.strerror)
            learner.metrics.errors.labels("disk").inc()


async def _due(learner: Learner, state: State, began: float) -> tuple[State, bool]:
    """The state, its seq taken back where the database is another than before; and whether to train now."""
    refresh = learner.settings.refresh
    count, highest = await asyncio.to_thread(learner.store.count_labels, state.seq)
    if highest < state.seq:
        state = State(0, state.time)
        count, highest = await asyncio.to_thread(learner.store.count_labels)
    waited = time.time() - (state.time or began)
    due = count >= refresh.every_labels or (count > 0 and waited >= refresh.every_minutes * 60)
    if due and state.seq:
        count, _ = await asyncio.to_thread(learner.store.count_labels)
    return state, due and count >= refresh.learn.min_labels


async def _train(learner: Learner) -> Trained:
    began = time.monotonic()
    task = asyncio.create_task(learner.process.refresh())
    try:
        while not task.done():
            learner.pulse.beat("refresh")
            await asyncio.wait((task,), timeout=POLL_SECONDS)
    finally:
        task.cancel()
    learner.metrics.refresh_duration.observe(time.monotonic() - began)
    return task.result()


def _report(learner: Learner, trained: Trained) -> None:
    metrics = learner.metrics
    metrics.refreshes.labels("refused" if trained.published is None else "published").inc()
    metrics.labels_seen.set(trained.labels)
    errors = trained.figures.get("calibration_error")
    for of, error in errors.items() if isinstance(errors, dict) else ():
        if isinstance(error, int | float):
            metrics.calibration_error.labels(of).set(error)
    if trained.standing is not None:
        metrics.advantage.set(trained.standing["advantage"])
    for note in trained.notes:
        log.info("%s", note)
    if trained.published is None:
        log.info("refused, from %d labelled records: %s", trained.labels, "; ".join(trained.reasons))
    else:
        log.info("published %s, from %d labelled records", trained.published, trained.labels)
        metrics.last_publish.set(time.time())
        _show_current(learner)


def _show_current(learner: Learner) -> None:
    learner.metrics.info.clear()
    manifest = checkpoint.load_manifest(champion(learner.base, learner.out))
    learner.metrics.info.labels(manifest.version).set(1)


def _check_pools(settings: LearnerSettings, place: Path, cold: bool) -> None:
    known = checkpoint.load_manifest(place).pools
    unknown = [name for name in settings.pools if name not in known]
    if unknown and not cold and place != checkpoint.BUILTIN.resolve():  # its two pools stand for any two
        raise ValueError(
            f"pools.{unknown[0]} is no pool of the checkpoint {place}, which scores {', '.join(known)}; "
            "pools are named as the gateway names them"
        )


def read_state(out: Path) -> State:
    """What the last training saw; nothing where the file is absent or can't be read."""
    try:
        raw = json.loads((out / STATE).read_text(encoding="utf-8"))
        return State(int(raw["seq"]), float(raw["time"]))
    except (OSError, ValueError, KeyError, TypeError):
        return State()


def write_state(out: Path, state: State) -> None:
    """Beside its place, then renamed."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=out, prefix=f".{checkpoint_retention.MADE}", delete=False
    ) as file:
        file.write(json.dumps({"seq": state.seq, "time": state.time}) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, out / STATE)
