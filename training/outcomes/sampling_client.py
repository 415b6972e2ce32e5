"""One pool's OpenAI server as `depo-train collect` uses it: who serves there, what it takes, k graded completions."""

import asyncio
import json
import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from depo_gateway.training.rewards.verifiers import Grader
from depo_gateway.training.rewards.worker_pool import RewardError

TRIES = 6
FIRST_WAIT_SECONDS = 0.5  # doubled each time, 15 s in all: a backend may restart meanwhile
Messages = Sequence[Mapping[str, Any]]
BUSY = frozenset({408, 429, 500, 502, 503, 504})
SIMPLEST: Messages = ({"role": "user", "content": "1+1="},)
ALIVE_SECONDS = 60.0


class BackendFailed(Exception):
    """A backend cannot go on; the message is one line for the user. What is collected so far stays."""


@dataclass(frozen=True, slots=True)
class Backend:
    """One pool's server, and what it turned out to be able to do."""

    pool: str
    url: str  # without /v1
    model: str
    headers: Mapping[str, str]
    many: bool = True  # takes n > 1
    logprobs: bool = True


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn and graded."""

    k: int
    temperature: float
    max_tokens: int
    grader: Grader


@dataclass(frozen=True, slots=True)
class Outcome:
    """One model on one prompt: pass rate, and the mean over completions of exp(mean token log-probability)."""

    correct: float | None  # over the completions that could be graded
    token_confidence: float | None


async def outcome(
    session: aiohttp.ClientSession,
    gate: asyncio.Semaphore,
    backend: Backend,
    messages: Messages,
    reference: str,
    sampling: Sampling,
) -> Outcome | str:
    """k completions, graded; or the server's words where it refuses, or keeps failing at, this one prompt.

    Raises:
        BackendFailed: it does not answer the simplest chat either.
        RewardError: the verifier is a function of the user's and failed.
    """

    async def ask(count: int) -> list[Mapping[str, Any]] | str:
        async with gate:
            try:
                status, answer = await post(session, backend, body_of(backend, messages, sampling, count))
            except BackendFailed as failure:
                if not await answers(session, backend):
                    raise
                return str(failure)
        return answer["choices"] if status == 200 else f"{status} {error_text(answer)}"

    sizes = [sampling.k] if backend.many else [1] * sampling.k
    replies = await asyncio.gather(*(ask(size) for size in sizes))
    refused = [reply for reply in replies if isinstance(reply, str)]
    if refused:
        return refused[0]
    choices = [choice for reply in replies if not isinstance(reply, str) for choice in reply]
    pairs = [(choice["message"].get("content") or "", reference) for choice in choices]
    rewards = await asyncio.to_thread(sampling.grader.grade, pairs)
    graded = [reward for reward in rewards if reward is not None]
    outside = [reward for reward in graded if not 0 <= reward <= 1]
    if outside:
        raise RewardError(f"the verifier {sampling.grader.name} gave {outside[0]:g}; an outcome is between 0 and 1")
    sure = [value for choice in choices if (value := token_confidence(choice)) is not None]
    return Outcome(mean(graded) if graded else None, round(mean(sure), 4) if sure else None)


def body_of(backend: Backend, messages: Messages, sampling: Sampling, count: int) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": backend.model,
        "messages": list(messages),
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
    }
    if count > 1:
        body["n"] = count
    if backend.logprobs:
        body |= {"logprobs": True, "top_logprobs": 1}
    return body


def token_confidence(choice: Mapping[str, Any]) -> float | None:
    """exp of the mean token log-probability of one completion (1/perplexity); None where the server gave none."""
    tokens = (choice.get("logprobs") or {}).get("content") or []
    return math.exp(mean([min(0.0, token["logprob"]) for token in tokens])) if tokens else None


async def connect(
    session: aiohttp.ClientSession,
    pool: str,
    url: str,
    wanted: str | None,
    key_variable: str | None,
    sampling: Sampling,
) -> Backend:
    """Who serves there and what it takes: n, log-probabilities. BackendFailed where nobody answers."""
    base = url.rstrip("/").removesuffix("/v1")
    headers = {}
    if key_variable is not None:
        if key_variable not in os.environ:
            raise ValueError(f"--api-key-env {pool}: the environment has no {key_variable}")
        headers["Authorization"] = f"Bearer {os.environ[key_variable]}"
    try:
        async with session.get(f"{base}/v1/models", headers=headers) as response:
            if response.status != 200:
                raise BackendFailed(f"{pool}: {base}/v1/models answers {response.status}")
            served = [entry["id"] for entry in (await response.json(content_type=None))["data"]]
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError) as error:
        raise BackendFailed(f"{pool}: no OpenAI server at {base} ({error or type(error).__name__})") from None
    if wanted is None and len(served) != 1:
        raise ValueError(f"{pool}: {base} serves {', '.join(served) or 'no model'}; choose by --model {pool}=NAME")
    if wanted is not None and wanted not in served:
        raise ValueError(f"{pool}: {base} serves {', '.join(served)}, not {wanted!r}")
    return await probe(session, Backend(pool, base, wanted or served[0], headers), sampling)


async def probe(session: aiohttp.ClientSession, backend: Backend, sampling: Sampling) -> Backend:
    """The backend with what it takes, found by one short request: n at all, log-probabilities at all.

    It asks for as many tokens as the prompts will: a limit beyond the server's context shows now, not at each prompt.
    """
    words = ""
    for logprobs in (True, False):
        for many in (True, False) if sampling.k > 1 else (True,):
            trial = Backend(backend.pool, backend.url, backend.model, backend.headers, many, logprobs)
            count = sampling.k if many else 1
            status, answer = await post(session, trial, body_of(trial, SIMPLEST, sampling, count))
            if status == 200 and len(answer["choices"]) == count:
                return trial
            words = (
                f"{status} {error_text(answer)}" if status != 200 else f"{len(answer['choices'])} choices for {count}"
            )
    raise BackendFailed(f"{backend.pool}: {backend.url} does not complete a chat: {words}")


async def answers(session: aiohttp.ClientSession, backend: Backend) -> bool:
    """Whether the simplest chat is answered now. A server that only lists its models may be failing at every chat."""
    body = {"model": backend.model, "messages": list(SIMPLEST), "max_tokens": 1}
    limit = aiohttp.ClientTimeout(total=ALIVE_SECONDS)
    try:
        async with session.post(
            f"{backend.url}/v1/chat/completions", json=body, headers=backend.headers, timeout=limit
        ) as response:
            await response.read()
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


async def post(session: aiohttp.ClientSession, backend: Backend, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Status and JSON. Busy answers, resets and timeouts are tried again; BackendFailed when that does not help."""
    words = ""
    for attempt in range(TRIES):
        if attempt:
            await asyncio.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1) * random.uniform(0.8, 1.2))
        try:
            async with session.post(
                f"{backend.url}/v1/chat/completions", json=body, headers=backend.headers
            ) as response:
                if response.status in BUSY:
                    words = f"answers {response.status} {_said(await response.read())}".rstrip()
                    continue
                answer = await response.json(content_type=None)
                if response.status in (401, 403):
                    raise BackendFailed(f"{backend.pool}: {backend.url} answers {response.status} {error_text(answer)}")
                if response.status == 200 and not (isinstance(answer, dict) and answer.get("choices")):
                    raise BackendFailed(f"{backend.pool}: {backend.url} answers a chat without choices")
                return response.status, answer
        except (aiohttp.ClientError, TimeoutError, json.JSONDecodeError) as error:
            words = f"fails ({error or type(error).__name__})"
    raise BackendFailed(f"{backend.pool}: {backend.url} {words}, {TRIES} times in a row")


def _said(body: bytes) -> str:
    """What an error's body says, "" where that is nothing."""
    text = body.decode("utf-8", "replace").strip()
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        return error_text(text)
    return error_text(answer) if answer else ""


def error_text(answer: Any) -> str:
    """The message of an OpenAI error object, on one line."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    message = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(message).split())[:300]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
