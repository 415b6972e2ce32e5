"""The script of `helm test`, as a process against a real gateway: what it accepts, and its errors."""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from depo_gateway.gateway.config import key_digest
from tests.gateway.backend import FakeVllm, Script
from tests.gateway.conftest import running, settings
from tests.helm.chart import CHART, Values, pod_of, rendered

SCRIPT = CHART / "files" / "completion.py"


async def run(url: str, key: str = "", pools: str = "small large") -> tuple[int, str]:
    """(exit status, what it said) of the pod's process, with the environment that the pod gives it."""
    environment = {"PATH": os.environ["PATH"], "GATEWAY": url, "POOLS": pools} | ({"API_KEY": key} if key else {})
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        SCRIPT.read_text(),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode()


async def against(checkpoint: Path, key: str = "", pools: str = "small large", **sections: Any) -> tuple[int, str]:
    async with FakeVllm("org/small-1b") as small, FakeVllm("org/large-9b") as large:
        async with running(settings([small], [large], checkpoint, **sections)) as gateway:
            return await run(gateway.url, key, pools)


async def test_one_completion_and_its_routing(tiny_checkpoint: Path) -> None:
    status, said = await against(tiny_checkpoint)
    assert status == 0, said
    pool, _, rest = said.partition(" answered (")
    assert pool in ("small", "large")
    assert rest.startswith(("confident", "unsure"))
    assert "Hello from here." in rest


async def test_a_pool_that_is_none_of_ours(tiny_checkpoint: Path) -> None:
    status, said = await against(tiny_checkpoint, pools="tiny huge")
    assert status == 1
    assert "x-depo-pool" in said


async def test_a_key(tiny_checkpoint: Path) -> None:
    auth = {"keys": [{"name": "test", "sha256": key_digest("sk-depo-test")}]}
    status, said = await against(tiny_checkpoint, "sk-depo-test", auth=auth)
    assert status == 0, said
    status, said = await against(tiny_checkpoint, auth=auth)
    assert status == 1
    assert "test.apiKey" in said


async def test_an_error_of_the_backend_fails(tiny_checkpoint: Path) -> None:
    broken = Script(status=500, body=b'{"error": {"message": "out of memory"}}')
    async with FakeVllm("org/small-1b", broken) as small, FakeVllm("org/large-9b", broken) as large:
        async with running(settings([small], [large], tiny_checkpoint)) as gateway:
            status, said = await run(gateway.url)
    assert status == 1
    assert "HTTP 500" in said
    assert "out of memory" in said


async def test_it_waits_for_backends_that_start(tiny_checkpoint: Path) -> None:
    asleep = Script(status=503, healthy=False)
    async with FakeVllm("org/small-1b", asleep) as small, FakeVllm("org/large-9b", asleep) as large:
        async with running(settings([small], [large], tiny_checkpoint)) as gateway:
            waiting = asyncio.create_task(run(gateway.url))
            await asyncio.sleep(1.5)
            assert not waiting.done()
            small.script = large.script = Script()
            status, said = await waiting
    assert status == 0, said


def test_the_pod_runs_this_script() -> None:
    (container,) = pod_of(rendered(Values()), "test").spec["containers"]
    assert container["command"] == ["python", "-c"]
    assert container["args"][0].strip() == SCRIPT.read_text().strip()
    assert {item["name"]: item["value"] for item in container["env"]} == {
        "GATEWAY": "http://depo-depo-gateway:80",
        "POOLS": "small large",
    }


def test_the_key_is_the_secrets() -> None:
    values = Values({"auth": {"existingSecret": "keys"}, "test": {"apiKey": {"existingSecret": "one", "key": "k"}}})
    (container,) = pod_of(rendered(values), "test").spec["containers"]
    (variable,) = [item for item in container["env"] if item["name"] == "API_KEY"]
    assert variable["valueFrom"] == {"secretKeyRef": {"name": "one", "key": "k"}}
