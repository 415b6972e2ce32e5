"""A finished request -> Record, written in batches by one thread; and feedback, acknowledged once it is durable.

The event loop only hands over what it holds anyway. Everything that takes time (reading the answer, hashing, the
database) happens in the thread. While the database is away its queue is kept and tried again; when the queue is full,
records are dropped and counted. Serving never waits.
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

from depo_gateway.estimator.records.store import Feedback, Store, StoreError
from depo_gateway.estimator.records.types import Record
from depo_gateway.gateway.config import Records, database_url
from depo_gateway.gateway.metrics import Metrics
from depo_gateway.gateway.request_notes import Answer, Notes, record_of

QUEUE_RECORDS = 10_000
QUEUE_BYTES = 64 << 20  # of bodies and answers that wait, as they came over the wire
BATCH_SECONDS = 0.05
BATCH_RECORDS = 200  # a transaction
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 0.25, 5.0
FEEDBACK_SECONDS = 5.0
FLUSH_SECONDS = 5.0
RETENTION_SECONDS = 3600.0

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Asked:
    """Feedback that waits for its commit."""

    item: Feedback
    loop: asyncio.AbstractEventLoop
    answer: "asyncio.Future[bool]"

    def settle(self, found: bool | StoreError) -> None:
        def tell() -> None:
            if self.answer.done():
                return
            if isinstance(found, StoreError):
                self.answer.set_exception(found)
            else:
                self.answer.set_result(found)

        with contextlib.suppress(RuntimeError):  # the loop closed meanwhile
            self.loop.call_soon_threadsafe(tell)


@dataclass(slots=True, eq=False)
class _Outage:
    """The writer's view of a database that fails, from the first failure to the next success."""

    reason: str = ""
    wait: float = 0.0
    until: float = 0.0


class Recorder:
    """One records section at work: its thread, its queue, its connection.

    Raises:
        ValueError: the database's address or driver can't be; one sentence. A database that is merely away is no error.
    """

    def __init__(self, settings: Records, metrics: Metrics) -> None:
        self.settings = settings
        self.identity = identity(settings)
        self.full = settings.prompts == "full"
        self.store = Store(database_url(settings))
        self._hash_key = self.identity[2].encode() or secrets.token_bytes(32)
        self._metrics = metrics
        self._inbox: queue.SimpleQueue[Notes | _Asked | None] = queue.SimpleQueue()
        # Each of these is written by one side alone, so that neither needs a lock.
        self._came = self._came_bytes = 0
        self._went = self._went_bytes = 0
        self._dropping = False
        self._closing = threading.Event()
        self._give_up = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True, name="records")
        # The thread's own:
        self._records: deque[tuple[Record, int]] = deque()
        self._asked: list[_Asked] = []
        self._outage = _Outage()
        self._created = False
        self._delete_at = 0.0
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Records not yet in the database."""
        return self._came - self._went

    @property
    def trouble(self) -> str:
        """Why the database takes nothing now; "" while it does."""
        return self._outage.reason

    def stream(self) -> Answer:
        """What gathers a stream's answer, as far as this config wants it."""
        return Answer(self.full)

    def add(self, notes: Notes) -> None:
        """Takes a finished request. Never waits: a full queue drops it. For the event loop alone."""
        size = notes.size
        if self.waiting >= QUEUE_RECORDS or self._came_bytes - self._went_bytes + size > QUEUE_BYTES:
            self._metrics.records.labels("dropped").inc()
            if not self._dropping:
                self._dropping = True
                log.error("the queue of records is full: new ones are dropped, and counted, until it moves")
            return
        self._came += 1
        self._came_bytes += size
        self._inbox.put(notes)

    async def feedback(self, item: Feedback) -> bool:
        """Returns once the feedback is durable; False where no answer is known that it is about.

        Raises:
            StoreError: the database is away.
            TimeoutError: it doesn't answer; the feedback may still be written.
        """
        if self._closing.is_set():
            raise StoreError("the records are being closed")
        loop = asyncio.get_running_loop()
        asked = _Asked(item, loop, loop.create_future())
        self._inbox.put(asked)
        async with asyncio.timeout(FEEDBACK_SECONDS):
            return await asked.answer

    def close(self, seconds: float = FLUSH_SECONDS) -> None:
        """Writes what waits, for so long at most, and lets go of the database. Blocks: call it in a thread."""
        self._give_up = time.monotonic() + seconds
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
        while True:  # until all is written, or time is over
            self._gather(0.0)
            self._write()
            left = self._give_up - time.monotonic()
            if not self._records or left <= 0:
                break
            time.sleep(max(0.0, min(left, self._outage.until - time.monotonic())))
        self.store.close()

    def _pause(self) -> float:
        """Seconds until there is something to do even if nothing comes."""
        due = self._outage.until if self._outage.reason else self._delete_at
        return max(0.0, due - time.monotonic())

    def _gather(self, wait: float) -> None:
        """Waits for something to come, then a little longer for what comes with it."""
        try:
            items = [self._inbox.get(timeout=wait) if wait else self._inbox.get_nowait()]
        except queue.Empty:
            return
        self._closing.wait(BATCH_SECONDS)
        with contextlib.suppress(queue.Empty):
            while True:
                items.append(self._inbox.get_nowait())
        for item in items:
            if isinstance(item, _Asked):
                if not item.answer.done():  # else it was told that nothing is stored, and may be sent again otherwise
                    self._asked.append(item)
            elif item is not None:
                self._take(item)
                time.sleep(0)  # lets the event loop have the interpreter, which else waits 5 ms for it

    def _take(self, notes: Notes) -> None:
        size = notes.size
        held = size if self.full else 0
        try:
            self._records.append((record_of(notes, self.settings.prompts, self._hash_key), held))
        except Exception:  # boundary: whatever a client or a backend wrote, the next record is written
            log.exception("no record can be made of request %s", notes.id)
            self._metrics.records.labels("rejected").inc()
            self._went += 1
            held = 0
        self._went_bytes += size - held

    def _write(self) -> None:
        if time.monotonic() >= self._outage.until:
            try:
                self._reach()
                self._append()
                self._acknowledge()
                self._delete()
            except StoreError as error:
                self._failed(str(error))
            else:
                self._recovered()
        for asked in self._asked:
            asked.settle(StoreError(self._outage.reason))
        self._asked = []
        self._metrics.records_waiting.set(self.waiting)

    def _reach(self) -> None:
        if not self._created:
            try:
                self.store.create()
            except ValueError as error:  # of another version: somebody may still put that right
                raise StoreError(str(error)) from None
            self._created = True

    def _acknowledge(self) -> None:
        if self._asked:
            found = self.store.feedback([asked.item for asked in self._asked])
            for asked, known in zip(self._asked, found, strict=True):
                asked.settle(known)
            self._asked = []

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
            for _, held in batch:
                self._records.popleft()
                self._went_bytes += held
            self._went += len(batch)
            self._dropping = False

    def _append_singly(self, records: list[Record]) -> int:
        """How many the database takes; the others are no record of its."""
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
        """Deletes a little of what is too old; the rest in the next rounds, so that no record waits long for it."""
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
        self._created = False  # so that the next try asks the database, even if no record waits
        self._metrics.records_failures.inc()

    def _recovered(self) -> None:
        if self._outage.reason:
            log.warning("records are written again")
            self._outage = _Outage()


def identity(settings: Records) -> tuple[Records, str, str]:
    """What makes two records sections the same: the text, and what its environment variables hold."""
    return settings, database_url(settings), os.environ.get(settings.hash_key_env or "", "")
