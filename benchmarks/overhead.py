"""Benchmark of the gateway's overhead: the same requests sent directly, to a pinned pool, and routed, in one run.

    python benchmarks/overhead.py [--rounds 3] [--seconds 1.0] [--estimator DIR] [--out overhead.md]

A backend that answers immediately, the gateway and the clients are separate processes on one machine and share its
cores, so throughput is that of the whole setup. Variants alternate in every round, and the table shows medians over the
rounds. `routed` sends new prompts, `routed, cached` always the same prompt, `cached, recorded` the same through another
gateway that writes a record of each request, with its text, to SQLite.
"""

import argparse
import asyncio
import contextlib
import itertools
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httptools
import orjson
import uvloop
import yaml
from tqdm import tqdm

CONCURRENCIES = (1, 16, 64)
RECORDED = "cached, recorded"
VARIANTS = ("direct", "pinned", "routed", "routed, cached", RECORDED)
MODELS = {"direct": "small", "pinned": "small", "routed": "auto", "routed, cached": "auto", RECORDED: "auto"}
STREAM_EVENTS = 16
PROMPT = (
    "A train leaves the station at %d minutes past the hour and travels at sixty kilometres an hour; another leaves "
    "twenty minutes later at ninety. When and where do they meet, and what changes if the second one stops for a while?"
)


# The backend: no asyncio streams, no tasks, one write per message.


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _event(index: int) -> bytes:
    choice = {"index": 0, "delta": {"content": f" word{index}"}, "logprobs": None, "finish_reason": None}
    event = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return _chunk(b"data: " + orjson.dumps(event) + b"\n\n")


_USAGE = {"prompt_tokens": 57, "completion_tokens": 16, "total_tokens": 73}
_WHOLE = orjson.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "word " * 16}, "finish_reason": "stop"}],
        "usage": _USAGE,
    }
)
_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(_WHOLE), _WHOLE)
_STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_EVENTS = [_event(index) for index in range(STREAM_EVENTS)]
_USAGE_EVENT = _chunk(b"data: " + orjson.dumps({"id": "chatcmpl-1", "choices": [], "usage": _USAGE}) + b"\n\n")
_END = _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class Backend(asyncio.Protocol):
    """Answers as a whole, or streams event by event, each in its own iteration of the loop."""

    def connection_made(self, transport: Any) -> None:
        self._transport, self._body = transport, b""
        self._parser = httptools.HttpRequestParser(self)
        self._loop = asyncio.get_running_loop()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        body, self._body = self._body, b""
        if self._parser.get_method() == b"GET":
            self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        elif b'"stream":true' in body:
            usage = _USAGE_EVENT if b"include_usage" in body else b""
            pieces = iter((_STREAM_HEAD + _EVENTS[0], *_EVENTS[1:], usage + _END))
            self._next(pieces)
        else:
            self._transport.write(_ANSWER)

    def _next(self, pieces: Iterator[bytes]) -> None:
        piece = next(pieces, None)
        if piece is not None:
            self._transport.write(piece)
            self._loop.call_soon(self._next, pieces)


async def serve_backend() -> None:
    server = await asyncio.get_running_loop().create_server(Backend, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


# The clients: each sends its next request when an answer is complete.


@dataclass
class Sample:
    """One round of one variant: seconds of each request, to the end and to the first byte of the body."""

    elapsed_seconds: float = 0.0
    whole_seconds: list[float] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)

    def row(self) -> tuple[float, float, float, float]:
        """Requests per second, then milliseconds: p50, p99, p50 to the first byte."""
        whole = sorted(self.whole_seconds)
        p99 = whole[min(len(whole) - 1, int(len(whole) * 0.99))]
        first = statistics.median(self.first_seconds)
        return len(whole) / self.elapsed_seconds, statistics.median(whole) * 1e3, p99 * 1e3, first * 1e3


class Client(asyncio.Protocol):
    def __init__(self, bodies: Iterator[bytes], until: float, sample: Sample, done: "asyncio.Future[None]") -> None:
        self._bodies, self._until, self._sample, self._done = bodies, until, sample, done

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        body = next(self._bodies)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: "
        self._parser = httptools.HttpResponseParser(self)
        self._first = 0.0
        self._asked = time.perf_counter()
        self._transport.write(b"%b%d\r\n\r\n%b" % (head, len(body), body))

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_headers_complete(self) -> None:
        if self._parser.get_status_code() != 200:
            self._fail(f"status {self._parser.get_status_code()}")

    def on_body(self, _: bytes) -> None:
        if not self._first:
            self._first = time.perf_counter()

    def on_message_complete(self) -> None:
        now = time.perf_counter()
        self._sample.whole_seconds.append(now - self._asked)
        self._sample.first_seconds.append(self._first - self._asked)
        if now < self._until:
            self._ask()
        elif not self._done.done():
            self._done.set_result(None)
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(f"the connection was lost: {error}")

    def _fail(self, message: str) -> None:
        if not self._done.done():
            self._done.set_exception(ConnectionError(message))


async def measure(port: int, bodies: Iterator[bytes], concurrency: int, seconds: float) -> Sample:
    loop, sample = asyncio.get_running_loop(), Sample()
    started = time.perf_counter()
    futures: list[asyncio.Future[None]] = [loop.create_future() for _ in range(concurrency)]
    for future in futures:
        client = Client(bodies, started + seconds, sample, future)
        await loop.create_connection(lambda made=client: made, "127.0.0.1", port)  # type: ignore[misc]
    await asyncio.gather(*futures)
    sample.elapsed_seconds = time.perf_counter() - started
    return sample


def bodies(variant: str, stream: bool, counter: Iterator[int]) -> Iterator[bytes]:
    while True:
        text = PROMPT % (next(counter) if variant == "routed" else 7)
        fields = {"model": MODELS[variant], "messages": [{"role": "user", "content": text}], "temperature": 0.7}
        yield orjson.dumps({**fields, "stream": stream})


@contextlib.contextmanager
def process(*command: str, **options: Any) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen([sys.executable, *command], text=True, **options) as started:
        try:
            yield started
        finally:
            started.terminate()
            started.wait(30)


@contextlib.contextmanager
def backend() -> Iterator[int]:
    with process(__file__, "--backend", stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        yield int(started.stdout.readline())


@contextlib.contextmanager
def gateway(backend_port: int, options: argparse.Namespace, records: bool) -> Iterator[tuple[int, int, int]]:
    """Runs a gateway; yields its port, its admin port and its process id."""
    url = f"http://127.0.0.1:{backend_port}"
    config = {
        "version": 1,
        "listen": {"port": 0},
        "admin": {"port": 0},
        "pools": {
            "small": {"model": "org/small", "cost": 1, "backends": [{"url": url}]},
            "large": {"model": "org/large", "cost": 5, "backends": [{"url": url}]},
        },
        "estimator": {"path": options.estimator, "deadline_ms": options.deadline_ms},
    }
    if records:
        config["records"] = {"prompts": options.records, "hash_key_env": "OVERHEAD_HASH_KEY"}  # beside the config
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "gateway.yaml"
        place.write_text(yaml.safe_dump(config, sort_keys=False))
        environment = {**os.environ, "OVERHEAD_HASH_KEY": "a-key"}
        command = ("-m", "depo_gateway.gateway", "serve", "--config", str(place))
        with process(*command, stderr=subprocess.PIPE, env=environment) as started:
            assert started.stderr is not None
            last_line = ""
            for line in started.stderr:
                last_line = line
                found = re.search(r"serving http://[\d.]+:(\d+)/v1, metrics at http://[\d.]+:(\d+)/", line)
                if found:
                    yield int(found[1]), int(found[2]), started.pid
                    return
            raise ValueError(f"the gateway did not start: {last_line.strip()}")


def memory(process: int) -> tuple[int, int]:
    """Resident memory in MB: current and peak."""
    status = Path(f"/proc/{process}/status").read_text()
    now, most = (re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE) for name in ("VmRSS", "VmHWM"))
    assert now is not None
    assert most is not None
    return int(now[1]) * 1024 // 10**6, int(most[1]) * 1024 // 10**6


def metrics(admin_port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{admin_port}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def outcomes(admin_port: int) -> dict[str, float]:
    """gateway_estimator_outcomes_total by outcome."""
    found = re.findall(r'^gateway_estimator_outcomes_total\{outcome="(\w+)"\} (\S+)', metrics(admin_port), re.MULTILINE)
    return {name: float(value) for name, value in found}


def wait_until_written(admin_port: int) -> None:
    """Waits until the records are written, so that they do not slow down other variants."""
    while not re.search(r"^gateway_records_waiting 0\.0$", metrics(admin_port), re.MULTILINE):
        time.sleep(0.05)


Cell = tuple[bool, int, str]  # stream, concurrency, variant


async def run(options: argparse.Namespace) -> tuple[dict[Cell, list[Sample]], dict[str, float], str]:
    """The samples, how prompts were scored, and a sentence on memory."""
    counter = itertools.count()
    samples: dict[Cell, list[Sample]] = {}
    cells = list(itertools.product((False, True), CONCURRENCIES, VARIANTS))
    with (
        backend() as backend_port,
        gateway(backend_port, options, False) as (port, admin_port, plain),
        gateway(backend_port, options, True) as (recording_port, recording_admin_port, recording),
    ):
        ports = dict.fromkeys(VARIANTS, port) | {"direct": backend_port, RECORDED: recording_port}
        start, _ = memory(plain)
        for stream, variant in itertools.product((False, True), VARIANTS):  # warm up
            await measure(ports[variant], bodies(variant, stream, counter), 8, 0.2)
        before = outcomes(admin_port)
        total = len(cells) * options.rounds
        with tqdm(total=total, disable=not sys.stderr.isatty(), unit="cell") as progress:
            for number in range(options.rounds):
                order = cells if number % 2 == 0 else cells[::-1]
                for cell in order:
                    stream, concurrency, variant = cell
                    made = bodies(variant, stream, counter)
                    sample = await measure(ports[variant], made, concurrency, options.seconds)
                    samples.setdefault(cell, []).append(sample)
                    if variant == RECORDED:
                        wait_until_written(recording_admin_port)
                    progress.update()
        after = outcomes(admin_port)
        most, recorded = memory(plain)[1], memory(recording)[1]
        used = f"Memory of a gateway: {start} MB at start, {most} MB at most, {recorded} MB at most with records."
    return samples, {name: value - before.get(name, 0.0) for name, value in after.items()}, used


def report(samples: dict[Cell, list[Sample]], scored: dict[str, float], used: str, options: argparse.Namespace) -> str:
    lines = [
        "# Overhead of the gateway",
        "",
        f"`python benchmarks/overhead.py --rounds {options.rounds} --seconds {options.seconds:g} --out FILE`: a "
        "scripted backend, requested directly, through the gateway with a pinned pool, routed with new prompts, "
        f"routed with cached scores, and the latter with records (prompts: {options.records}).",
        "",
        "| answers | clients | variant | requests/s | of direct | p50 ms | added | p99 ms | first byte p50 | added |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (stream, concurrency, variant), rounds in samples.items():
        rate, p50, p99, first = medians(rounds)
        direct_rate, direct_p50, _, direct_first = medians(samples[stream, concurrency, "direct"])
        lines.append(
            f"| {f'{STREAM_EVENTS} events' if stream else 'whole'} | {concurrency} | {variant} | {rate:,.0f} | "
            f"{rate / direct_rate:.2f} | {p50:.2f} | {p50 - direct_p50:+.2f} | {p99:.2f} | {first:.2f} | "
            f"{first - direct_first:+.2f} |"
        )
    total = sum(scored.values()) or 1.0
    shares = ", ".join(f"{name} {value / total:.0%}" for name, value in sorted(scored.items()))
    lines += [
        "",
        f"Medians over {options.rounds} rounds of {options.seconds:g} s per cell. Estimator {options.estimator}, "
        f"deadline {options.deadline_ms:g} ms; prompts scored by the gateway without records: {shares}.",
        used,
        f"Machine: {cpu()}, {len(os.sched_getaffinity(0))} cores shared by backend, gateway and clients; "
        f"load average {os.getloadavg()[0]:.1f} at the end; Python {platform.python_version()}.",
    ]
    return "\n".join(lines) + "\n"


def medians(rounds: Sequence[Sample]) -> tuple[float, float, float, float]:
    columns = zip(*(item.row() for item in rounds), strict=True)
    rate, p50, p99, first = (statistics.median(column) for column in columns)
    return rate, p50, p99, first


def cpu() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(description="Compares direct, pinned and routed requests in one run.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="duration of each cell in each round")
    parser.add_argument("--estimator", default="builtin", help="a checkpoint's directory (default: the shipped one)")
    parser.add_argument("--deadline-ms", type=float, default=50.0)
    parser.add_argument(
        "--records",
        choices=("none", "hash", "full"),
        default="full",
        help="records.prompts of the last variant",
    )
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--backend", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.backend:
        with contextlib.suppress(KeyboardInterrupt):
            uvloop.run(serve_backend())
        return 0
    if options.estimator != "builtin":
        options.estimator = str(Path(options.estimator).resolve())
    try:
        samples, scored, used = uvloop.run(run(options))
    except ValueError as error:
        print(f"overhead: {error}", file=sys.stderr)
        return 2
    table = report(dict(sorted(samples.items(), key=lambda item: _position(item[0]))), scored, used, options)
    print(table, end="")
    if options.out is not None:
        options.out.write_text(table)
    return 0


def _position(cell: Cell) -> tuple[bool, int, int]:
    return cell[0], cell[1], VARIANTS.index(cell[2])


if __name__ == "__main__":
    sys.exit(main())
