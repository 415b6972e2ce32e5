"""The demo command as a stranger runs it: on the embedded models, and on two servers of the user's own."""

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from depo_gateway.gateway.demo.report import Outcome, interval, longest_first, summary
from tests.gateway.backend import FakeVllm

ROOT = Path(__file__).parents[3]
COMMAND = [sys.executable, "-m", "depo_gateway.gateway", "demo", "--port", "0", "--admin-port", "0"]


async def demo(*arguments: str) -> tuple[int | None, str, str]:
    """Runs the command to its end."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND, *arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, errors = await asyncio.wait_for(process.communicate(), 120)
    return process.returncode, out.decode(), errors.decode()


async def test_the_embedded_demo_routes_real_models_and_ends() -> None:
    pytest.importorskip("xllamacpp", reason="the demo's backends need the extra 'demo'")
    code, out, errors = await demo("--once", "--queries", "40")
    assert code == 0, errors
    rows = [line for line in out.splitlines() if line.endswith(("  right", "  wrong"))]
    assert len(rows) == 16
    assert {row.split()[2] for row in rows} == {"small", "large"}
    assert "40 queries" in out
    for name in ("all small", "all large", "random, same share", "length, same share", "routed"):
        assert f"\n{name} " in out
    assert "curl" not in out  # nobody would answer it


async def test_it_stays_up_until_it_is_stopped_and_leaves_no_server_behind() -> None:
    pytest.importorskip("xllamacpp", reason="the demo's backends need the extra 'demo'")
    process = await asyncio.create_subprocess_exec(*COMMAND, "--queries", "4", cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    text = ""
    while "stays up until" not in text:
        line = await asyncio.wait_for(process.stdout.readline(), 60)
        assert line, text
        text += line.decode()
    assert "curl -si http://127.0.0.1:" in text
    servers = [
        url.rstrip(",\n") for line in text.splitlines() if "ready after" in line for url in line.split() if "://" in url
    ]
    assert len(servers) == 2
    process.send_signal(signal.SIGINT)
    await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0
    for url in servers:
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))


async def test_two_servers_of_ones_own() -> None:
    async with FakeVllm("tiny-1b") as small, FakeVllm("big-9b") as large:
        code, out, errors = await demo("--once", "--backends", f"small={small.url}/v1", f"large={large.url}")
    assert code == 0, errors
    assert "accuracy" not in out  # nobody knows what is right
    assert "20 queries" in out
    assert {request.json["model"] for request in small.seen} == {"tiny-1b"}
    assert {request.json["model"] for request in large.seen} == {"big-9b"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--backends", "http://x"), "is not POOL=URL"),
        (("--backends", "small=http://127.0.0.1:9"), "two servers: small=URL large=URL"),
        (("--backends", "small=http://127.0.0.1:9", "large=http://127.0.0.1:9"), "GET /v1/models gave no model"),
        (("--queries", "0"), "--queries is 0"),
    ],
)
async def test_mistakes_are_one_line(arguments: tuple[str, ...], said: str) -> None:
    code, _, errors = await demo(*arguments)
    assert code == 2
    assert said in errors
    assert len(errors.strip().splitlines()) == 1, errors


def outcome(length: int, pool: str, small: bool, large: bool) -> Outcome:
    return Outcome(length, pool, {"small": small, "large": large}, {"small": 1.0, "large": 4.0})


def test_the_table_is_right_by_hand() -> None:
    outcomes = [
        outcome(3, "large", False, True),  # routing finds the short one that is hard
        outcome(9, "small", True, True),
        outcome(8, "small", True, True),
        outcome(2, "small", True, False),
    ]
    lines = {line[:18].strip(): line.split() for line in summary(outcomes).splitlines()}
    assert lines["all small"][-3:] == ["75.0%", "0%", "25%"]
    assert lines["all large"][-3:] == ["75.0%", "100%", "100%"]
    assert lines["random, same share"][-3:] == ["75.0%", "25%", "44%"]
    assert lines["length, same share"][-3:] == ["75.0%", "25%", "44%"]  # the longest is easy for both
    assert lines["routed"][-3:] == ["100.0%", "25%", "44%"]


def test_unjudged_answers_have_no_accuracy() -> None:
    unknown = Outcome(3, "small", {"small": None, "large": None}, {"small": 1.0, "large": 4.0})
    assert "accuracy" not in summary([unknown])
    assert "%" in summary([unknown])


def test_length_takes_the_longest() -> None:
    assert longest_first([outcome(n, "small", True, True) for n in (5, 1, 9, 7)], 2) == {2, 3}


def test_the_interval_holds_the_mean_and_shrinks() -> None:
    low, high = interval([0.0, 1.0] * 20)
    wide = high - low
    assert low < 0.5 < high
    low, high = interval([0.0, 1.0] * 500)
    assert 0 < high - low < wide / 3
