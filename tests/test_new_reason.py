"""A new decision reason is one row in estimator/records/reasons.py: both programs handle it, and nothing else changes.

Each case runs in a process of its own, because the table is read once, when it is imported.
"""

import asyncio
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TABLE = "depo_gateway.estimator.records.reasons"
LAST_ROW = "    BUDGET     = ("
REQUESTS = 20


def add_row(row: str) -> None:
    """Imports the table with one row more."""
    spec = importlib.util.find_spec(TABLE)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text()
    assert source.count(LAST_ROW) == 1
    table = sys.modules[TABLE] = types.ModuleType(TABLE)
    exec(compile(source.replace(LAST_ROW, f"    {row}\n{LAST_ROW}"), "reasons with one row more", "exec"), vars(table))


async def serve_and_read(checkpoint: Path, place: Path) -> dict[str, Any]:
    """What becomes of decisions for the new reason, in a gateway and in what training reads of its records."""
    from depo_gateway.estimator.records.reasons import Reason
    from depo_gateway.estimator.records.store import Store
    from depo_gateway.estimator.text import TextConfig
    from depo_gateway.gateway import routing
    from depo_gateway.training.evaluation import logged_traffic
    from tests.gateway.backend import FakeVllm
    from tests.gateway.conftest import running, settings

    by_threshold = routing.by_threshold

    def newly(*args: Any) -> routing.Decision:  # the rule that the new reason comes with
        return dataclasses.replace(by_threshold(*args), pool="small", reason=Reason("toy"))

    routing.by_threshold = newly
    url = f"sqlite:///{place / 'records.db'}"
    sections = {"records": {"url": url, "prompts": "full"}, "routing": {"target": {"large_share": 0.3}}}
    async with FakeVllm() as small, FakeVllm() as large:
        async with running(settings([small], [large], checkpoint, **sections)) as gateway:

            async def status() -> Any:
                async with gateway.session.get(f"{gateway.admin}/admin/status") as described:
                    return await described.json()

            before = await status()
            for index in range(REQUESTS):
                answer = await gateway.chat(f"hard theorem {index}")
            header, request_id = answer.headers["x-depo-reason"], answer.headers["x-request-id"]
            score = {"request_id": request_id, "score": 1.0}
            assert (await gateway.session.post(f"{gateway.url}/v1/feedback", json=score)).status == 200
            counted = await gateway.metric("gateway_decisions_total", pool="small", reason="toy")
            after = await status()
            assert await gateway.settles("gateway_records_total", REQUESTS, outcome="written")
    store = Store(url)
    records = [item.record for item in store.logged(REQUESTS)]
    store.close()
    traffic = logged_traffic.read_traffic(url, None, REQUESTS, ("small", "large"), TextConfig())
    return {
        "header": header,
        "counted": counted,
        "recorded": sorted({record.reason for record in records}),
        "record is free": all(record.free for record in records),
        "moved the shares": after["shares"] != before["shares"],
        "threshold": after["threshold"],
        "training weighs it": bool(traffic.free.all()),
        "not free": dict(traffic.not_free),
    }


def result(row: str, checkpoint: Path, place: Path) -> dict[str, Any]:
    place.mkdir()
    command = [sys.executable, __file__, row, str(checkpoint), str(place)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_both_programs_handle_a_new_reason(tiny_checkpoint: Path, tmp_path: Path) -> None:
    counts = result('TOY = ("toy", True, True, True, False)', tiny_checkpoint, tmp_path / "counts")
    ignored = result('TOY = ("toy", False, False, False, False)', tiny_checkpoint, tmp_path / "ignored")
    for found in (counts, ignored):
        assert (found["header"], found["counted"], found["recorded"]) == ("toy", REQUESTS, ["toy"])
    for effect in ("record is free", "moved the shares", "training weighs it"):
        assert (counts[effect], ignored[effect]) == (True, False), effect
    assert (counts["not free"], ignored["not free"]) == ({}, {"toy": REQUESTS})
    assert counts["threshold"] < ignored["threshold"]  # hard prompts' low confidences count among the others


if __name__ == "__main__":
    add_row(sys.argv[1])
    sys.stdout.write(json.dumps(asyncio.run(serve_and_read(Path(sys.argv[2]), Path(sys.argv[3])))))
