"""What happened of late, for people to look at: the last decisions, and the last minutes' counts. Pure: time comes in.

No prompt, answer or key gets here.
"""

from collections import deque
from dataclasses import dataclass, field

from depo_gateway.gateway.routing import Decision

KEPT = 50  # decisions
SLICE_SECONDS = 10
SLICES = 30  # five minutes


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that was decided about, when it was over."""

    time: float  # when it came
    id: str
    endpoint: str
    decision: Decision
    answered: bool  # by a backend
    status: int
    seconds: float


@dataclass(slots=True, eq=False)
class Slice:
    """What SLICE_SECONDS came to."""

    number: int  # time // SLICE_SECONDS
    decisions: dict[tuple[str, str], int] = field(default_factory=dict)  # by pool and reason
    requests: int = 0
    failed: int = 0  # with a 5xx


class Recent:
    """One gateway's, since it started; the event loop's own. What a request is made to wait for here is below 1 us."""

    def __init__(self, started: float) -> None:
        self.started = started
        self._ended: deque[tuple[float, str, str, Decision, bool, int, float]] = deque(maxlen=KEPT)  # Ended's fields
        self._slices: deque[Slice] = deque([Slice(int(started // SLICE_SECONDS))], maxlen=SLICES)
        self._from = self._until = 0.0  # of the newest slice; a clock that is set back begins another one

    def decided(self, decision: Decision, now: float) -> None:
        """A decision that a backend has answered."""
        counts = (self._slices[-1] if self._from <= now < self._until else self._begin(now)).decisions
        name = (decision.pool, decision.reason)
        counts[name] = counts.get(name, 0) + 1

    def over(
        self,
        time: float,
        id: str,
        endpoint: str,
        decision: Decision | None,
        answered: bool,
        status: int,
        seconds: float,
    ) -> None:
        """A request's end, whatever became of it; see Ended."""
        now = time + seconds
        last = self._slices[-1] if self._from <= now < self._until else self._begin(now)
        last.requests += 1
        if status >= 500:
            last.failed += 1
        if decision is not None:
            self._ended.append((time, id, endpoint, decision, answered, status, seconds))

    def decisions(self) -> list[Ended]:
        """The last ones, newest first."""
        return [Ended(*fields) for fields in reversed(self._ended)]

    def slices(self, now: float) -> list[Slice]:
        """The last SLICES, oldest first and without gaps. The newest is not over yet, and there whatever the clock."""
        newest = int(now // SLICE_SECONDS)
        oldest = min(newest, max(newest - SLICES + 1, int(self.started // SLICE_SECONDS)))
        found = {number: Slice(number) for number in range(oldest, newest + 1)}
        found |= {item.number: item for item in self._slices if oldest <= item.number <= newest}
        return list(found.values())

    def _begin(self, now: float) -> Slice:
        number = int(now // SLICE_SECONDS)
        self._from, self._until = number * SLICE_SECONDS, (number + 1) * SLICE_SECONDS
        if self._slices[-1].number != number:
            self._slices.append(Slice(number))
        return self._slices[-1]
