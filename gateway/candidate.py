"""A second estimator that scores live traffic without deciding: metrics count what it would have decided.

It has one thread of low priority and a short queue. A prompt that finds the queue full is skipped and counted, so no
request waits for it, and no failure here reaches one.
"""

import logging
import os
import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from depo_gateway.estimator.runtime import Runtime
from depo_gateway.estimator.text import extract_text
from depo_gateway.gateway import routing
from depo_gateway.gateway.config import Rule
from depo_gateway.gateway.metrics import Metrics
from depo_gateway.gateway.routing import Eligible
from depo_gateway.gateway.scoring import JOIN_SECONDS

QUEUE = 64
NICE = 10

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Offer:
    """One prompt and where it was routed."""

    prompt: str | Sequence[Mapping[str, object]]
    candidates: Eligible
    threshold: float
    pool: str | None  # chosen by the live scores; None: they did not decide
    group: str = ""  # the name of the prompt's task


class Candidate:
    """One loaded checkpoint beside the one in service."""

    def __init__(
        self, runtime: Runtime, columns: Mapping[str, int], rule: Rule, threshold: float | None, metrics: Metrics
    ) -> None:
        """`threshold`: by its own calibration; None: each request's."""
        self.version = runtime.version
        self._runtime, self._columns, self._rule = runtime, columns, rule
        self._threshold = threshold
        self._metrics = metrics
        self._offers: queue.Queue[Offer | None] = queue.Queue(QUEUE)
        self._stopped = False
        self._thread = threading.Thread(target=self._work, daemon=True, name="candidate")
        self._thread.start()

    def offer(self, offer: Offer) -> None:
        """Queues a prompt, or skips it if the queue is full. Never blocks."""
        try:
            self._offers.put_nowait(offer)
        except queue.Full:
            self._metrics.candidate_outcomes.labels("busy").inc()

    def close(self) -> None:
        """Lets the thread end after its current prompt."""
        self._stopped = True
        try:
            self._offers.put_nowait(None)
        except queue.Full:
            return  # the thread is awake and sees _stopped

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def join(self) -> None:
        """Waits for the thread: an interpreter that exits while one is inside ONNX Runtime aborts the process."""
        self._thread.join(JOIN_SECONDS)

    def _work(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)  # of this thread alone
        while True:
            offer = self._offers.get()
            if offer is None or self._stopped:
                return
            try:
                pool = self._decide(offer)
            except Exception:  # boundary: a candidate's failure never reaches a request
                log.exception("the candidate %s failed", self.version)
                self._metrics.candidate_outcomes.labels("error").inc()
                continue
            self._metrics.candidate_outcomes.labels("unfamiliar" if pool is None else "scored").inc()
            if pool is None:
                continue
            self._metrics.candidate_decisions.labels(pool).inc()
            if offer.pool is not None:
                self._metrics.candidate_agreement.labels("yes" if pool == offer.pool else "no").inc()

    def _decide(self, offer: Offer) -> str | None:
        """The pool that it would choose; None for a prompt unfamiliar to it, where its scores would not decide."""
        text, context = extract_text(self._runtime.manifest.text, offer.prompt)
        prepared = self._runtime.prepare(text, context, offer.group)
        scores = self._runtime.score([prepared])[0]
        if not scores.finite:
            raise FloatingPointError("the candidate's scores are NaN or infinite")
        if scores.unfamiliar:
            return None
        quality = {name: scores.quality[column] for name, column in self._columns.items()}
        confidence = routing.confidences(quality, self._rule, offer.candidates)
        threshold = offer.threshold if self._threshold is None else self._threshold
        decision = routing.by_threshold(confidence, offer.candidates, threshold, self.version)
        if decision.confidence is not None:
            self._metrics.candidate_confidence.observe(decision.confidence)
        return decision.pool
