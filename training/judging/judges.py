"""The judges, which score the answers that pools gave to a record: by a reference, by a model, or by a webhook.

A judge takes a record and {pool: text} and returns {pool: quality in [0, 1]}, only for pools on whose answer it has a
verdict. A pool without a verdict gets no label, which is not the same as quality 0. The learner's labels and those of
`depo-train collect --judge` come from these judges.
"""

import asyncio
import itertools
import json
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from dataclasses import dataclass

import aiohttp

from depo_gateway.estimator.records.types import Record
from depo_gateway.training.judging.openai_client import (
    BUSY,
    AttemptError,
    NoAnswerError,
    post_json,
    retry,
    together,
)
from depo_gateway.training.judging.order_effects import Grades
from depo_gateway.training.judging.pool_client import MISCONFIGURED, PoolClient
from depo_gateway.training.judging.rubric import (
    BEST_GRADE,
    parse_grades,
    request_text,
    rubric_prompt,
)
from depo_gateway.training.rewards.exact import grade_exact
from depo_gateway.training.rewards.verifiers import Grader
from depo_gateway.training.rewards.worker_pool import RewardError

WEBHOOK_TRIES = 3
WEBHOOK_BYTES = 1 << 20  # of a webhook's reply
VERDICT_TOKENS = 1024  # of a model's verdict: room to reason first
log = logging.getLogger(__name__)

Judge = Callable[[Record, Mapping[str, str]], Awaitable[Mapping[str, float]]]


@dataclass(frozen=True, slots=True)
class JudgeConfig:
    """Which judge scores the answers, and its settings."""

    kind: str = "none"  # a judge of label_sources.py; none: token confidence alone
    pool: str | None = None  # model: the pool that judges
    url: str | None = None  # webhook
    api_key_env: str | None = None  # webhook: the environment variable with its bearer token
    timeout_s: float = 30.0  # one verdict
    rubric: str | None = None  # model: the criteria of a grade; None: CRITERIA of rubric.py
    max_tokens: int | None = None  # model: of a verdict, reasoning included; None: VERDICT_TOKENS


OpenJudge = Callable[[JudgeConfig, aiohttp.ClientSession, PoolClient], AbstractAsyncContextManager[Judge]]


@asynccontextmanager
async def open_exact(config: JudgeConfig, session: aiohttp.ClientSession, pools: PoolClient) -> AsyncIterator[Judge]:
    """1 where an answer equals the client's reference, ignoring case, outer punctuation and spacing; else 0."""
    yield _judge_exact


@asynccontextmanager
async def open_math(config: JudgeConfig, session: aiohttp.ClientSession, pools: PoolClient) -> AsyncIterator[Judge]:
    """1 where an answer is mathematically equal to the client's reference; no verdict past the deadline."""
    with closing(Grader("math", config.timeout_s)) as grader:
        yield lambda record, answers: _judge_math(grader, record, answers)


@asynccontextmanager
async def open_model(config: JudgeConfig, session: aiohttp.ClientSession, pools: PoolClient) -> AsyncIterator[Judge]:
    """A pool grades each pair of answers by the rubric."""
    yield lambda record, answers: _judge_by_model(pools, config, record, answers)


@asynccontextmanager
async def open_webhook(config: JudgeConfig, session: aiohttp.ClientSession, pools: PoolClient) -> AsyncIterator[Judge]:
    """A service of the user's scores the answers."""
    yield lambda record, answers: _judge_by_webhook(session, config, record, answers)


async def _judge_exact(record: Record, answers: Mapping[str, str]) -> Mapping[str, float]:
    if record.reference is None:
        return {}
    verdicts = {pool: grade_exact(text, record.reference) for pool, text in answers.items()}
    return {pool: verdict.reward for pool, verdict in verdicts.items() if verdict.reward is not None}


async def _judge_math(grader: Grader, record: Record, answers: Mapping[str, str]) -> Mapping[str, float]:
    if record.reference is None:
        return {}
    pairs = [(text, record.reference) for text in answers.values()]
    try:
        rewards = await asyncio.to_thread(grader.grade, pairs)
    except RewardError as error:  # no worker starts: out of memory, or of processes
        raise NoAnswerError(str(error)) from None
    return {pool: reward for pool, reward in zip(answers, rewards, strict=True) if reward is not None}


async def _judge_by_model(
    pools: PoolClient, config: JudgeConfig, record: Record, answers: Mapping[str, str]
) -> Mapping[str, float]:
    """Each pair is graded in both orders; a pool's quality is its mean grade over the best grade.

    Models favour a position (https://arxiv.org/abs/2306.05685, 2406.07791), so a pair counts only if the verdicts on
    both orders can be read.
    """
    grades: dict[str, list[float]] = {}
    request = request_text(record)
    for one, other in itertools.combinations(answers, 2):
        straight, swapped = await together(
            _verdict(pools, config, request, answers[one], answers[other]),
            _verdict(pools, config, request, answers[other], answers[one]),
        )
        if straight is not None and swapped is not None:
            pools.metrics.count_comparison(straight, swapped)
            grades.setdefault(one, []).append((straight[0] + swapped[1]) / 2)
            grades.setdefault(other, []).append((straight[1] + swapped[0]) / 2)
    return {pool: sum(values) / len(values) / BEST_GRADE for pool, values in grades.items()}


async def _verdict(pools: PoolClient, config: JudgeConfig, request: str, first: str, second: str) -> Grades | None:
    assert config.pool is not None  # the settings were checked
    text = rubric_prompt(request, first, second, config.rubric)
    most = verdict_tokens(config)
    reply = await pools.ask(
        config.pool, [{"role": "user", "content": text}], {"temperature": 0, "max_tokens": most}, most
    )
    return None if reply is None else parse_grades(reply.text)


def verdict_tokens(config: JudgeConfig) -> int:
    """The most tokens of a model's verdict."""
    return config.max_tokens or VERDICT_TOKENS


async def _judge_by_webhook(
    session: aiohttp.ClientSession, config: JudgeConfig, record: Record, answers: Mapping[str, str]
) -> Mapping[str, float]:
    """The webhook's scores; none where it refuses the record or its reply is invalid."""
    assert config.url is not None  # the settings were checked
    url, query = config.url, "prompt" if isinstance(record.asked, str) else "messages"
    body = {"request_id": record.id, query: record.asked, "reference": record.reference, "answers": dict(answers)}
    key = config.api_key_env
    headers = {} if key is None else {"Authorization": f"Bearer {os.environ[key]}"}
    timeout = aiohttp.ClientTimeout(total=config.timeout_s)

    async def attempt() -> Mapping[str, float]:
        reply = await post_json(session, url, body, headers, timeout, limit=WEBHOOK_BYTES)
        if reply.status == 200:
            try:
                return webhook_scores(reply.content, answers)
            except ValueError as error:
                log.warning("the judge's webhook: %s; the record has no label", error)
                return {}
        if reply.status in BUSY | MISCONFIGURED:
            raise AttemptError(f"answers {reply.status}")
        log.warning("the judge's webhook answers %d; the record has no label", reply.status)
        return {}

    try:
        return await retry(attempt, WEBHOOK_TRIES)
    except NoAnswerError as error:
        raise NoAnswerError(f"the judge's webhook {error}") from None


def webhook_scores(content: bytes, answers: Mapping[str, str]) -> Mapping[str, float]:
    """{pool: score} from a webhook's reply. A pool may be missing or null. ValueError says what is wrong."""
    try:
        scores = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("the reply is not JSON") from None
    if not isinstance(scores, dict):
        raise ValueError("the reply is not an object of pools and scores")
    for pool, score in scores.items():
        if pool not in answers:
            raise ValueError(f"the reply scores {pool[:60]!r}, which is none of the pools in the request")
        if score is not None and (not isinstance(score, int | float) or isinstance(score, bool) or not 0 <= score <= 1):
            raise ValueError(f"the score of {pool!r} is {str(score)[:40]}, not a number between 0 and 1")
    return {pool: float(score) for pool, score in scores.items() if score is not None}
