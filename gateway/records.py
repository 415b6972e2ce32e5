"""Writes records of finished requests in batches from one thread, and feedback, acknowledged once it is durable.

The event loop only hands over references. Everything that takes time (reading the answer, hashing, the database)
happens in the thread. While the database is not available the queue waits and the thread retries; when the queue is
full, records are dropped and counted. Serving never waits.
"""

import asyncio
import contextlib
import logging
import os
import queue
import secrets
import threading
import time
from collections import deque
from dataclasses import dataclass

from depo_gateway.estimator.configuration.shared import database_url
from depo_gateway.estimator.records.store import Feedback, Store, StoreError
from depo_gateway.estimator.records.types import Record
from depo_gateway.gateway.config import Records
from depo_gateway.gateway.metrics import Metrics
from depo_gateway.gateway.request_notes import RequestNotes, StreamCopy, record_of

QUEUE_RECORDS = 10_000
QUEUE_BYTES = 64 << 20  # of queued bodies and answers, as they came over the wire
BATCH_SECONDS = 0.05
BATCH_RECORDS = 200  # a transaction
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 0.25, 5.0
FEEDBACK_SECONDS = 5.0
FLUSH_SECONDS = 5.0
RETENTION_SECONDS = 3600.0

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _PendingFeedback:
    """Feedback that waits for its commit."""

    item: Feedback
    loop: asyncio.AbstractEventLoop
    stored: "asyncio.Future[bool]"  # False: no such answer is on record

    def settle(self, found: bool | StoreError) -> None:
        def set_result() -> None:
            if self.stored.done():
                return
            if isinstance(found, StoreError):
                self.stored.set_exception(found)
            else:
                self.stored.set_result(found)

        with contextlib.suppress(RuntimeError):  # the loop closed meanwhile
            self.loop.call_soon_threadsafe(set_result)


@dataclass(slots=True, eq=False)
class _Outage:
    """A database's failure, from the first failed write to the next successful one."""

    reason: str = ""
    wait: float = 0.0
    until: float = 0.0


class Recorder:
    """The writer of one `records` section: its thread, its queue, its connection.

    Raises:
        ValueError: one sentence, the database's address can't be used or its driver is missing. A database that is
            merely not available is no error.
    """

    def __init__(self, settings: Records, metrics: Metrics) -> None:
        self.settings = settings
        self.identity = identity(settings)
        self.full = settings.prompts == "full"
        self.store = Store(database_url(settings))
        self._hash_key = self.identity[2].encode() or secrets.token_bytes(32)
        self._metrics = metrics
        self._inbox: queue.SimpleQueue[RequestNotes | _PendingFeedback | None] = queue.SimpleQueue()
        # The event loop writes the first pair, the thread the second, so that neither needs a lock.
        self._queued = self._queued_bytes = 0
        self._finished = self._finished_bytes = 0
        self._dropping = False
        self._closing = threading.Event()
        self._flush_until = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True, name="records")
        # The thread's own:
        self._records: deque[tuple[Record, int]] = deque()
        self._feedback: list[_PendingFeedback] = []
        self._outage = _Outage()
        self._created = False
        self._delete_at = 0.0
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Records not yet in the database."""
        return self._queued - self._finished

    @property
    def trouble(self) -> str:
        """Why the database can't be written now; "" while it can."""
        return self._outage.reason

    def stream_copy(self) -> StreamCopy:
        """An empty copy for a stream, whole where this config records text."""
        return StreamCopy(self.full)

    def add(self, notes: RequestNotes) -> None:
        """Queues a finished request. Never waits: a full queue drops it. Only the event loop may call it."""
        size = notes.size
        if self.waiting >= QUEUE_RECORDS or self._queued_bytes - self._finished_bytes + size > QUEUE_BYTES:
            self._metrics.records.labels("dropped").inc()
            if not self._dropping:
                self._dropping = True
                log.error("the queue of records is full: new records are dropped and counted until there is room")
            return
        self._queued += 1
        self._queued_bytes += size
        self._inbox.put(notes)

    async def feedback(self, item: Feedback) -> bool:
        """Returns once the feedback is durable; False where no answer to that request is on record.

        Raises:
            StoreError: the database is not available.
            TimeoutError: it does not answer; the feedback may still be written.
        """
        if self._closing.is_set():
            raise StoreError("the records are being closed")
        loop = asyncio.get_running_loop()
        pending = _PendingFeedback(item, loop, loop.create_future())
        self._inbox.put(pending)
        async with asyncio.timeout(FEEDBACK_SECONDS):
            return await pending.stored

    def close(self, seconds: float = FLUSH_SECONDS) -> None:
        """Writes what is queued, for `seconds` at most, and closes the database. Blocks: call it in a thread."""
        self._flush_until = time.monotonic() + seconds
        self._closing.set()
        self._inbox.put(None)
        self._thread.join(seconds + 1.0)
        if self.waiting:
            self._metrics.records.labels("dropped").inc(self.waiting)
            log.error("%d records are lost: %s", self.waiting, self.trouble or "the database is too slow")

    def _run(self) -> None:
        while not self._closing.is_set():
            self._gather(self._pause())
            self._write()
        self._outage.until = 0.0
        while True:  # until all is written or the time is over
            self._gather(0.0)
            self._write()
            left = self._flush_until - time.monotonic()
            if not self._records or left <= 0:
                break
            time.sleep(max(0.0, min(left, self._outage.until - time.monotonic())))
        self.store.close()

    def _pause(self) -> float:
        """Seconds until a retry or a deletion is due."""
        due = self._outage.until if self._outage.reason else self._delete_at
        return max(0.0, due - time.monotonic())

    def _gather(self, wait: float) -> None:
        """Waits for an item, then a little longer for others, so that one transaction writes them all."""
        try:
            items = [self._inbox.get(timeout=wait) if wait else self._inbox.get_nowait()]
        except queue.Empty:
            return
        self._closing.wait(BATCH_SECONDS)
        with contextlib.suppress(queue.Empty):
            while True:
                items.append(self._inbox.get_nowait())
        for item in items:
            if isinstance(item, _PendingFeedback):
                if not item.stored.done():  # else its sender got 503 and may send something else instead
                    self._feedback.append(item)
            elif item is not None:
                self._take(item)
                time.sleep(0)  # yields the interpreter to the event loop, which would otherwise wait 5 ms for it

    def _take(self, notes: RequestNotes) -> None:
        size = notes.size
        retained = size if self.full else 0  # the record refers to the text until it is written
        try:
            self._records.append((record_of(notes, self.settings.prompts, self._hash_key), retained))
        except Exception:  # boundary: whatever a client or a backend sent, the next record is written
            log.exception("no record can be made of request %s", notes.id)
            self._metrics.records.labels("rejected").inc()
            self._finished += 1
            retained = 0
        self._finished_bytes += size - retained

    def _write(self) -> None:
        if time.monotonic() >= self._outage.until:
            try:
                self._ensure_schema()
                self._append()
                self._acknowledge()
                self._delete()
            except StoreError as error:
                self._failed(str(error))
            else:
                self._recovered()
        for pending in self._feedback:
            pending.settle(StoreError(self._outage.reason))
        self._feedback = []
        self._metrics.records_waiting.set(self.waiting)

    def _ensure_schema(self) -> None:
        if not self._created:
            try:
                self.store.create()
            except ValueError as error:  # another version's schema, which an operator may still migrate
                raise StoreError(str(error)) from None
            self._created = True

    def _acknowledge(self) -> None:
        if self._feedback:
            found = self.store.feedback([pending.item for pending in self._feedback])
            for pending, known in zip(self._feedback, found, strict=True):
                pending.settle(known)
            self._feedback = []

    def _append(self) -> None:
        while self._records:
            batch = [self._records[index] for index in range(min(BATCH_RECORDS, len(self._records)))]
            records = [record for record, _ in batch]
            try:
                self.store.append(records)
            except StoreError as error:
                if not error.rejected:
                    raise
                written = self._append_singly(records)
            else:
                written = len(batch)
            self._metrics.records.labels("written").inc(written)
            for _, retained in batch:
                self._records.popleft()
                self._finished_bytes += retained
            self._finished += len(batch)
            self._dropping = False

    def _append_singly(self, records: list[Record]) -> int:
        """Writes one record at a time, because the database rejects one of them; returns how many it accepted."""
        written = 0
        for record in records:
            try:
                self.store.append([record])
                written += 1
            except StoreError as error:
                if not error.rejected:
                    raise
                self._metrics.records.labels("rejected").inc()
                log.error("the record of request %s is not written: %s", record.id, error)
        return written

    def _delete(self) -> None:
        """Deletes a batch of expired records; the next rounds delete the rest, so that no new record waits long."""
        if time.monotonic() < self._delete_at or self._closing.is_set():
            return
        deleted = self.store.delete_before(time.time() - self.settings.retention_days * 86_400, BATCH_RECORDS)
        self._delete_at = time.monotonic() + (BATCH_SECONDS if deleted else RETENTION_SECONDS)

    def _failed(self, reason: str) -> None:
        outage = self._outage
        if not outage.reason:
            log.error("no records are written, up to %d wait: %s", QUEUE_RECORDS, reason)
        outage.wait = min(LAST_RETRY_SECONDS, 2 * outage.wait) or FIRST_RETRY_SECONDS
        outage.reason, outage.until = reason, time.monotonic() + outage.wait
        self._created = False  # so that the next try reaches the database even if no record is queued
        self._metrics.records_failures.inc()

    def _recovered(self) -> None:
        if self._outage.reason:
            log.warning("records are written again")
            self._outage = _Outage()


def identity(settings: Records) -> tuple[Records, str, str]:
    """Two records sections with the same identity need no new recorder: their text, and their environment variables."""
    return settings, database_url(settings), os.environ.get(settings.hash_key_env or "", "")
