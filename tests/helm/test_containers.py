"""What the chart's containers run, run: their commands, files and variables, with the volumes as directories here."""

import asyncio
import contextlib
import os
import socket
import sys
import sysconfig
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from depo_gateway.gateway.config import key_digest
from tests.gateway.backend import FakeVllm
from tests.helm.chart import Manifest, Pod, Values, named, pod_of, rendered

KEY = "sk-depo-test"
SECRETS = {
    "keys": {"keys.yaml": f"- {{name: test, sha256: {key_digest(KEY)}}}\n"},
    "vllm": {"api-key": "token-of-vllm"},
    "test": {"api-key": KEY},
}


@dataclass(frozen=True)
class Node:
    """A directory that stands for a node's: what claims hold stays, what a pod mounts is beside it."""

    root: Path

    def here(self, text: str, pod: Pod) -> str:
        """A command or a file, with the places that volumes are mounted at as they are here."""
        for mount in pod.main.get("volumeMounts", []):
            place = self.volume(pod, mount["name"])
            if mount["mountPath"] in text and place is not None:
                text = text.replace(mount["mountPath"], str(place))
        return text

    def volume(self, pod: Pod, name: str) -> Path | None:
        (found,) = [item for item in pod.spec["volumes"] if item["name"] == name]
        if "emptyDir" in found:
            return None
        claim = found.get("persistentVolumeClaim", {}).get("claimName")
        return self.root / (claim or f"{pod.component}-{name}")

    def mount(self, pod: Pod, manifests: list[Manifest]) -> None:
        """Makes the volumes, and writes what comes from ConfigMaps and Secrets."""
        for found in pod.spec["volumes"]:
            place = self.volume(pod, found["name"])
            if place is None:
                continue
            place.mkdir(exist_ok=True)
            for source in found.get("projected", {}).get("sources", [found]):
                for path, text in files(source, manifests).items():
                    (place / path).parent.mkdir(exist_ok=True)
                    (place / path).write_text(self.here(text, pod))

    def environment(self, container: Manifest) -> dict[str, str]:
        values = {"PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}", "HOME": str(self.root)}
        for item in container.get("env", []):
            if "value" in item:
                values[item["name"]] = item["value"]
            elif "secretKeyRef" in item["valueFrom"]:
                wanted = item["valueFrom"]["secretKeyRef"]
                values[item["name"]] = SECRETS[wanted["name"]][wanted["key"]]
            else:
                assert item["valueFrom"] == {"resourceFieldRef": {"resource": "limits.cpu"}}
                values[item["name"]] = "1"
        return values

    def start(self, pod: Pod, container: Manifest, **over: str) -> Any:
        command = [self.here(part, pod) for part in (*container["command"], *container.get("args", []))]
        if command[0] == "python":
            command[0] = sys.executable
        return asyncio.create_subprocess_exec(
            *command,
            env=self.environment(container) | over,
            cwd=self.root,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )


def files(source: Manifest, manifests: list[Manifest]) -> dict[str, str]:
    """The files of a volume's source, by their path in it."""
    if "configMap" in source:
        return named(manifests, "ConfigMap", source["configMap"]["name"])["data"]
    if "secret" in source:
        return {item["path"]: SECRETS[source["secret"]["name"]][item["key"]] for item in source["secret"]["items"]}
    return {}


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(socket.socket()) for _ in range(count)]
        for item in made:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in made]


async def until_answered(url: str, process: asyncio.subprocess.Process, seconds: float = 60.0) -> None:
    async with aiohttp.ClientSession() as session, asyncio.timeout(seconds):
        while True:
            assert process.returncode is None, await process.stdout.read()  # type: ignore[union-attr]
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(url) as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.1)


async def ended(process: asyncio.subprocess.Process) -> tuple[int | None, str]:
    """(exit status after SIGTERM, all that it said)."""
    process.terminate()
    said, _ = await process.communicate()
    return process.returncode, said.decode()


def probe(container: Manifest, kind: str) -> str:
    """The address that a probe asks, on loopback."""
    asked = container[kind]["httpGet"]
    (port,) = [item["containerPort"] for item in container["ports"] if item["name"] == asked["port"]]
    return f"http://127.0.0.1:{port}{asked['path']}"


@contextlib.asynccontextmanager
async def installed(more: Mapping[str, Any]) -> AsyncIterator[tuple[list[Manifest], FakeVllm, FakeVllm]]:
    """The chart before two vLLM servers that are there already, with keys and a vLLM that wants a token."""
    serving, admin, learner = free_ports(3)
    async with FakeVllm("org/small-1b") as small, FakeVllm("org/large-9b") as large:
        values = Values(
            {
                "config": {"listen": {"port": serving}, "admin": {"port": admin}, "timeouts": {"drain_s": 5}},
                "auth": {"existingSecret": "keys"},
                "test": {"apiKey": {"existingSecret": "test"}},
                "backends": {
                    "small": {"deploy": False, "url": small.url, "model": "org/small-1b"},
                    "large": {"deploy": False, "url": large.url, "model": "org/large-9b"},
                },
                "backendDefaults": {"apiKey": {"existingSecret": "vllm"}},
                "learner": {"config": {"listen": {"port": learner}}},
            }
        ).over(more)
        yield rendered(values), small, large


async def test_the_gateway_from_an_empty_volume_to_a_routed_answer(tmp_path: Path) -> None:
    node = Node(tmp_path)
    async with installed({}) as (manifests, small, large):
        pod = pod_of(manifests, "gateway")
        node.mount(pod, manifests)
        (seed,) = pod.spec["initContainers"]
        process = await node.start(pod, seed)
        said, _ = await process.communicate()
        assert process.returncode == 0, said
        assert (tmp_path / "depo-depo-gateway-checkpoints" / "current").exists()
        process = await node.start(pod, pod.main)
        await until_answered(probe(pod.main, "startupProbe"), process)
        await until_answered(probe(pod.main, "readinessProbe"), process)

        test = pod_of(manifests, "test")
        address = probe(pod.main, "livenessProbe").removesuffix("/livez")
        asking = await node.start(test, test.main, GATEWAY=address)
        answered, _ = await asking.communicate()
        status, said = await ended(process)
        assert asking.returncode == 0, answered.decode() + said
        assert b" answered (" in answered
        assert status == 0, said
    assert (tmp_path / "depo-depo-gateway-records" / "records.db").exists()
    assert {item.headers.get("authorization") for item in (*small.seen, *large.seen)} == {"Bearer token-of-vllm"}


async def test_the_learner_beside_it(tmp_path: Path) -> None:
    node = Node(tmp_path)
    async with installed({}) as (manifests, *_):
        for component in ("gateway", "learner"):
            node.mount(pod_of(manifests, component), manifests)
        gateway, learner = pod_of(manifests, "gateway"), pod_of(manifests, "learner")
        process = await node.start(gateway, gateway.spec["initContainers"][0])
        assert await process.wait() == 0
        process = await node.start(learner, learner.main)
        await until_answered(probe(learner.main, "startupProbe"), process)
        status, said = await ended(process)
    assert status == 0, said
    checkpoints = tmp_path / "depo-depo-gateway-checkpoints"
    assert (checkpoints / ".learner.lock").exists()
    assert (checkpoints / "current").read_text().strip() == "builtin"


async def test_a_cron_job_without_records_says_so(tmp_path: Path) -> None:
    node = Node(tmp_path)
    async with installed({"learner": {"kind": "CronJob"}}) as (manifests, *_):
        pod = pod_of(manifests, "learner")
        node.mount(pod, manifests)
        process = await node.start(pod, pod.main)
        said, _ = await process.communicate()
    assert process.returncode == 2, said
    assert b"there are no records yet" in said
