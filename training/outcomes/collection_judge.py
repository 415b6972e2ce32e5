"""The judge of `depo-train collect --judge`: the learner's judges, with a cap on what they spend."""

import argparse
import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

from depo_gateway.estimator.configuration import addresses
from depo_gateway.estimator.configuration.shared import BackendConfig, PoolBackends
from depo_gateway.training.judging.judges import VERDICT_TOKENS, JudgeConfig, verdict_tokens
from depo_gateway.training.judging.label_sources import check_judge, open_judge
from depo_gateway.training.judging.openai_client import base_url
from depo_gateway.training.judging.order_effects import Grades, OrderEffects
from depo_gateway.training.judging.pool_client import PoolClient
from depo_gateway.training.judging.spend_cap import SpendCap
from depo_gateway.training.outcomes.labelling import JudgeLabels
from depo_gateway.training.outcomes.sampling_client import key_headers, served_model

COST_PER_TOKEN = 1000.0  # as a pool's cost, which is per 1,000 tokens: the client's `spent` is then in tokens
JUDGE_POOL = "judge"  # the name of the judging model among the client's pools
JUDGE_KINDS = ("model", "webhook")  # without references
JUDGE_SETTINGS = (
    *("judge_model", "judge_api_key_env", "judge_rubric"),
    *("judge_max_tokens", "judge_cap_calls", "judge_cap_tokens"),
)


@dataclass(frozen=True, slots=True)
class CollectionJudge:
    """Which judge labels, by the learner's settings, and the cap.

    Attributes:
        pools: {JUDGE_POOL: the judging model}; empty for a webhook.
    """

    config: JudgeConfig
    pools: Mapping[str, PoolBackends]
    timeout_s: float
    most_calls: int | None = None
    most_tokens: int | None = None

    @property
    def name(self) -> str:
        """What the table's settings record as its verifier; the address has no query, which may hold a secret."""
        if self.config.kind == "model":
            rubric = self.config.rubric
            marked = "" if rubric is None else f", rubric {hashlib.sha256(rubric.encode()).hexdigest()[:12]}"
            return f"judge {self.pools[JUDGE_POOL].model}{marked}"
        parts = urlsplit(self.config.url or "")
        return f"judge {parts.scheme}://{parts.netloc}{parts.path}"

    def calls(self, answers: int) -> int:
        """Calls of one judgement of so many answers: each pair in both orders, or one call of the webhook."""
        return answers * (answers - 1) if self.config.kind == "model" else min(answers, 1)


class JudgeUsage:
    """What the judge was asked: its calls, and the order effects of its verdicts."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}  # by outcome
        self.orders = OrderEffects()

    def count_call(self, pool: str, outcome: str) -> None:
        self.calls[outcome] = self.calls.get(outcome, 0) + 1

    def add_cost(self, cost: float) -> None: ...  # the client's `spent` has the sum

    def report_refused_priority(self, pool: str) -> None: ...  # no priority is sent

    def count_comparison(self, straight: Grades, swapped: Grades) -> None:
        self.orders.add(straight, swapped)


@dataclass(frozen=True, slots=True)
class OpenedJudge:
    """A judge in use."""

    labels: JudgeLabels
    usage: JudgeUsage
    cap: SpendCap

    def text(self) -> str:
        """Lines on what the judge did in this run."""
        failed = self.usage.calls.get("failed", 0)
        tokens = f" and {self.cap.tokens} tokens" if self.cap.tokens else ""
        lines = f"judge: {self.cap.calls} calls{tokens} in this run{f'; {failed} failed' if failed else ''}\n"
        if self.labels.unanswered:
            lines += (
                f"judge: no verdict on {self.labels.unanswered} prompts, which have no row; the same command asks for"
                " them again\n"
            )
        return lines + self.usage.orders.text()


def add_judge_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --judge and its settings."""
    judge = parser.add_argument_group("labels without references")
    judge.add_argument(
        "--judge",
        metavar="KIND=URL",
        help="instead of a verifier: model=URL, an OpenAI server that grades pairs of answers, or webhook=URL",
    )
    judge.add_argument("--judge-model", metavar="NAME", help="for a judging server of several models")
    judge.add_argument("--judge-api-key-env", metavar="VARIABLE", help="environment variable with the judge's API key")
    judge.add_argument(
        "--judge-rubric",
        type=Path,
        metavar="FILE",
        help="criteria of a grade, 0 to 10 (default: correctness first)",
    )
    judge.add_argument(
        "--judge-max-tokens",
        type=int,
        metavar="N",
        help=f"of one verdict, reasoning included (default {VERDICT_TOKENS})",
    )
    judge.add_argument("--judge-cap-calls", type=int, metavar="N", help="end after this many calls of the judge")
    judge.add_argument("--judge-cap-tokens", type=int, metavar="N", help="end before the judge uses more tokens")


def check_judge_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError, one sentence, for contradictions among the flags of a judge."""
    given = [name for name in JUDGE_SETTINGS if getattr(args, name) is not None]
    if args.judge is None:
        if given:
            raise ValueError(f"{_flag(given[0])} needs --judge KIND=URL")
        return
    if args.verifier is not None:
        raise ValueError("--judge and --verifier exclude each other: a judge labels instead of a verifier")
    kind, _, url = args.judge.partition("=")
    if kind not in JUDGE_KINDS or not url:
        raise ValueError(f"--judge {args.judge!r} is not model=URL or webhook=URL")
    addresses.check_http(url, "--judge", query=kind == "webhook")
    addresses.check_secret(args.judge_api_key_env, "--judge-api-key-env")
    for name in given:
        if kind == "webhook" and name not in ("judge_api_key_env", "judge_cap_calls"):
            raise ValueError(f"{_flag(name)} is for --judge model=URL, not for a webhook")
        if name in ("judge_cap_calls", "judge_cap_tokens") and getattr(args, name) < 1:
            raise ValueError(f"{_flag(name)} must be at least 1")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


async def requested_judge(
    session: aiohttp.ClientSession, args: argparse.Namespace, timeout_s: float
) -> CollectionJudge:
    """The judge that the flags name. Raises BackendError where a judging model's server does not answer."""
    kind, _, url = args.judge.partition("=")
    caps = {"most_calls": args.judge_cap_calls, "most_tokens": args.judge_cap_tokens}
    if kind == "webhook":
        config = JudgeConfig(kind, url=url, api_key_env=args.judge_api_key_env, timeout_s=timeout_s)
        check_judge(config, ())
        return CollectionJudge(config, {}, timeout_s, **caps)
    rubric = None if args.judge_rubric is None else _rubric_in(args.judge_rubric)
    config = JudgeConfig(kind, JUDGE_POOL, rubric=rubric, max_tokens=args.judge_max_tokens, timeout_s=timeout_s)
    check_judge(config, (JUDGE_POOL,))
    headers = key_headers("--judge-api-key-env", args.judge_api_key_env)
    model = await served_model(session, "judge", base_url(url), args.judge_model, headers, "--judge-model NAME")
    pool = PoolBackends(model, (BackendConfig(url, args.judge_api_key_env),), COST_PER_TOKEN)
    return CollectionJudge(config, {JUDGE_POOL: pool}, timeout_s, **caps)


def _rubric_in(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"--judge-rubric {path} is not UTF-8 text") from None
    if not text.strip():
        raise ValueError(f"--judge-rubric {path} is empty; write the criteria of a grade from 0 to 10")
    return text


@asynccontextmanager
async def open_labelling(
    judge: CollectionJudge, session: aiohttp.ClientSession, pool_of_model: Mapping[str, str], concurrency: int
) -> AsyncIterator[OpenedJudge]:
    """The judge, ready to label."""
    usage = JudgeUsage()
    client = PoolClient(session, judge.pools, usage, None, judge.timeout_s)
    cap = SpendCap(judge.most_calls, judge.most_tokens, lambda: client.spent)
    tokens = verdict_tokens(judge.config) if judge.config.kind == "model" else 0
    gate = asyncio.Semaphore(max(1, concurrency // 2))  # a judgement makes at least two calls at a time
    async with open_judge(judge.config, session, client, lambda outcome: None) as opened:
        yield OpenedJudge(JudgeLabels(opened, pool_of_model, judge.calls, tokens, cap, gate), usage, cap)
