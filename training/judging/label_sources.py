"""The table of label sources: the gateway's feedback, and each judge. A new source or judge is one row here.

`judge.kind` names a source that has a judge, and the labels that it makes carry the name. Which label counts where
sources disagree follows from the ranks (training/outcomes/label_precedence.py).
"""

import logging
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp

from depo_gateway.estimator.configuration import addresses
from depo_gateway.estimator.configuration.yaml_tree import at_least
from depo_gateway.estimator.records.types import FEEDBACK, Record
from depo_gateway.training.judging.judges import (
    Judge,
    JudgeConfig,
    OpenJudge,
    open_exact,
    open_math,
    open_model,
    open_webhook,
)
from depo_gateway.training.judging.pool_client import PoolClient
from depo_gateway.training.judging.rubric import without_reasoning

NO_JUDGE = "none"  # judge.kind: labels hold token confidence alone
SILENT_RECORDS = 50  # judged records in a row without a verdict, after which a warning is logged
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LabelSource:
    """One source of quality labels.

    Attributes:
        name: in Label.source, in `judge.kind` and in metrics.
        needs_reference: it compares with the reference that the client sent, so its labels are the client's claim.
        rank: of two sources that label as many pools of a record, the one with the lower rank counts.
        open: opens the judge; None: the labels come from elsewhere.
        keys: settings under `judge` that this source reads, besides kind and timeout_s.
        check: raises ValueError where these are missing or wrong, given the names of the pools.
        silence: the likely cause where it never has a verdict; may contain {pool}.
    """

    name: str
    needs_reference: bool
    rank: int
    open: OpenJudge | None
    keys: tuple[str, ...] = ()
    check: Callable[[JudgeConfig, Collection[str]], None] | None = None
    silence: str = "it has no verdict on such answers"


def _check_model(config: JudgeConfig, pools: Collection[str]) -> None:
    if config.pool not in pools:
        known = ", ".join(pools) or "none are configured"
        given = "" if config.pool is None else f", not {config.pool!r}"
        raise ValueError(f"judge.kind: model requires judge.pool, the pool that judges{given}; the pools are: {known}")
    if config.max_tokens is not None:
        at_least(config.max_tokens, 16, "judge.max_tokens")
    if config.rubric is not None and not config.rubric.strip():
        raise ValueError("judge.rubric is empty; write the criteria of a grade, or leave it out")


def _check_webhook(config: JudgeConfig, pools: Collection[str]) -> None:
    if config.url is None:
        raise ValueError("judge.kind: webhook requires judge.url, the address that answers are posted to")
    addresses.check_http(config.url, "judge.url", query=True)
    addresses.check_secret(config.api_key_env, "judge.api_key_env")


SOURCES: dict[str, LabelSource] = {
    source.name: source
    for source in (
        LabelSource("exact", True, 10, open_exact, silence="no client sends the header x-depo-reference"),
        LabelSource(
            "math",
            True,
            20,
            open_math,
            silence="no client sends the header x-depo-reference, or every comparison takes longer than"
            " judge.timeout_s",
        ),
        LabelSource(
            "model",
            False,
            50,
            open_model,
            ("pool", "rubric", "max_tokens"),
            _check_model,
            silence="the pool {pool} does not reply with the requested JSON object, perhaps because the model is too"
            " small or judge.max_tokens cuts its reasoning off, or there are never two pools' answers to compare",
        ),
        LabelSource(
            "webhook",
            False,
            40,
            open_webhook,
            ("url", "api_key_env"),
            _check_webhook,
            silence="judge.url refuses the records, or scores none of the answers",
        ),
        LabelSource(FEEDBACK, False, 30, None),
    )
}


def judge_kinds() -> tuple[str, ...]:
    """The values of `judge.kind`."""
    return (NO_JUDGE, *(source.name for source in SOURCES.values() if source.open is not None))


def check_judge(config: JudgeConfig, pools: Collection[str]) -> None:
    """Raises ValueError, one sentence, where the settings under `judge` are wrong."""
    if config.kind not in judge_kinds():
        raise ValueError(f"judge.kind is {config.kind!r}; write one of {', '.join(judge_kinds())}")
    at_least(config.timeout_s, 0.001, "judge.timeout_s")
    source = SOURCES.get(config.kind)
    if source is not None and source.check is not None:
        source.check(config, pools)
    for key in ("pool", "url", "api_key_env", "rubric", "max_tokens"):
        if getattr(config, key) is not None and (source is None or key not in source.keys):
            kinds = " or ".join(other.name for other in SOURCES.values() if key in other.keys)
            raise ValueError(f"judge.{key} is read by kind: {kinds} alone, and judge.kind is {config.kind}")


def can_judge(kind: str, record: Record) -> bool:
    """Whether the judge of this kind may have a verdict on answers to a record."""
    source = SOURCES.get(kind)
    if source is None or source.open is None:
        return False
    return not source.needs_reference or record.reference is not None


def source_rank(name: str) -> int:
    """A source's rank; one that is not in the table comes last."""
    return SOURCES[name].rank if name in SOURCES else 1 + max(source.rank for source in SOURCES.values())


def is_client_claim(record: Record, source: str) -> bool:
    """Whether a label from this source is the client's claim: its feedback, or a verdict by its reference."""
    known = SOURCES.get(source)
    return source == FEEDBACK or (known is not None and known.needs_reference and record.reference is not None)


@asynccontextmanager
async def open_judge(
    config: JudgeConfig, session: aiohttp.ClientSession, pools: PoolClient, count_verdict: Callable[[str], None]
) -> AsyncIterator[Judge]:
    """The judge that the settings name. It raises NoAnswerError where the model or the service does not answer.

    Args:
        count_verdict: called with the outcome of each judged record, labelled or none.
    """
    source = SOURCES.get(config.kind)
    if source is None or source.open is None:
        yield _no_verdict
        return
    async with source.open(config, session, pools) as judge:
        yield _watched(judge, source, config, count_verdict)


async def _no_verdict(record: Record, answers: Mapping[str, str]) -> Mapping[str, float]:
    return {}


def _watched(judge: Judge, source: LabelSource, config: JudgeConfig, count_verdict: Callable[[str], None]) -> Judge:
    """The judge, which sees answers without the model's reasoning; its verdicts counted, with a warning once it has had
    none for long.
    """
    silent = 0  # records in a row

    async def watched(record: Record, answers: Mapping[str, str]) -> Mapping[str, float]:
        nonlocal silent
        if not answers:
            return {}
        verdict = await judge(record, {pool: without_reasoning(text) for pool, text in answers.items()})
        count_verdict("labelled" if verdict else "none")
        if verdict and silent >= SILENT_RECORDS:
            log.info("the judge (judge.kind: %s) has a verdict again", config.kind)
        silent = 0 if verdict else silent + 1
        if silent == SILENT_RECORDS:
            log.warning(
                "the judge (judge.kind: %s) had no verdict on %d records in a row; likely cause: %s",
                config.kind,
                SILENT_RECORDS,
                source.silence.format(pool=config.pool),
            )
        return verdict

    return watched
