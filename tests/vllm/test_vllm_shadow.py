"""What the gateway served from a real vLLM is shadowed by the learner on the other one, with a judge and log-probs."""

import asyncio
import contextlib
import os
from pathlib import Path

import aiohttp
import pytest

from depo_gateway.estimator.configuration.shared import BackendConfig, PoolBackends
from depo_gateway.estimator.records.store import Store
from depo_gateway.estimator.records.types import Label
from depo_gateway.training.judging.judges import JudgeConfig
from depo_gateway.training.judging.label_sources import open_judge
from depo_gateway.training.judging.pool_client import PoolClient
from depo_gateway.training.online.metrics import LearnerMetrics
from depo_gateway.training.online.settings import ShadowConfig
from depo_gateway.training.online.shadowing import Shadow
from depo_gateway.training.online.spend_ledger import SpendLedger
from tests.gateway.conftest import running
from tests.vllm.conftest import PYTHON
from tests.vllm.front import settings
from tests.vllm.servers import VllmServer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not os.environ.get(PYTHON), reason=f"{PYTHON} names no Python that has vLLM"),
]
CHAINS = {"3+4=": "3+4=7", "2*3=": "2*3=6", "9-5=": "9-5=4", "1+1+1=": "1+1=2;2+1=3"}  # what a right answer says


async def test_served_traffic_becomes_labels_of_both_pools(
    servers: dict[str, VllmServer], checkpoint: Path, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'records.db'}"
    body = {"max_tokens": 60, "temperature": 0, "stop": ["\n"]}
    async with running(settings(servers, checkpoint, records={"url": url, "prompts": "full"})) as gateway:
        for index, (chain, right) in enumerate(CHAINS.items()):
            headers = {"x-depo-reference": right}
            asked = {
                **body,
                "model": "auto",
                "messages": [{"role": "user", "content": chain}],
                "stream": index % 2 == 0,
            }
            answer = await gateway.session.post(f"{gateway.url}/v1/chat/completions", json=asked, headers=headers)
            async with answer:
                await answer.read()
                assert answer.status == 200
        assert await gateway.settles("gateway_records_total", len(CHAINS), outcome="written")
    store = Store(url)
    records = store.unshadowed(10)
    assert [record.reference for record in records] == list(CHAINS.values())
    assert all(record.answer and record.finish_reason and record.completion_tokens for record in records)

    pools = {
        name: PoolBackends(server.model, (BackendConfig(server.url),), cost)
        for (name, server), cost in zip(servers.items(), (1.0, 5.0), strict=True)
    }
    metrics = LearnerMetrics("0")
    async with aiohttp.ClientSession() as session:
        client = PoolClient(session, pools, metrics, 10, 60.0)
        async with open_judge(JudgeConfig("exact"), session, client, metrics.count_verdict) as judge:
            config, ledger = ShadowConfig(share=1.0, confidence_of_served=True), SpendLedger(tmp_path)
            work = asyncio.create_task(Shadow(store, client, judge, "exact", config, metrics, ledger).run())
            for _ in range(600):
                if not store.unshadowed(10):
                    break
                await asyncio.sleep(0.1)
            assert not store.unshadowed(10)
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
    assert client.spent > 0
    for item in store.labelled(10):
        labels: dict[str, Label] = {label.pool: label for label in item.labels}
        assert set(labels) == set(pools)
        for label in labels.values():
            assert label.source == "exact"
            assert label.quality in (0.0, 1.0)
            assert label.token_confidence is not None
            assert 0 < label.token_confidence <= 1
        # at temperature 0 the large pool's own answer, served or shadowed, says what it said before
        assert labels["large"].quality == 1.0
    store.close()
