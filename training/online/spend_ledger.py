"""What shadowing and judging have spent this hour and this UTC day, on disk, so that no restart lifts a cap."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

SPEND_FILE = "spend.json"
HOUR_SECONDS, DAY_SECONDS = 3600, 86_400


@dataclass(frozen=True, slots=True)
class Spent:
    """What one span of time has cost."""

    records: int = 0  # shadowed and judged
    tokens: int = 0  # of the calls to pools, the judge's among them
    cost: float = 0.0  # of these, in the unit of pools.*.cost

    def plus(self, other: Spent) -> Spent:
        return Spent(self.records + other.records, self.tokens + other.tokens, self.cost + other.cost)


@dataclass(slots=True)
class SpendLedger:
    """The spending of the current hour and day. Only one process may have it: the learner's, which locks `out`."""

    out: Path
    clock: Callable[[], float] = time.time  # Unix seconds
    _day: int = 0  # days since 1970, UTC
    _hour: int = 0
    _of_day: Spent = field(default_factory=Spent)
    _of_hour: Spent = field(default_factory=Spent)
    _saved: bool = True

    def __post_init__(self) -> None:
        """Reads the file. Without one, or with one that can't be read, nothing is spent yet."""
        try:
            raw = json.loads((self.out / SPEND_FILE).read_text(encoding="utf-8"))
            self._day, self._hour = int(raw["day"]), int(raw["hour"])
            self._of_day, self._of_hour = _spent_of(raw["of_day"]), _spent_of(raw["of_hour"])
        except (OSError, ValueError, KeyError, TypeError):
            self._day = self._hour = 0
            self._of_day = self._of_hour = Spent()
        self._roll_over()

    @property
    def today(self) -> Spent:
        self._roll_over()
        return self._of_day

    @property
    def this_hour(self) -> Spent:
        self._roll_over()
        return self._of_hour

    def add(self, spent: Spent) -> None:
        if spent == Spent():
            return
        self._roll_over()
        self._of_day, self._of_hour = self._of_day.plus(spent), self._of_hour.plus(spent)
        self._saved = False

    def save(self) -> None:
        """Writes a temporary file, then renames it, if anything was added. Raises OSError."""
        if self._saved:
            return
        self._saved = True
        state = {
            "day": self._day,
            "hour": self._hour,
            "of_day": dataclasses.asdict(self._of_day),
            "of_hour": dataclasses.asdict(self._of_hour),
        }
        temporary = self.out / f".{SPEND_FILE}.tmp"
        try:
            temporary.write_text(json.dumps(state) + "\n", encoding="utf-8")
            os.replace(temporary, self.out / SPEND_FILE)
        except OSError:
            self._saved = False
            raise

    def _roll_over(self) -> None:
        now = self.clock()
        day, hour = int(now // DAY_SECONDS), int(now // HOUR_SECONDS)
        if day != self._day:
            self._day, self._of_day = day, Spent()
        if hour != self._hour:
            self._hour, self._of_hour = hour, Spent()


def _spent_of(raw: dict[str, float]) -> Spent:
    spent = Spent(int(raw["records"]), int(raw["tokens"]), float(raw["cost"]))
    if not math.isfinite(spent.cost):
        raise ValueError("an infinite cost")
    return spent
