"""An alert from a real gateway through Prometheus and Alertmanager to a webhook, and which receiver gets which."""

import asyncio
import contextlib
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from aiohttp import web

from depo_gateway.gateway.config import key_digest
from tests.gateway.backend import FakeVllm
from tests.gateway.conftest import running, settings
from tests.monitoring import servers

EXAMPLE = Path(__file__).parents[2] / "examples/alertmanager.yaml"
ADMIN_KEY = "sk-depo-admin"


def example(address: str) -> dict[str, Any]:
    """examples/alertmanager.yaml with its receivers at `address`, and without its waits."""
    raw: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text())
    for receiver in raw["receivers"]:
        for hook in receiver["webhook_configs"]:
            hook["url"] = f"{address}/{receiver['name']}"
    for route in (raw["route"], *raw["route"]["routes"]):
        route |= {"group_wait": "0s", "group_interval": "1s"}
    return raw


@contextlib.asynccontextmanager
async def webhook() -> AsyncIterator[tuple[str, "asyncio.Queue[dict[str, Any]]"]]:
    """The address of a server that takes what is posted to it, and what it took."""
    took: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def take(request: web.Request) -> web.Response:
        took.put_nowait({"path": request.path, **await request.json()})
        return web.Response()

    application = web.Application()
    application.router.add_post("/{receiver}", take)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", took
    finally:
        await runner.cleanup()


async def test_a_refused_reload_reaches_the_webhook(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    admin = {"port": 0, "key_sha256": key_digest(ADMIN_KEY)}
    async with FakeVllm() as small, FakeVllm() as large, webhook() as (address, took):
        raw = settings([small], [large], tiny_checkpoint, admin=admin)
        async with running(raw, path) as gateway:
            replicas = [gateway.admin, gateway.admin.replace("127.0.0.1", "localhost")]  # one, scraped as two
            with (
                servers.alertmanager(tmp_path / "alertmanager", example(address)) as manager,
                servers.prometheus(tmp_path / "prometheus", {"gw": replicas}, alertmanager=manager.url) as seen,
            ):
                for _ in range(3):
                    assert (await gateway.chat(stream=True)).status == 200
                before = 'sum(gateway_config_reloads_total{result="refused"} == 0) by (instance)'
                assert await asyncio.to_thread(seen.wait, f"count({before}) == 2"), seen.targets()
                path.write_text("version: 1\npools: none\n")
                headers = {"authorization": f"Bearer {ADMIN_KEY}"}
                async with gateway.session.post(f"{gateway.admin}/admin/reload", headers=headers) as answer:
                    assert answer.status == 422
                async with asyncio.timeout(45):
                    told = await took.get()
                assert [alert["labels"]["alertname"] for alert in seen.alerts()] == ["DepoConfigReloadFailed"]
                groups = seen.get("/api/v1/rules")["data"]["groups"]
                failed = {rule["name"]: rule["lastError"] for group in groups for rule in group["rules"]
                          if rule["health"] != "ok"}  # fmt: skip
                assert not failed
    assert (told["path"], told["status"]) == ("/tickets", "firing")
    (alert,) = told["alerts"]
    assert alert["labels"] == {
        "alertname": "DepoConfigReloadFailed", "severity": "ticket", "namespace": "depo", "job": "gw",
    }  # fmt: skip
    assert alert["annotations"]["summary"] == "A reload of gw was refused; the old config stays in force"
    assert alert["annotations"]["runbook"] == "docs/runbooks/DepoConfigReloadFailed.md"


async def test_consequences_of_an_outage_are_not_sent_with_it(tmp_path: Path) -> None:
    outage = {"alertname": "DepoNoUsableBackend", "severity": "page", "namespace": "depo", "job": "gw"}
    follows = outage | {"alertname": "DepoErrorRateHigh"}
    elsewhere = follows | {"job": "another"}
    async with webhook() as (address, took), aiohttp.ClientSession() as session:
        with servers.alertmanager(tmp_path, example(address)) as manager:
            for alert in (outage, follows, elsewhere):
                posted = await session.post(f"{manager.url}/api/v2/alerts", json=[{"labels": alert}])
                assert posted.status == 200
                await asyncio.sleep(0.3)
            told: list[dict[str, str]] = []
            until = time.monotonic() + 20
            while elsewhere not in told and time.monotonic() < until:
                async with asyncio.timeout(20):
                    message = await took.get()
                assert message["path"] == "/pager"
                told += [alert["labels"] for alert in message["alerts"]]
            states = {one["labels"]["alertname"] + one["labels"]["job"]: one["status"]["state"]
                      for one in manager.get("/api/v2/alerts")}  # fmt: skip
    assert outage in told
    assert elsewhere in told
    assert follows not in told
    assert states["DepoErrorRateHighgw"] == "suppressed"


@pytest.mark.parametrize(("severity", "receiver"), [("page", "pager"), ("ticket", "tickets")])
def test_the_example_tells_pages_and_tickets_apart(severity: str, receiver: str) -> None:
    amtool = servers.program("amtool")
    subprocess.run([amtool, "check-config", EXAMPLE], check=True, capture_output=True)
    command = [amtool, "config", "routes", "test", f"--config.file={EXAMPLE}", f"severity={severity}"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() == [receiver]


def test_the_example_names_only_alerts_that_there_are() -> None:
    alerts = (Path(__file__).parents[2] / "helm/rules/alerts.yaml").read_text()
    rules = yaml.safe_load(EXAMPLE.read_text())["inhibit_rules"]
    matchers = [matcher for rule in rules for side in ("source_matchers", "target_matchers") for matcher in rule[side]]
    names = {name for matcher in matchers for name in matcher.split('"')[1].split("|")}
    assert len(names) > 5
    assert all(f"- alert: {name}\n" in alerts for name in names)
