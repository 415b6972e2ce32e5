"""Alerts on a real gateway in real trouble, without their waits: what the metrics say is what the rules look for.

That they wait, and where their thresholds lie, is promtool's to test (test_rules.py).
"""

import asyncio
import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import yaml

from depo_gateway.estimator import checkpoint
from depo_gateway.gateway.config import key_digest
from tests.gateway.backend import FakeVllm
from tests.gateway.checkpoints import version
from tests.gateway.conftest import Running, running, settings
from tests.monitoring import servers

ADMIN, TEAM, GREEDY = "sk-depo-admin", "sk-depo-team", "sk-depo-greedy"
FIRED = 'count by (alertname) (count_over_time(ALERTS{alertstate="firing"}[10m]))'
DURING = {
    "DepoBackendDown",
    "DepoConfigReloadFailed",
    "DepoErrorRateElevated",
    "DepoErrorRateHigh",
    "DepoEstimatorRefused",
    "DepoFallbackRatioHigh",
    "DepoKeyLargeShareSpent",
    "DepoNoUsableBackend",
    "DepoRecordsFailing",
}
AFTER = {"DepoGatewayAbsent", "DepoGatewayReplicaDown"}


def without_waits(directory: Path) -> list[Path]:
    """The rules, each alert firing as soon as its expression has a value."""
    made = []
    for path in servers.RULES:
        raw = yaml.safe_load(path.read_text())
        for rule in [rule for group in raw["groups"] for rule in group["rules"]]:
            rule.pop("for", None)
        made.append(directory / path.name)
        made[-1].write_text(yaml.safe_dump(raw))
    return made


async def ask(gateway: Running, key: str, count: int, model: str = "auto") -> list[int]:
    """The status of so many requests, a tenth of a second apart, so that several scrapes see them come."""
    statuses = []
    for number in range(count):
        body = {"model": model, "messages": [{"role": "user", "content": f"easy {number}"}]}
        headers = {"authorization": f"Bearer {key}"}
        async with gateway.session.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers) as answer:
            statuses.append(answer.status)
        await asyncio.sleep(0.1)
    return statuses


async def reload(gateway: Running) -> int:
    headers = {"authorization": f"Bearer {ADMIN}"}
    async with gateway.session.post(f"{gateway.admin}/admin/reload", headers=headers) as answer:
        return answer.status


async def fired(prometheus: servers.Prometheus, wanted: set[str], seconds: float = 40.0) -> set[str]:
    """The alerts that have fired, as soon as all of `wanted` have."""
    until = asyncio.get_running_loop().time() + seconds
    while True:
        names = {sample["metric"]["alertname"] for sample in await asyncio.to_thread(prometheus.query, FIRED)}
        if wanted <= names or asyncio.get_running_loop().time() > until:
            return names
        await asyncio.sleep(0.5)


@pytest.mark.slow
async def test_alerts_fire_on_a_gateway_in_trouble(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path, checkpoints, database = tmp_path / "gateway.yaml", tmp_path / "checkpoints", tmp_path / "records.db"
    version(tiny_checkpoint, checkpoints / "first", 0.0)
    (checkpoints / "current").write_text("first\n")
    async with FakeVllm() as small, FakeVllm() as large:
        raw: dict[str, Any] = settings(
            [small],
            [large],
            checkpoints,
            admin={"port": 0, "key_sha256": key_digest(ADMIN)},
            auth={
                "keys": [
                    {"name": "team", "sha256": key_digest(TEAM)},
                    {"name": "greedy", "sha256": key_digest(GREEDY), "large_share": 0.1},
                ]
            },
            records={"url": f"sqlite:///{database}"},
        )
        path.write_text(yaml.safe_dump(raw, sort_keys=False))
        async with running(raw, path) as gateway:
            directory = tmp_path / "prometheus"
            directory.mkdir()
            with servers.prometheus(directory, {"gw": [gateway.admin]}, without_waits(tmp_path)) as prometheus:
                assert await asyncio.to_thread(prometheus.wait, "gateway_build_info")
                assert set(await ask(gateway, TEAM, 40)) == {200}
                assert await reload(gateway) == 200
                assert await fired(prometheus, {"nothing"}, 3.0) == set()

                path.write_text("version: 1\npools: none\n")
                assert await reload(gateway) == 422
                (checkpoints / "second").mkdir()
                (checkpoints / "second" / checkpoint.MANIFEST).write_text("{}")
                (checkpoints / "current").write_text("second\n")
                with contextlib.closing(sqlite3.connect(database)) as locker:
                    locker.execute("BEGIN EXCLUSIVE")
                    assert 429 in await ask(gateway, GREEDY, 15, "large")
                    await small.kill()
                    assert set(await ask(gateway, TEAM, 30)) == {200}  # by the other pool
                    large.script.status = 500
                    assert 500 in await ask(gateway, TEAM, 40)
                    await large.kill()
                    assert 503 in await ask(gateway, TEAM, 10)
                    names = await fired(prometheus, DURING)
                    locker.rollback()
                assert names == DURING
                gateway.stop.set()
                assert await fired(prometheus, AFTER) >= AFTER
