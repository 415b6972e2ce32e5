"""The pools as the learner asks them: at low priority, with token log-probabilities, each call's cost counted.

vLLM serves a lower `priority` first and knows it under `--scheduling-policy priority` alone. Without that flag releases
with the old engine answer 400, "Priority scheduling is not enabled", and newer ones ignore the field
(https://github.com/vllm-project/vllm/issues/22997). What a server refuses, it is not sent again.
"""

import asyncio
import itertools
import json
import logging
import math
import os
import random
import re
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp

from depo_gateway.estimator.configuration.shared import BackendConfig, PoolBackends
from depo_gateway.training.online.metrics import LearnerMetrics
from depo_gateway.training.outcomes.sampling_client import BUSY, error_text, mean, token_confidence

TRIES = 3
FIRST_WAIT_SECONDS = 0.5  # doubled each time
WAITING_SECONDS = 2.0  # for so long a queue's length is believed
LEAST = 1e-9  # a token confidence is above 0
CHARS_PER_TOKEN = 4  # of English, where a server does not count
OURS = frozenset({401, 403, 404})  # a wrong key, address or model: every call would fail alike
OPTIONAL = {"priority": "priority", "logprob": "logprobs"}  # word of a refusal -> what we added and can do without
# What a client asked of its own answer's form, or of its own place in the line
LEFT_OUT = {
    *("model", "messages", "prompt", "stream", "stream_options", "n", "best_of", "echo", "logprobs", "top_logprobs"),
    *("prompt_logprobs", "use_beam_search", "priority", "request_id", "user", "store", "metadata", "service_tier"),
    *("cache_salt", "kv_transfer_params", "return_token_ids", "max_tokens", "max_completion_tokens"),
}
_WAITING = re.compile(r"^vllm:num_requests_waiting(?:\{[^}]*\})?\s+([0-9.eE+-]+)", re.MULTILINE)
log = logging.getLogger(__name__)

T = TypeVar("T")
Asked = str | Sequence[Mapping[str, Any]]  # a prompt, or a conversation's messages


class AskFailed(Exception):
    """Nobody answered, several times in a row. The message is one line."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer of a pool."""

    text: str  # of the first choice; what it calls of tools, as JSON lines after it
    token_confidence: float | None
    cut: bool  # by our max_tokens, where the client's own limit would have let it go on


class PoolClient:
    """Asks pools by name.

    Args:
        session: without a time limit of its own.
        priority: vLLM's; None: the servers' usual.
        timeout_s: seconds for one call.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        pools: Mapping[str, PoolBackends],
        metrics: LearnerMetrics,
        priority: int | None,
        timeout_s: float,
    ) -> None:
        self.pools = pools
        self.spent = 0.0  # since this object was made, in the unit of pools.*.cost
        self._session, self._metrics, self._priority = session, metrics, priority
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(5.0, timeout_s))
        self._turn = itertools.count()
        self._refused: set[tuple[str, str]] = set()  # (url, field)
        self._waiting: dict[str, tuple[float, float]] = {}  # url -> (when, how many)

    async def ask(self, pool: str, asked: Asked, parameters: Mapping[str, Any], max_tokens: int) -> Reply | None:
        """One answer; None where the pool refuses this request. AskFailed when it does not answer at all."""
        config = self.pools[pool]
        path = "/v1/completions" if isinstance(asked, str) else "/v1/chat/completions"
        body = body_of(asked, parameters, config.model, self._priority, max_tokens)
        words = ""
        for attempt in range(TRIES):
            if attempt:
                await asyncio.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1) * random.uniform(0.8, 1.2))
            backend = config.backends[next(self._turn) % len(config.backends)]
            try:
                status, answer = await self._post(pool, backend, path, body)
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                words = f"fails ({error or type(error).__name__})"
                continue
            if status == 200:
                self._count(config, asked, answer)
                try:
                    reply = reply_of(answer, parameters, max_tokens)
                except (AttributeError, KeyError, TypeError, ValueError):
                    words = "answers what is no OpenAI completion"
                    continue
                self._metrics.shadow_requests.labels(pool, "ok").inc()
                return reply
            words = f"answers {status} {error_text(answer)}"
            if status not in BUSY | OURS:
                self._metrics.shadow_requests.labels(pool, "refused").inc()
                return None
        self._metrics.shadow_requests.labels(pool, "failed").inc()
        raise AskFailed(f"pool {pool}: {backend.url} {words}")

    async def waiting(self, pool: str) -> float:
        """Requests that wait in line, at the worst of the pool's backends; 0 where a server does not tell."""
        return max([await self._waiting_at(backend) for backend in self.pools[pool].backends])

    async def _post(
        self, pool: str, backend: BackendConfig, path: str, body: Mapping[str, Any]
    ) -> tuple[int, dict[str, Any]]:
        """Status and JSON. An optional field that the server refuses is left out, and remembered if that helped."""
        url = _base(backend) + path
        sent = {name: value for name, value in body.items() if (url, _field(name)) not in self._refused}
        dropped: list[str] = []
        while True:
            async with self._session.post(
                url, json=sent, headers=_headers(backend), timeout=self._timeout, allow_redirects=False
            ) as response:
                status, answer = response.status, _json(await response.read())
            if status == 200:
                if not isinstance(answer, dict) or not answer.get("choices"):
                    raise ValueError("an answer without choices")
                for field in dropped:
                    self._remember(pool, url, field)
                return status, answer
            said = error_text(answer).lower()
            refused = [field for word, field in OPTIONAL.items() if word in said and field in sent]
            if status not in (400, 422) or not refused:
                return status, answer
            dropped += refused
            sent = {name: value for name, value in sent.items() if _field(name) not in refused}

    def _remember(self, pool: str, url: str, field: str) -> None:
        if (url, field) in self._refused:
            return
        self._refused.add((url, field))
        if field == "priority":
            self._metrics.priority_refused.labels(pool).set(1)
            log.warning(
                "%s refuses shadow.priority: shadow calls wait in line like clients' own; start that vLLM with "
                "--scheduling-policy priority",
                url,
            )
        else:
            log.warning("%s refuses logprobs: there is no token confidence of pool %s", url, pool)

    def _count(self, config: PoolBackends, asked: Asked, answer: Mapping[str, Any]) -> None:
        usage = answer.get("usage") or {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        tokens = sum(count for count in counts if isinstance(count, int))
        if not tokens:
            tokens = len(json.dumps([asked, answer["choices"]], default=str)) // CHARS_PER_TOKEN
        cost = tokens * config.cost / 1000
        self.spent += cost
        self._metrics.shadow_cost.inc(cost)

    async def _waiting_at(self, backend: BackendConfig) -> float:
        url = _base(backend) + "/metrics"
        when, count = self._waiting.get(url, (-math.inf, 0.0))
        now = time.monotonic()
        if now - when < WAITING_SECONDS:
            return count
        count = 0.0
        try:
            limit = aiohttp.ClientTimeout(total=5.0)
            async with self._session.get(url, headers=_headers(backend), timeout=limit) as response:
                if response.status == 200:
                    count = waiting_in(await response.text(errors="replace"))
        except (aiohttp.ClientError, TimeoutError):
            pass  # a server that is away shows when it is asked
        self._waiting[url] = (now, count)
        return count


async def together(*calls: Awaitable[T]) -> list[T]:
    """All results, or the first failure once every call has ended: none goes on unseen."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    found: list[T] = []
    for result in results:
        if isinstance(result, BaseException):
            raise result
        found.append(result)
    return found


def body_of(
    asked: Asked, parameters: Mapping[str, Any], model: str, priority: int | None, max_tokens: int
) -> dict[str, Any]:
    """What a pool is sent: the client's own fields, its limit bounded by ours, one choice, with log-probabilities."""
    body: dict[str, Any] = {name: value for name, value in parameters.items() if name not in LEFT_OUT}
    body["model"] = model
    if isinstance(asked, str):
        body |= {"prompt": asked, "logprobs": 1}
    else:
        body |= {"messages": list(asked), "logprobs": True, "top_logprobs": 1}
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
    """What an OpenAI chat or completion says."""
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
    """exp of the mean token log-probability, in (0, 1]; None where the server gave none."""
    logprobs = choice.get("logprobs") or {}
    if "token_logprobs" in logprobs:
        values = [min(0.0, value) for value in logprobs["token_logprobs"] or [] if value is not None]
        found = math.exp(mean(values)) if values else None
    else:
        found = token_confidence(choice)
    return max(found, LEAST) if found is not None and math.isfinite(found) else None


def _field(name: str) -> str:
    return "logprobs" if name == "top_logprobs" else name


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return data.decode("utf-8", "replace")


def _base(backend: BackendConfig) -> str:
    return backend.url.rstrip("/").removesuffix("/v1")


def _headers(backend: BackendConfig) -> dict[str, str]:
    return {} if backend.api_key_env is None else {"Authorization": f"Bearer {os.environ[backend.api_key_env]}"}
