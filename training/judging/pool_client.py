"""Client that asks pools by name: at low priority, with token log-probabilities, and counting each call's cost.

vLLM serves requests with a lower `priority` first, but only when started with `--scheduling-policy priority`. Without
that flag, releases with the old engine answer 400, "Priority scheduling is not enabled", and newer ones ignore the
field (https://github.com/vllm-project/vllm/issues/22997). A field that a server refuses is not sent to it again.
"""

import itertools
import json
import logging
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp

from depo_gateway.estimator.configuration.shared import BackendConfig, PoolBackends
from depo_gateway.training.judging.openai_client import (
    BUSY,
    AttemptError,
    NoAnswerError,
    base_url,
    error_text,
    mean,
    post_json,
    retry,
    token_confidence,
)
from depo_gateway.training.judging.order_effects import Grades

POOL_TRIES = 3
QUEUE_LENGTH_SECONDS = 2.0  # for so long a backend's queue length is not read again
LEAST_CONFIDENCE = 1e-9  # a token confidence is above 0
CHARS_PER_TOKEN = 4  # of English, where a server does not count tokens
MISCONFIGURED = frozenset({401, 403, 404})  # a wrong key, address or model: every call would fail alike
OPTIONAL = {
    "priority": "priority",
    "logprob": "logprobs",
}  # text in a refusal -> the field of ours that is dropped then
# Request fields that concern the form of the client's own response, or its place in the queue
LEFT_OUT = {
    *("model", "messages", "prompt", "stream", "stream_options", "n", "best_of", "echo", "logprobs", "top_logprobs"),
    *("prompt_logprobs", "use_beam_search", "priority", "request_id", "user", "store", "metadata", "service_tier"),
    *("cache_salt", "kv_transfer_params", "return_token_ids", "max_tokens", "max_completion_tokens"),
}
_WAITING = re.compile(r"^vllm:num_requests_waiting(?:\{[^}]*\})?\s+([0-9.eE+-]+)", re.MULTILINE)
log = logging.getLogger(__name__)

Query = str | Sequence[Mapping[str, Any]]  # a completion's prompt, or a chat's messages (REPEATABLE_ENDPOINTS)


class CallMetrics(Protocol):
    """Where calls are counted."""

    def count_call(self, pool: str, outcome: str) -> None: ...  # ok | refused | failed

    def add_cost(self, cost: float) -> None: ...

    def report_refused_priority(self, pool: str) -> None: ...

    def count_comparison(self, straight: Grades, swapped: Grades) -> None: ...  # a judge's, in both orders


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer of a pool."""

    text: str  # of the first choice; its tool calls follow as JSON lines
    token_confidence: float | None
    cut: bool  # ended by our max_tokens, where the client's own limit allowed more


class PoolClient:
    """Asks pools by name.

    Args:
        session: without its own time limit.
        priority: vLLM's; None: the servers' default.
        timeout_s: seconds for one call.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        pools: Mapping[str, PoolBackends],
        metrics: CallMetrics,
        priority: int | None,
        timeout_s: float,
    ) -> None:
        self.pools = pools
        self.spent_tokens = 0  # since this object was made
        self.spent = 0.0  # since this object was made, in the unit of pools.*.cost
        self.metrics = metrics
        self._session, self._priority = session, priority
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(5.0, timeout_s))
        self._turn = itertools.count()
        self._refused: set[tuple[str, str]] = set()  # (url, field)
        self._waiting: dict[str, tuple[float, float]] = {}  # url -> (when it was read, queue length)

    async def ask(self, pool: str, query: Query, parameters: Mapping[str, Any], max_tokens: int) -> Reply | None:
        """One answer; None where the pool refuses this request. NoAnswerError when it does not answer at all."""
        config = self.pools[pool]
        path = "/v1/completions" if isinstance(query, str) else "/v1/chat/completions"
        body = pool_request(query, parameters, config.model, self._priority, max_tokens)
        backend = config.backends[0]

        async def attempt() -> Reply | None:
            nonlocal backend
            backend = config.backends[next(self._turn) % len(config.backends)]
            status, answer = await self._post(pool, backend, path, body)
            if status == 200:
                self._count(config, query, answer)
                try:
                    return reply_of(answer, parameters, max_tokens)
                except (AttributeError, KeyError, TypeError, ValueError):
                    raise AttemptError("does not answer with an OpenAI completion") from None
            if status in BUSY | MISCONFIGURED:
                raise AttemptError(f"answers {status} {error_text(answer)}")
            return None

        try:
            reply = await retry(attempt, POOL_TRIES)
        except NoAnswerError as error:
            self.metrics.count_call(pool, "failed")
            raise NoAnswerError(f"pool {pool}: {backend.url} {error}") from None
        self.metrics.count_call(pool, "refused" if reply is None else "ok")
        return reply

    async def waiting(self, pool: str) -> float:
        """Length of the longest request queue among the pool's backends; 0 where a server does not report it."""
        return max([await self._waiting_at(backend) for backend in self.pools[pool].backends])

    async def _post(
        self, pool: str, backend: BackendConfig, path: str, body: Mapping[str, Any]
    ) -> tuple[int, dict[str, Any]]:
        """Status and JSON. Drops an optional field that the server refuses, for good if that helps."""
        url = base_url(backend.url) + path
        sent = {name: value for name, value in body.items() if (url, _field(name)) not in self._refused}
        dropped: list[str] = []
        while True:
            reply = await post_json(self._session, url, sent, _headers(backend), self._timeout)
            answer = reply.json_or_text()
            if reply.status == 200:
                if not isinstance(answer, dict) or not answer.get("choices"):
                    raise ValueError("an answer without choices")
                for field in dropped:
                    self._remember_refusal(pool, url, field)
                return reply.status, answer
            message = error_text(answer).lower()
            refused = [field for text, field in OPTIONAL.items() if text in message and field in sent]
            if reply.status not in (400, 422) or not refused:
                return reply.status, answer
            dropped += refused
            sent = {name: value for name, value in sent.items() if _field(name) not in refused}

    def _remember_refusal(self, pool: str, url: str, field: str) -> None:
        if (url, field) in self._refused:
            return
        self._refused.add((url, field))
        if field == "priority":
            self.metrics.report_refused_priority(pool)
            log.warning(
                "%s refuses shadow.priority: shadow calls queue with the same priority as client requests; start that "
                "vLLM with --scheduling-policy priority",
                url,
            )
        else:
            log.warning("%s refuses logprobs: pool %s has no token confidence", url, pool)

    def _count(self, config: PoolBackends, query: Query, answer: Mapping[str, Any]) -> None:
        usage = answer.get("usage") or {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        tokens = sum(count for count in counts if isinstance(count, int))
        if not tokens:
            tokens = len(json.dumps([query, answer["choices"]], default=str)) // CHARS_PER_TOKEN
        self.spent_tokens += tokens
        cost = tokens * config.cost / 1000
        self.spent += cost
        self.metrics.add_cost(cost)

    async def _waiting_at(self, backend: BackendConfig) -> float:
        url = base_url(backend.url) + "/metrics"
        when, count = self._waiting.get(url, (-math.inf, 0.0))
        now = time.monotonic()
        if now - when < QUEUE_LENGTH_SECONDS:
            return count
        count = 0.0
        try:
            limit = aiohttp.ClientTimeout(total=5.0)
            async with self._session.get(url, headers=_headers(backend), timeout=limit) as response:
                if response.status == 200:
                    count = waiting_in(await response.text(errors="replace"))
        except (aiohttp.ClientError, TimeoutError):
            pass  # whether the server is down shows when it is asked
        self._waiting[url] = (now, count)
        return count


def pool_request(
    query: Query, parameters: Mapping[str, Any], model: str, priority: int | None, max_tokens: int
) -> dict[str, Any]:
    """The request body: the client's own fields, its token limit bounded by ours, one choice, log-probabilities."""
    body: dict[str, Any] = {name: value for name, value in parameters.items() if name not in LEFT_OUT}
    body["model"] = model
    if isinstance(query, str):
        body |= {"prompt": query, "logprobs": 1}
    else:
        body |= {"messages": list(query), "logprobs": True, "top_logprobs": 1}
    if priority is not None:
        body["priority"] = priority
    name = "max_completion_tokens" if parameters.get("max_completion_tokens") is not None else "max_tokens"
    body[name] = min(max_tokens, client_limit(parameters) or max_tokens)
    if isinstance(body.get("min_tokens"), int):
        body["min_tokens"] = min(body["min_tokens"], body[name])
    return body


def client_limit(parameters: Mapping[str, Any]) -> int | None:
    """The client's own limit on its answer's tokens."""
    limits = [parameters.get(name) for name in ("max_completion_tokens", "max_tokens")]
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def reply_of(answer: Mapping[str, Any], parameters: Mapping[str, Any], max_tokens: int) -> Reply:
    """The first choice of an OpenAI chat or completion."""
    choice = answer["choices"][0]
    message = choice.get("message") or {}
    text = message.get("content") if message else choice.get("text")
    calls = [json.dumps(call.get("function"), sort_keys=True) for call in message.get("tool_calls") or []]
    limit = client_limit(parameters)
    cut = choice.get("finish_reason") == "length" and (limit is None or limit > max_tokens)
    return Reply("\n".join([*([text] if text else []), *calls]), _confidence(choice), cut)


def waiting_in(metrics: str) -> float:
    """vllm:num_requests_waiting in a Prometheus text, summed over its models and engines; 0 where it is absent."""
    return sum(float(count) for count in _WAITING.findall(metrics))


def _confidence(choice: Mapping[str, Any]) -> float | None:
    """exp of the mean token log-probability of a chat or completion, in (0, 1]; None where the server gave none."""
    logprobs = choice.get("logprobs") or {}
    if "token_logprobs" in logprobs:
        values = [min(0.0, value) for value in logprobs["token_logprobs"] or [] if value is not None]
        confidence = math.exp(mean(values)) if values else None
    else:
        confidence = token_confidence(choice)
    return max(confidence, LEAST_CONFIDENCE) if confidence is not None and math.isfinite(confidence) else None


def _field(name: str) -> str:
    return "logprobs" if name == "top_logprobs" else name


def _headers(backend: BackendConfig) -> dict[str, str]:
    return {} if backend.api_key_env is None else {"Authorization": f"Bearer {os.environ[backend.api_key_env]}"}
