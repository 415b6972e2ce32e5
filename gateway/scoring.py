"""Prompts -> scores, off the event loop, with a deadline.

Worker threads run the encoder (ONNX Runtime releases the interpreter's lock): as many as the CPU limit leaves beside
the event loop, each pinned to its own core if there is no limit. The event loop waits for them at most until the
deadline. After it, or immediately if the queue is longer than the deadline, the cheap stage answers: a few sparse dot
products on the event loop itself. A checkpoint without the wide part has no cheap stage; routing.on_overload decides.
"""

import asyncio
import hashlib
import logging
import math
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from depo_gateway.estimator import checkpoint
from depo_gateway.estimator.runtime import ONNX_ERRORS, Runtime, Scores
from depo_gateway.estimator.text import Prepared, extract_text
from depo_gateway.gateway.metrics import Metrics

CACHE_ENTRIES = 16_384
CGROUP = Path("/sys/fs/cgroup")
BATCH = 8
JOIN_SECONDS = 30.0  # for the running batch: eight of the longest prompts on a busy machine
SMOOTHING = 0.05  # of the moving mean of seconds per prompt, which gives the queue's length in seconds
Stage = Literal["full", "cheap", "cached"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Scored:
    """Predicted quality of the config's pools, in [0, 1], and which stage of which checkpoint predicted it."""

    quality: dict[str, float]
    stage: Stage
    version: str
    unfamiliar: bool = False  # the prompt is unlike those of the checkpoint's fit; the cheap stage can't tell


@dataclass(slots=True, eq=False)
class _Job:
    prepared: Prepared
    answer: "asyncio.Future[Scores]"


class Scorer:
    """One loaded checkpoint, its workers and its cache. A new checkpoint gets a new object."""

    def __init__(
        self,
        runtime: Runtime,
        columns: Mapping[str, int],
        deadline_s: float,
        metrics: Metrics,
        workers: int | None = None,
    ) -> None:
        self.runtime, self.version = runtime, runtime.version
        self.deadline_s = deadline_s
        self._columns = columns
        self._metrics = metrics
        self._cache: OrderedDict[bytes, Scores] = OrderedDict()
        self._running: dict[bytes, asyncio.Future[Scores]] = {}
        self._jobs: deque[_Job] = deque()
        self._wake = threading.Condition()
        self._stopped = False
        self._loop = asyncio.get_running_loop()
        cores = sorted(os.sched_getaffinity(0))
        granted = cores_granted(len(cores), CGROUP)
        count = workers or max(1, granted - 1)
        pinned = granted == len(cores)  # otherwise others share the cores, and the kernel knows which are free
        self._seconds_per_prompt = 0.0  # unknown until the first batch
        self._threads = [
            threading.Thread(
                target=self._work,
                args=(cores[-1 - index % len(cores)] if pinned else None,),
                daemon=True,
                name=f"scorer-{index}",
            )
            for index in range(count)
        ]
        for thread in self._threads:
            thread.start()

    async def score(self, prompt: str | Sequence[Mapping[str, object]], group: str = "") -> Scored | None:
        """Scores of a prompt, or of a conversation's messages, read as the checkpoint's manifest says.

        `group` is the name of the prompt's task, "" if unknown: the same prompt may score differently in another one.
        Takes at most the deadline plus the cheap stage. None if the cheap stage fails as well, or does not exist.
        """
        started = time.perf_counter()
        try:
            text, context = extract_text(self.runtime.manifest.text, prompt)
            group = group if group in self.runtime.groups else ""  # else one prompt would fill the cache once a group
            whole = f"{len(text)}\0{len(context)}\0{text}{context}{group}"
            name = hashlib.blake2b(whole.encode(), digest_size=16).digest()
            known = self._cache.get(name)
            if known is not None:
                self._metrics.estimator_outcomes.labels("cached").inc()
                return self._scored(known, "cached")
            prepared = self.runtime.prepare(text, context, group)
        except Exception:  # boundary: template or tokenizer may fail on a prompt; the request is served
            log.exception("preparing a prompt failed")
            self._metrics.estimator_outcomes.labels("error").inc()
            return None
        if prepared.truncated:
            self._metrics.estimator_truncated.inc()
        left = self.deadline_s - (time.perf_counter() - started)
        if left <= 0:
            return self._cheap(prepared, "deadline")
        running = self._running.get(name)
        if running is None and len(self._running) * self._seconds_per_prompt > self.deadline_s:
            return self._cheap(prepared, "queue")
        if running is None:
            running = self._submit(name, prepared)
        try:
            done, _ = await asyncio.wait((running,), timeout=left)
            if not done:
                return self._cheap(prepared, "deadline")
            scores = _checked(running.result())
        except Exception:  # boundary: a failing encoder leaves the cheap stage
            log.exception("the encoder failed")
            return self._cheap(prepared, "error")
        self._metrics.estimator_duration.labels("full").observe(time.perf_counter() - started)
        self._metrics.estimator_outcomes.labels("full").inc()
        return self._scored(scores, "full")

    def close(self) -> None:
        """Lets the workers end after their current batch."""
        with self._wake:
            self._stopped = True
            self._wake.notify_all()

    @property
    def alive(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def join(self) -> None:
        """Waits for the workers: an interpreter that exits while one is inside ONNX Runtime aborts the process."""
        for thread in self._threads:
            thread.join(JOIN_SECONDS)

    def _submit(self, name: bytes, prepared: Prepared) -> "asyncio.Future[Scores]":
        answer: asyncio.Future[Scores] = self._loop.create_future()
        self._running[name] = answer
        answer.add_done_callback(lambda done: self._finish(name, done))
        with self._wake:
            self._jobs.append(_Job(prepared, answer))
            self._wake.notify()
        return answer

    def _finish(self, name: bytes, answer: "asyncio.Future[Scores]") -> None:
        """Caches the scores, even if they came too late for their request: the same prompt may come again."""
        del self._running[name]
        if answer.cancelled() or answer.exception() is not None or not answer.result().finite:
            return
        self._cache[name] = answer.result()
        while len(self._cache) > CACHE_ENTRIES:
            self._cache.popitem(last=False)

    def _cheap(self, prepared: Prepared, outcome: str) -> Scored | None:
        if not self.runtime.has_cheap:  # on_overload decides
            self._metrics.estimator_outcomes.labels(outcome).inc()
            return None
        started = time.perf_counter()
        try:
            scores = _checked(self.runtime.cheap([prepared])[0])
        except Exception:  # boundary: on_overload decides
            log.exception("the cheap stage failed")
            self._metrics.estimator_outcomes.labels("error").inc()
            return None
        self._metrics.estimator_duration.labels("cheap").observe(time.perf_counter() - started)
        self._metrics.estimator_outcomes.labels(outcome).inc()
        return self._scored(scores, "cheap")

    def _scored(self, scores: Scores, stage: Stage) -> Scored:
        quality = {pool: scores.quality[column] for pool, column in self._columns.items()}
        return Scored(quality, stage, self.version, scores.unfamiliar)

    def _work(self, core: int | None) -> None:
        if core is not None:
            os.sched_setaffinity(0, {core})  # of this thread alone
        while True:
            with self._wake:
                while not self._jobs and not self._stopped:
                    self._wake.wait()
                if self._stopped:
                    return
                batch = [self._jobs.popleft() for _ in range(min(BATCH, len(self._jobs)))]
            started = time.perf_counter()
            try:
                results = self.runtime.score([job.prepared for job in batch])
            except Exception as error:  # noqa: BLE001  boundary: the waiting requests get the cheap stage
                self._deliver([(job, error) for job in batch])
                continue
            each = (time.perf_counter() - started) / len(batch) / len(self._threads)
            before = self._seconds_per_prompt or each
            self._seconds_per_prompt = before + SMOOTHING * (each - before)
            self._deliver(list(zip(batch, results, strict=True)))

    def _deliver(self, answers: list[tuple[_Job, Scores | Exception]]) -> None:
        def settle() -> None:
            for job, answer in answers:
                if isinstance(answer, Exception):
                    job.answer.set_exception(answer)
                else:
                    job.answer.set_result(answer)

        try:
            self._loop.call_soon_threadsafe(settle)
        except RuntimeError:  # the loop closed while this batch ran
            return


def cores_granted(cores: int, cgroup: Path) -> int:
    """How many of `cores` cores the container's CPU limit grants, rounded up; at least 1.

    `cgroup`: the mount point of control groups, version 2 or 1 (the kernel's Documentation/admin-guide).
    """
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = (
                (cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")
            )
        except OSError:
            return cores
    if not quota.isdecimal() or not period.isdecimal():  # "max" and -1: no limit
        return cores
    return max(1, min(cores, math.ceil(int(quota) / int(period))))


def load_runtime(path: str, pools: tuple[str, ...], rule: str) -> tuple[Runtime, dict[str, int]]:
    """The checkpoint that a config names, verified and warmed up, and which of its scores belongs to which pool.

    Takes about a second: call it in a thread.

    Raises:
        ValueError: one sentence: what is wrong with the checkpoint, or why it doesn't fit the config.
    """
    runtime = Runtime.load(checkpoint.resolve(path))
    columns = _columns(runtime, pools, by_order=path == "builtin")
    if rule == "gain" and len(runtime.pools) < 2:
        raise ValueError(
            f"the estimator {runtime.version} scores one pool ({runtime.pools[0]}) and can't route by gain; "
            "set routing.rule: difficulty, or fit one with depo-train fit --pools"
        )
    turn = {"role": "user", "content": "What is 2 + 2?"}  # the first runs allocate memory; do it before a request comes
    prepared = runtime.prepare(*extract_text(runtime.manifest.text, [turn]))
    try:
        if runtime.has_cheap:
            _checked(runtime.cheap([prepared])[0])
        _checked(runtime.score([prepared])[0])
    except (FloatingPointError, *ONNX_ERRORS) as error:
        raise ValueError(f"checkpoint {path} can't be used: {' '.join(str(error).split())}") from None
    return runtime, columns


def _checked(scores: Scores) -> Scores:
    """The same scores. Raises FloatingPointError for NaN: routing would take it for full confidence."""
    if not scores.finite:
        raise FloatingPointError("the estimator's scores are NaN or infinite")
    return scores


def usual_shares(runtime: Runtime, pools: tuple[str, ...], rule: str, threshold: float) -> dict[str, float]:
    """Each pool's share of the prompts that the checkpoint was calibrated with; {} if its curve can't tell.

    A policy's checkpoint knows the share that stays in the cheapest pool; the rest counts for the most expensive one.
    """
    fits = len(pools) > 1 if len(runtime.pools) == 1 else len(runtime.pools) == len(pools) == 2
    if not fits or rule not in runtime.calibration.curves:
        return {}
    large = runtime.calibration.large_share(rule, threshold)
    return dict.fromkeys(pools, 0.0) | {pools[0]: 1.0 - large, pools[-1]: large}


def _columns(runtime: Runtime, pools: tuple[str, ...], by_order: bool) -> dict[str, int]:
    """Columns by pool name; the shipped checkpoint's by order; a policy's single score is the cheapest pool's."""
    known = runtime.pools
    if len(known) == 1:
        return {pools[0]: 0}
    if set(known) >= set(pools):
        return {pool: known.index(pool) for pool in pools}
    if by_order and len(known) == len(pools):
        return {pool: index for index, pool in enumerate(pools)}
    raise ValueError(
        f"the estimator {runtime.version} scores the pools {', '.join(known)}, the config has {', '.join(pools)}; "
        "fit one for these pools with depo-train fit --pools"
    )


def has_changed(path: str, version: str) -> bool:
    """Whether `path` (a checkpoint, or a directory with `current`) holds another version than `version`.

    Raises:
        ValueError: it holds no readable checkpoint.
    """
    return checkpoint.load_manifest(checkpoint.resolve(path)).version != version
