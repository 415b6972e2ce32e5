"""The commands that docs/operations/kubernetes.md and a runbook give for reloading every replica do that."""

import asyncio
import os
import sys
from pathlib import Path

import yaml

from depo_gateway.gateway import config
from tests.gateway.backend import FakeVllm
from tests.gateway.conftest import running, settings

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs/operations/kubernetes.md", ROOT / "docs/runbooks/DepoConfigReloadFailed.md"]
KEY = "sk-depo-admin"
# Stands for kubectl: two pods, whose container is this machine.
KUBECTL = """#!/bin/sh
case "$*" in
  "-n depo get pods -l app.kubernetes.io/component=gateway -o name") echo pod/one; echo pod/two;;
  "-n depo exec -i pod/one -- "*|"-n depo exec -i pod/two -- "*) shift 6; exec "$@";;
  *) echo "unknown: $*" >&2; exit 1;;
esac
"""


def command(page: Path) -> str:
    """From the loop over the pods to its end."""
    _, _, after = page.read_text().partition("for pod in ")
    return "for pod in " + after.partition("\ndone\n")[0] + "\ndone\n"


def test_both_pages_give_the_same_commands() -> None:
    assert command(PAGES[0]) == command(PAGES[1])
    check = "kubectl -n depo exec deployment/depo-depo-gateway -- depo-gateway check /etc/depo-gateway/gateway.yaml\n"
    assert all(check in page.read_text() for page in PAGES)


async def test_every_replica_is_reloaded_and_its_answer_printed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "kubectl").write_text(KUBECTL)
    (tmp_path / "kubectl").chmod(0o755)
    (tmp_path / "python").symlink_to(sys.executable)
    file = tmp_path / "gateway.yaml"
    async with FakeVllm() as small, FakeVllm() as large:
        admin = {"port": 0, "key_sha256": config.key_digest(KEY)}
        raw = settings([small], [large], tiny_checkpoint, admin=admin)
        file.write_text(yaml.safe_dump(raw, sort_keys=False))
        async with running(raw, file) as gateway:
            port = gateway.admin.rpartition(":")[2]

            async def run(key: str) -> list[str]:
                process = await asyncio.create_subprocess_exec(
                    "sh",
                    "-c",
                    command(PAGES[0]).replace("9000", port),
                    env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "ADMIN_KEY": key},
                    stdout=asyncio.subprocess.PIPE,
                )
                told, _ = await process.communicate()
                return told.decode().splitlines()

            first, second = await run(KEY)
            assert first == second
            assert first.startswith('200 {"status":"reloaded"')
            assert await gateway.metric("gateway_config_reloads_total", result="applied") == 2
            assert all(line.startswith("401 ") for line in await run("sk-depo-wrong"))
            file.write_text(yaml.safe_dump({**raw, "routin": {}}, sort_keys=False))
            refused = await run(KEY)
            assert len(refused) == 2
            assert all(line.startswith("422 ") and "did you mean 'routing'?" in line for line in refused)
