"""What serving passes to learning. Record: a finished request. Label: the quality of a pool's answer to it.
Example: what an estimator learns from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from depo_gateway.estimator.records.reasons import reason_named

REPEATABLE_ENDPOINTS = ("chat", "completions")  # `Record.endpoint` of the requests that the learner can send again
FEEDBACK = "feedback"  # the source of an application's own labels; a judge's name is the source of others


@dataclass(frozen=True, slots=True)
class ServedPool:
    """One pool of a gateway's settings."""

    model: str  # the backends' name for it
    cost: float  # any unit, per 1,000 tokens


@dataclass(frozen=True, slots=True)
class RoutingSettings:
    """The settings that a gateway served a request with: what its threshold meant, and which model each pool was."""

    rule: str
    threshold: float | None  # routing.threshold; None: there is a target
    target: Mapping[str, float]  # {"large_share": 0.3}: routing.target; {}: there is a threshold
    pools: Mapping[str, ServedPool]  # cheapest first


@dataclass(frozen=True, slots=True)
class Record:
    """A finished request: who sent it, the decision and its reason, how it ended, and what the router knew."""

    id: str  # x-request-id
    time: float  # Unix seconds at its first byte
    key: str = ""  # the API key's name; "": the gateway has no keys
    endpoint: str = "chat"
    conversation: str = ""  # HMAC of the key's name and the first turns; the same for all turns of a conversation
    group: str = ""  # the name of the prompt's task (routing.group); "": unknown
    pool: str = ""  # the one that served; "": none
    reason: str = ""
    confidence: float | None = None  # of the cheapest eligible pool
    threshold: float | None = None
    estimator: str = ""  # the checkpoint's version
    stage: str = ""  # full | cheap | cached; "": not scored
    propensity: float = 1.0  # the probability with which that pool was chosen
    pools: tuple[str, ...] = ()  # the eligible ones, cheapest first
    quality: Mapping[str, float] = field(default_factory=dict)  # predicted, by pool
    status: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    first_token_seconds: float | None = None  # streams only
    total_seconds: float = 0.0
    finish_reason: str = ""
    prompt_hash: str = ""  # HMAC of the text; records.prompts: hash
    # Only under records.prompts: full
    asked: str | Sequence[Mapping[str, Any]] | None = None  # the prompt, or the conversation's messages
    parameters: Mapping[str, Any] = field(default_factory=dict)  # the request's other fields: sampling, tools
    answer: str | None = None  # text of the first choice
    reference: str | None = None  # the right answer, from the client (x-depo-reference)
    settings: RoutingSettings | None = None  # in force; None: an earlier version wrote the record
    seq: int = 0  # the store's own number, rising; 0: not stored yet

    @property
    def free(self) -> bool:
        """Whether scores or chance chose the pool, so that `propensity` may weigh the record."""
        reason = reason_named(self.reason)
        return reason is not None and reason.free and self.propensity > 0


@dataclass(frozen=True, slots=True)
class Label:
    """One source's label of one pool on one record. A later one of the same three replaces it."""

    record: int  # Record.seq
    pool: str
    source: str  # FEEDBACK, or the judge: exact | math | model | webhook | none
    quality: float | None  # in [0, 1]; None: there is only a token confidence
    token_confidence: float | None = None  # in (0, 1]
    time: float = 0.0  # Unix seconds
    seq: int = 0  # the store's own number; a replaced label gets a new one


@dataclass(frozen=True, slots=True)
class Labelled:
    """A record with all its labels."""

    record: Record
    labels: tuple[Label, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with its labels. A pool that is absent, or None, has no label and is masked.

    `quality` is the mean reward of that pool on this prompt, in [0, 1]; `token_confidence` is exp of the mean token
    log-probability of its completions, in (0, 1]; `others` holds the labels of further heads (estimator/heads.py), in
    [0, 1], by head and pool. `group` keeps related prompts on one side of a split ("" = alone).
    """

    prompt: str
    quality: Mapping[str, float | None]
    token_confidence: Mapping[str, float | None] = field(default_factory=dict)
    weight: float = 1.0
    group: str = ""
    context: str = ""  # the conversation before the prompt, as text.prompt_of_messages gives it
    others: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    task: str = ""  # the name of its group as a gateway reads it (routing.group), a feature; "": unknown

    def __post_init__(self) -> None:
        for head in ("quality", "token_confidence", *self.others):
            name, labels = head.replace("_", " "), self.labels(head)
            for pool, value in labels.items():
                if value is not None and not 0.0 <= value <= 1.0:
                    raise ValueError(f"{name} of pool {pool!r} is {value}; it must lie between 0 and 1")
        if not self.weight >= 0.0:
            raise ValueError(f"an example's weight is {self.weight}; it must be 0 or more")

    def labels(self, head: str) -> Mapping[str, float | None]:
        """The labels of one of the estimator's heads, by pool."""
        own = {"quality": self.quality, "token_confidence": self.token_confidence}
        return own[head] if head in own else self.others.get(head, {})
