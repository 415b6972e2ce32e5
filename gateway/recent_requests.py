"""The last decisions and the counts of the last minutes, for the status page. Pure: the time is an argument.

It holds no prompt, answer or key.
"""

from collections import deque
from dataclasses import dataclass, field

from depo_gateway.gateway.routing import Decision

DECISIONS = 50
SLICE_SECONDS = 10
SLICES = 30  # five minutes


@dataclass(frozen=True, slots=True)
class EndedRequest:
    """A request for which a pool was chosen, after its end."""

    time: float  # of its first byte
    id: str
    endpoint: str
    decision: Decision
    answered: bool  # a backend answered
    status: int
    seconds: float


@dataclass(slots=True, eq=False)
class TimeSlice:
    """The counts of SLICE_SECONDS."""

    number: int  # time // SLICE_SECONDS
    decisions: dict[tuple[str, str], int] = field(default_factory=dict)  # by pool and reason
    requests: int = 0
    failed: int = 0  # with a 5xx


class RecentRequests:
    """One gateway's requests since it started. Only the event loop may use it; it costs a request less than 1 us."""

    def __init__(self, started: float) -> None:
        self.started = started
        self._ended: deque[tuple[float, str, str, Decision, bool, int, float]] = deque(
            maxlen=DECISIONS
        )  # EndedRequest's fields
        self._slices: deque[TimeSlice] = deque([TimeSlice(int(started // SLICE_SECONDS))], maxlen=SLICES)
        self._from = self._until = 0.0  # of the newest slice; a clock that is set back begins another one

    def count_decision(self, decision: Decision, now: float) -> None:
        """Counts a decision for which a backend has answered."""
        counts = (self._slices[-1] if self._from <= now < self._until else self._begin(now)).decisions
        name = (decision.pool, decision.reason.value)
        counts[name] = counts.get(name, 0) + 1

    def add(
        self,
        time: float,
        id: str,
        endpoint: str,
        decision: Decision | None,
        answered: bool,
        status: int,
        seconds: float,
    ) -> None:
        """Takes a finished request, however it ended; see EndedRequest. `decision` is None where it got none."""
        now = time + seconds
        last = self._slices[-1] if self._from <= now < self._until else self._begin(now)
        last.requests += 1
        if status >= 500:
            last.failed += 1
        if decision is not None:
            self._ended.append((time, id, endpoint, decision, answered, status, seconds))

    def decisions(self) -> list[EndedRequest]:
        """The last DECISIONS requests with a decision, newest first."""
        return [EndedRequest(*fields) for fields in reversed(self._ended)]

    def slices(self, now: float) -> list[TimeSlice]:
        """The last SLICES, oldest first and without gaps. The newest is not over yet."""
        newest = int(now // SLICE_SECONDS)
        oldest = min(newest, max(newest - SLICES + 1, int(self.started // SLICE_SECONDS)))
        found = {number: TimeSlice(number) for number in range(oldest, newest + 1)}
        found |= {item.number: item for item in self._slices if oldest <= item.number <= newest}
        return list(found.values())

    def _begin(self, now: float) -> TimeSlice:
        number = int(now // SLICE_SECONDS)
        self._from, self._until = number * SLICE_SECONDS, (number + 1) * SLICE_SECONDS
        if self._slices[-1].number != number:
            self._slices.append(TimeSlice(number))
        return self._slices[-1]
