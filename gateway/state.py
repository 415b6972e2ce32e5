"""What the gateway holds while it runs, and what it holds of one request."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from depo_gateway.gateway.candidate import Candidate
from depo_gateway.gateway.config import Config, PoolConfig
from depo_gateway.gateway.control import Accounting, Control
from depo_gateway.gateway.conversations import Conversations
from depo_gateway.gateway.metrics import NONE, Metrics
from depo_gateway.gateway.pools import Pool, RetryBudget
from depo_gateway.gateway.protocol import Endpoint
from depo_gateway.gateway.recent_requests import Recent
from depo_gateway.gateway.records import Recorder
from depo_gateway.gateway.request_notes import Notes
from depo_gateway.gateway.scoring import Scorer
from depo_gateway.gateway.upstream import Upstream


@dataclass(frozen=True, slots=True)
class Live:
    """What a request takes hold of when it starts; a reload puts a new one beside it and lets this one finish."""

    config: Config
    pools: Mapping[str, Pool]
    keys: Mapping[str, str]  # digest -> name; empty: open
    names: Mapping[str, str]  # pool name or model id -> pool
    scorer: Scorer


@dataclass(slots=True, eq=False)
class Gateway:
    """Everything that outlives a request."""

    live: Live
    metrics: Metrics
    upstream: Upstream
    budget: RetryBudget
    control: Control
    conversations: Conversations = field(default_factory=Conversations)
    recorder: Recorder | None = None  # None: nothing is recorded
    shares: dict[str, float] = field(default_factory=dict)  # moving shares of free decisions, for `on_overload: share`
    recent: Recent = field(default_factory=lambda: Recent(time.time()))
    active: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    draining: bool = False
    retired: list[Scorer | Candidate] = field(default_factory=list)  # replaced ones whose workers still run

    def retire(self, replaced: Scorer | Candidate) -> None:
        """Keeps what was replaced until its workers have ended, so that a shutdown can wait for them."""
        self.retired = [*(kept for kept in self.retired if kept.alive), replaced]

    def begin(self) -> None:
        self.active += 1
        self.idle.clear()

    def end(self) -> None:
        self.active -= 1
        if not self.active:
            self.idle.set()


@dataclass(slots=True, eq=False)
class Request:
    """One request's bookkeeping, as far as it has come."""

    endpoint: Endpoint
    id: str
    started: float
    accounting: Accounting = field(default_factory=Accounting)
    notes: Notes = field(default_factory=Notes)
    phase: str = "reading"  # reading | scoring | queue | waiting | streaming | done
    complete: float = 0.0  # when its last byte was here
    departed: float = 0.0  # when it first left for a backend
    queued: float = 0.0  # seconds
    pool: str = NONE
    working: str | None = None  # the pool that has answered or is at it; a backend that failed is not
    tokens: int = 0  # of prompt and answer, as the backend counts them; 0: not known
    code: int = 500
    answered: bool = False  # the answer's head has gone to the client
    gone: bool = False  # the client hung up


def served_names(pools: Mapping[str, PoolConfig]) -> dict[str, str]:
    """What a request may call a pool: its name, or its model's id."""
    return {name: name for name in pools} | {pool.model: name for name, pool in pools.items()}
