"""The state of a running gateway, and of one request."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from depo_gateway.estimator.held_publish import HeldPublish
from depo_gateway.estimator.records.types import RoutingSettings
from depo_gateway.gateway.candidate import Candidate
from depo_gateway.gateway.config import Config
from depo_gateway.gateway.control import Accounting, Control
from depo_gateway.gateway.conversations import Conversations
from depo_gateway.gateway.metrics import NONE, Metrics
from depo_gateway.gateway.openai.api import Api
from depo_gateway.gateway.openai.apis import APIS, Apis
from depo_gateway.gateway.pools import Pool, RetryBudget
from depo_gateway.gateway.recent_requests import RecentRequests
from depo_gateway.gateway.records import Recorder
from depo_gateway.gateway.request_notes import RequestNotes
from depo_gateway.gateway.scoring import Scorer
from depo_gateway.gateway.upstream import Upstream


@dataclass(frozen=True, slots=True)
class Live:
    """The config in force and what was opened for it. A request keeps the one it started with, through reloads too."""

    config: Config
    pools: Mapping[str, Pool]
    keys: Mapping[str, str]  # digest -> name; empty: the gateway is open
    names: Mapping[str, str]  # pool name or model id -> pool
    scorer: Scorer
    settings: RoutingSettings  # the part of the config that records name


@dataclass(slots=True, eq=False)
class Gateway:
    """Everything that outlives a request."""

    live: Live
    metrics: Metrics
    upstream: Upstream
    retry_budget: RetryBudget
    control: Control
    conversations: Conversations = field(default_factory=Conversations)
    recorder: Recorder | None = None  # None: nothing is recorded
    shares: dict[str, float] = field(default_factory=dict)  # each pool's moving share, for `on_overload: share`
    apis: Apis = field(default_factory=lambda: APIS)
    held: HeldPublish | None = None  # a checkpoint that the learner holds back for its owner
    recent: RecentRequests = field(default_factory=lambda: RecentRequests(time.time()))
    active: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    draining: bool = False
    retired: list[Scorer | Candidate] = field(default_factory=list)  # replaced ones whose workers still run

    def retire(self, replaced: Scorer | Candidate) -> None:
        """Remembers what was replaced until its workers have ended, so that a shutdown can wait for them."""
        self.retired = [*(item for item in self.retired if item.alive), replaced]

    def begin(self) -> None:
        self.active += 1
        self.idle.clear()

    def end(self) -> None:
        self.active -= 1
        if not self.active:
            self.idle.set()


@dataclass(slots=True, eq=False)
class RequestState:
    """The progress of one request."""

    api: Api
    live: Live
    headers: Mapping[bytes, bytes]
    id: str
    started: float
    accounting: Accounting = field(default_factory=Accounting)
    notes: RequestNotes = field(init=False)
    phase: str = "reading"  # reading | scoring | queue | waiting | streaming | done
    complete: float = 0.0  # when its last byte had come
    departed: float = 0.0  # when it first left for a backend
    queued: float = 0.0  # seconds
    pool: str = NONE
    working: str | None = None  # the pool that has answered or is at work; None after a backend failed
    tokens: int = 0  # of prompt and answer, as the backend counts them; 0: not known
    code: int = 500
    answered: bool = False  # the answer's head has gone to the client
    gone: bool = False  # the client hung up
    unreadable: bool = False  # a reader of the endpoint's answers failed

    def __post_init__(self) -> None:
        self.notes = RequestNotes(self.api, self.id, settings=self.live.settings)
