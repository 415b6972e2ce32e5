"""The table of label sources: what its rows mean for settings and judging, and a judge that never has a verdict."""

import logging
from typing import Any

import aiohttp
import pytest

from depo_gateway.estimator.configuration.shared import BackendConfig, PoolBackends
from depo_gateway.estimator.records.types import FEEDBACK
from depo_gateway.training.judging import label_sources
from depo_gateway.training.judging.judges import JudgeConfig
from depo_gateway.training.judging.label_sources import (
    can_judge,
    check_judge,
    is_client_claim,
    judge_kinds,
    open_judge,
    source_rank,
)
from depo_gateway.training.judging.pool_client import PoolClient
from depo_gateway.training.online.metrics import LearnerMetrics
from tests.training.fake_vllm import chat, record, vllm

ANSWERS = {"large": "It is 42.", "small": "It is 41."}


def test_verifiers_come_first_then_feedback_webhook_model_and_strangers() -> None:
    names = ("exact", "math", FEEDBACK, "webhook", "model", "unheard-of")
    assert sorted(names, key=source_rank) == list(names)


def test_a_judge_is_named_by_its_row_and_feedback_is_none() -> None:
    assert judge_kinds() == ("none", "exact", "math", "model", "webhook")
    with pytest.raises(ValueError, match=r"judge\.kind is 'feedback'; write one of none, exact, math, model, webhook"):
        check_judge(JudgeConfig("feedback"), ())


def test_a_judge_that_requires_a_reference_has_no_verdict_without_one() -> None:
    with_reference, without = record(1, 0, reference="1"), record(1, 0)
    assert [can_judge(kind, with_reference) for kind in judge_kinds()] == [False, True, True, True, True]
    assert [can_judge(kind, without) for kind in judge_kinds()] == [False, False, False, True, True]


def test_feedback_and_verdicts_by_the_clients_reference_are_its_claims() -> None:
    with_reference, without = record(1, 0, reference="1"), record(1, 0)
    names = (FEEDBACK, "exact", "math", "webhook", "model", "unheard-of")
    assert [is_client_claim(with_reference, name) for name in names] == [True, True, True, False, False, False]
    assert [is_client_claim(without, name) for name in names] == [True, False, False, False, False, False]


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("exact", "no client sends the header x-depo-reference"),
        ("math", "no client sends the header x-depo-reference, or every comparison takes longer than judge.timeout_s"),
        ("model", "the pool umpire does not reply with the requested JSON object"),
        ("webhook", "judge.url refuses the records"),
    ],
)
async def test_a_judge_without_verdicts_is_logged_once(caplog: pytest.LogCaptureFixture, kind: str, cause: str) -> None:
    caplog.set_level(logging.INFO, "depo_gateway.training.judging.label_sources")
    mute = True

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        if kind == "webhook":
            return 200, {} if mute else {"large": 1}
        return 200, chat("I like the first." if mute else '{"first": 9, "second": 1}')

    metrics = LearnerMetrics("0")
    with vllm(reply) as server:
        config = JudgeConfig(kind, pool="umpire", url=server.url)
        pools = {"umpire": PoolBackends("org/umpire", (BackendConfig(server.url),))}
        async with aiohttp.ClientSession() as session:
            client = PoolClient(session, pools, metrics, 10, 5.0)
            async with open_judge(config, session, client, metrics.count_verdict) as judge:

                async def judge_some(count: int, reference: str | None = None) -> list[str]:
                    caplog.clear()
                    for seq in range(count):
                        await judge(record(seq, 0, reference=reference), ANSWERS)
                        await judge(record(seq, 0, reference="42"), {})  # no answers: nothing to judge
                    return [entry.getMessage() for entry in caplog.records]

                assert await judge_some(label_sources.SILENT_RECORDS - 1) == []
                (said,) = await judge_some(1)
                start = f"the judge (judge.kind: {kind}) had no verdict on 50 records in a row; likely cause: "
                assert said.startswith(start + cause)
                assert await judge_some(2 * label_sources.SILENT_RECORDS) == []
                mute = False
                assert await judge_some(2, "42") == [f"the judge (judge.kind: {kind}) has a verdict again"]
                mute = True
                assert len(await judge_some(label_sources.SILENT_RECORDS)) == 1
