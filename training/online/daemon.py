"""`depo-train refresh --follow`: shadows served traffic, and trains whenever there are enough new labels.

Two loops in one process: shadowing (shadowing.py), and the one of this file, which counts labels and has a separate
process train (trainer_process.py). Serving does not depend on it. Every file is written completely or not at all, so
the daemon may be killed at any moment, and continues from the database and the checkpoints when it is started again.
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from depo_gateway import __version__
from depo_gateway.estimator import checkpoint, held_publish
from depo_gateway.estimator.configuration.shared import database_url
from depo_gateway.estimator.held_publish import HeldPublish
from depo_gateway.estimator.records.store import Store, StoreError
from depo_gateway.training.judging.label_sources import open_judge
from depo_gateway.training.judging.pool_client import PoolClient
from depo_gateway.training.online import checkpoint_retention
from depo_gateway.training.online import settings as learner_settings
from depo_gateway.training.online.champion_path import champion_path
from depo_gateway.training.online.daemon_state import DaemonState, read_state, write_state
from depo_gateway.training.online.metrics import Heartbeats, LearnerMetrics, MetricsServer
from depo_gateway.training.online.reference_set import reference_rows
from depo_gateway.training.online.refresh_config import NO_TEXT
from depo_gateway.training.online.settings import LearnerSettings
from depo_gateway.training.online.shadowing import Shadow
from depo_gateway.training.online.spend_ledger import SpendLedger
from depo_gateway.training.online.trainer_process import TrainerProcess, TrainerResult, TrainingError

LABEL_POLL_SECONDS = 2.0  # between two counts of new labels
LONGEST_DATABASE_WAIT_SECONDS = 60.0
FIRST_RETRY_SECONDS = 60.0  # after a refresh that failed; doubled each time
LONGEST_RETRY_SECONDS = 1800.0
STOP_SECONDS = 8.0  # after SIGTERM; whatever still runs then is ended, which does no harm
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Daemon:
    """What the loops share."""

    settings: LearnerSettings
    base: Path
    out: Path
    store: Store
    process: TrainerProcess
    metrics: LearnerMetrics
    heartbeats: Heartbeats


def run_daemon(args: argparse.Namespace) -> int:
    """0 after SIGTERM or SIGINT. Raises ValueError for the user's mistakes, records without text among them."""
    if not args.publish:
        raise ValueError("--no-publish can't be combined with --follow, which publishes whatever is better")
    settings = learner_settings.load_settings(args.config, args.records, args.max_cost_increase)
    out = Path(args.out)
    base = checkpoint.resolve(args.base)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    metrics, heartbeats = LearnerMetrics(__version__), Heartbeats()
    with checkpoint_retention.directory_lock(out):
        checkpoint_retention.remove_leftovers(out)
        check_pools(settings, champion_path(base, out), args.cold)
        reference_rows(settings, base, out)  # an unreadable table fails now, not at the first refresh
        store = Store(database_url(settings.records))
        process = TrainerProcess(settings, base, out, args.cold)
        daemon = Daemon(settings, base, out, store, process, metrics, heartbeats)
        with MetricsServer(settings.listen.host, settings.listen.port, metrics, heartbeats) as server:
            asyncio.run(_run_until_signal(daemon, f"{settings.listen.host}:{server.port}"))
    return 0


def check_pools(settings: LearnerSettings, place: Path, cold: bool) -> None:
    """Raises ValueError where the settings name a pool that the checkpoint at `place` does not score."""
    scored = checkpoint.load_manifest(place).pools
    unknown = [name for name in settings.pools if name not in scored]
    if unknown and not cold and place != checkpoint.BUILTIN.resolve():  # its two pools take the names of any two
        raise ValueError(
            f"pools.{unknown[0]} is no pool of the checkpoint {place}, which scores {', '.join(scored)}; "
            "pools are named as the gateway names them"
        )


async def _run_until_signal(daemon: Daemon, address: str) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    log.info("metrics and livez on http://%s", address)  # whoever waits for this line may send a signal
    loops = asyncio.create_task(_run_loops(daemon))
    signalled = asyncio.create_task(stop.wait())
    await asyncio.wait((loops, signalled), return_when=asyncio.FIRST_COMPLETED)
    if stop.is_set():
        log.info("stopping")
        # A thread may hang in a database driver, and the interpreter would wait for it.
        deadline = threading.Timer(STOP_SECONDS, os._exit, (0,))
        deadline.daemon = True
        deadline.start()
        loops.cancel()
    signalled.cancel()
    with suppress(asyncio.CancelledError):
        await loops


async def _run_loops(daemon: Daemon) -> None:
    try:
        await _wait_for_text(daemon)
        async with asyncio.TaskGroup() as group:
            group.create_task(_refresh_loop(daemon))
            if daemon.settings.shadow.share > 0:
                group.create_task(_shadow_loop(daemon))
    except* ValueError as mistakes:
        raise mistakes.exceptions[0] from None
    finally:
        await daemon.process.end()
        daemon.store.close()


async def _wait_for_text(daemon: Daemon) -> None:
    """Returns once there is a record with its prompt. Raises ValueError if there are records, but none with it."""
    wait, logged = 1.0, False
    while True:
        daemon.heartbeats.beat("refresh")
        try:
            await asyncio.to_thread(daemon.store.create)
            records, with_text = await asyncio.to_thread(daemon.store.count_records)
        except StoreError as error:
            wait = await _wait_for_database(daemon, error, wait)
            continue
        if with_text:
            return
        if records:
            raise ValueError(NO_TEXT)
        if not logged:
            log.info("there are no records yet; waiting for the gateways to write some (records.prompts: full)")
            logged = True
        await asyncio.sleep(LABEL_POLL_SECONDS)


async def _wait_for_database(daemon: Daemon, error: StoreError, wait: float) -> float:
    """Waits after a failure of the database; returns how long to wait after the next."""
    log.warning("%s; trying again", error)
    daemon.metrics.errors.labels("records").inc()
    await asyncio.sleep(wait)
    return min(2 * wait, LONGEST_DATABASE_WAIT_SECONDS)


async def _shadow_loop(daemon: Daemon) -> None:
    settings, metrics = daemon.settings, daemon.metrics
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
    ) as session:
        pools = PoolClient(session, settings.pools, metrics, settings.shadow.priority, settings.shadow.timeout_s)
        async with open_judge(settings.judge, session, pools, metrics.count_verdict) as judge:
            shadow = Shadow(
                daemon.store,
                pools,
                judge,
                settings.judge.kind,
                settings.shadow,
                metrics,
                SpendLedger(daemon.out),
                lambda: daemon.heartbeats.beat("shadow"),
            )
            await shadow.run()


async def _refresh_loop(daemon: Daemon) -> None:
    """Counts labels, trains when a refresh is due, and reports the result."""
    _report_current(daemon)
    state, held = read_state(daemon.out), _held(daemon)
    if held is not None:
        log.warning("%s", held.sentence)
    began = time.time()
    wait, retry, not_before = 1.0, FIRST_RETRY_SECONDS, 0.0
    while True:
        daemon.heartbeats.beat("refresh")
        await asyncio.sleep(LABEL_POLL_SECONDS)
        try:
            state, labels = await _labels_due(daemon, state, began)
            wait = 1.0
        except StoreError as error:
            wait = await _wait_for_database(daemon, error, wait)
            continue
        held, before = _held(daemon), held
        if before is not None and held is None:
            log.info("%s is no longer held back: it was accepted, or held.json was removed", before.checkpoint)
            _report_current(daemon)
        if not labels or time.time() < not_before:
            continue
        log.info("training on %d labelled records", labels)
        try:
            result = await _train(daemon)
        except TrainingError as error:
            log.error("%s; trying again in %.0f s", error, retry)
            daemon.metrics.refreshes.labels("failed").inc()
            daemon.metrics.errors.labels("refresh").inc()
            not_before = time.time() + retry
            retry = min(2 * retry, LONGEST_RETRY_SECONDS)
            continue
        retry = FIRST_RETRY_SECONDS
        state = DaemonState(result.seq, time.time())
        _report(daemon, result)
        held = _held(daemon)
        daemon.metrics.show_held(held)
        _save(daemon, state, held)


async def _labels_due(daemon: Daemon, state: DaemonState, began: float) -> tuple[DaemonState, int]:
    """(the state, its seq reset if the database is another one than before; the labels to train on, 0: not yet)."""
    refresh = daemon.settings.refresh
    count, highest = await asyncio.to_thread(daemon.store.count_labels, state.seq)
    if highest < state.seq:
        state = DaemonState(0, state.time)
        count, highest = await asyncio.to_thread(daemon.store.count_labels)
    waited = time.time() - (state.time or began)
    due = count >= refresh.every_labels or (count > 0 and waited >= refresh.every_minutes * 60)
    if due and state.seq:
        count, _ = await asyncio.to_thread(daemon.store.count_labels)
    return state, count if due and count >= refresh.learn.min_labels else 0


async def _train(daemon: Daemon) -> TrainerResult:
    began = time.monotonic()
    task = asyncio.create_task(daemon.process.refresh())
    try:
        while not task.done():
            daemon.heartbeats.beat("refresh")
            await asyncio.wait((task,), timeout=LABEL_POLL_SECONDS)
    finally:
        task.cancel()
    daemon.metrics.refresh_duration.observe(time.monotonic() - began)
    return task.result()


def _save(daemon: Daemon, state: DaemonState, held: HeldPublish | None) -> None:
    """Writes the state and deletes old checkpoints, but not the one that is held back."""
    protected = [daemon.base, *([] if held is None else [daemon.out / held.checkpoint])]
    try:
        write_state(daemon.out, state)
        checkpoint_retention.prune(daemon.out, daemon.settings.refresh.keep, protected)
    except OSError as error:
        log.warning("%s: %s", error.filename or daemon.out, error.strerror)
        daemon.metrics.errors.labels("disk").inc()


def _report(daemon: Daemon, result: TrainerResult) -> None:
    metrics = daemon.metrics
    verdict = "held" if result.held is not None else "refused" if result.published is None else "published"
    metrics.refreshes.labels(verdict).inc()
    metrics.labels_seen.set(result.labels)
    errors = result.figures.get("calibration_error")
    for of, error in errors.items() if isinstance(errors, dict) else ():
        if isinstance(error, int | float):
            metrics.calibration_error.labels(of).set(error)
    if result.standing is not None:
        metrics.advantage.set(result.standing["advantage"])
    for note in result.notes:
        log.info("%s", note)
    if result.held is not None:
        log.warning("%s", result.held)
    elif result.published is None:
        log.info("refused, from %d labelled records: %s", result.labels, "; ".join(result.reasons))
    else:
        change = "the change for live traffic is unknown" if result.change is None else result.change
        log.info("published %s, from %d labelled records: %s", result.published, result.labels, change)
        metrics.last_publish.set(time.time())
        _report_current(daemon)


def _report_current(daemon: Daemon) -> None:
    """Shows the checkpoint that is served, and the one that is held back."""
    metrics = daemon.metrics
    manifest = checkpoint.load_manifest(champion_path(daemon.base, daemon.out))
    metrics.info.clear()
    metrics.info.labels(manifest.version).set(1)
    metrics.show_held(_held(daemon))


def _held(daemon: Daemon) -> HeldPublish | None:
    """The checkpoint that is held back; None, with a line in the log, where held.json can't be read."""
    try:
        return held_publish.read_held(daemon.out)
    except ValueError as error:
        log.warning("%s", error)
        return None
