"""The embedded demo: two small real language models, the gateway, and queries that show where each one goes and why.

What is printed is measured while it runs. Every query is routed, and then asked of the pool that was not chosen, so
that all rows of the table compare the same answers.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import orjson
from tqdm import tqdm

from depo_gateway.gateway import config, server
from depo_gateway.gateway.config import Config
from depo_gateway.gateway.demo import report
from depo_gateway.gateway.demo.report import Outcome

DATA = Path(__file__).parent / "data"
START_SECONDS = 90.0
SHOWN = 16  # queries answered one by one, for people to watch
CONCURRENCY = 8
COSTS = {"small": 1.0, "large": 5.0}
EMBEDDED_THRESHOLD = 0.85
MAX_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Question:
    text: str
    answer: str | None  # None: nobody knows, right or wrong is left out


@dataclass(frozen=True, slots=True)
class DemoReply:
    """One answer as a client sees it."""

    pool: str
    reason: str
    confidence: float | None
    text: str
    tokens: int


def run(options: argparse.Namespace) -> int:
    """The demo command.

    Raises:
        ValueError: the user's mistake, in one sentence.
    """
    import uvloop

    for flag, port in (("--port", options.port), ("--admin-port", options.admin_port)):
        if not 0 <= port <= 65535:
            raise ValueError(f"{flag} is {port} and must be between 0 and 65535")
        server.bind("127.0.0.1", port, flag).close()
    if options.backends:
        return uvloop.run(_with_own_backends(options))
    questions = _questions(DATA / "queries.jsonl", options.queries)
    with contextlib.ExitStack() as stack:
        print("Starting two llama.cpp servers on two small Llama models trained for this demo ...", flush=True)
        began = time.monotonic()
        urls = {name: stack.enter_context(_backend(name)) for name in COSTS}
        print(f"  ready after {time.monotonic() - began:.1f} s: " + ", ".join(f"{n} at {u}" for n, u in urls.items()))
        settings = _config(urls, {name: name for name in urls}, options, str(DATA / "estimator"), EMBEDDED_THRESHOLD)
        return uvloop.run(_serve_and_ask(settings, questions, options))


async def _with_own_backends(options: argparse.Namespace) -> int:
    urls = {}
    for item in options.backends:
        name, equals, url = item.partition("=")
        if not equals or not url:
            raise ValueError(f"--backends {item!r} is not POOL=URL, as in small=http://localhost:8001")
        urls[name] = url.rstrip("/").removesuffix("/v1")
    if list(urls) != list(COSTS):
        raise ValueError("--backends wants two servers: small=URL large=URL")
    models = {name: await _served_model(name, url) for name, url in urls.items()}
    if models["small"] == models["large"]:
        raise ValueError(f"both servers serve the model {models['small']!r}; routing between them saves nothing")
    settings = _config(urls, models, options, "builtin", config.Routing().threshold)
    return await _serve_and_ask(settings, _questions(DATA / "general.jsonl", options.queries), options)


def _config(
    urls: dict[str, str], models: dict[str, str], options: argparse.Namespace, estimator: str, threshold: float
) -> Config:
    pools = {
        name: {"model": models[name], "cost": COSTS[name], "backends": [{"url": url}]} for name, url in urls.items()
    }
    return config.parse_config(
        {
            "version": 1,
            "listen": {"port": options.port},
            "admin": {"port": options.admin_port},
            "pools": pools,
            "routing": {"threshold": threshold, "expose_scores": True, "sticky": False},
            # A demo shares two cores with the models it asks: leave the encoder time to answer.
            "estimator": {"path": estimator, "deadline_ms": 500},
        }
    )


async def _serve_and_ask(settings: Config, questions: Sequence[Question], options: argparse.Namespace) -> int:
    addresses: asyncio.Future[tuple[str, str]] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    serving = asyncio.create_task(
        server.serve(settings, None, lambda public, admin: addresses.set_result((public, admin)), stop)
    )
    await asyncio.wait((serving, addresses), return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()
    url, admin = await addresses
    asking = asyncio.create_task(_ask_and_report(settings, questions, url, admin, options.once))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((asking, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not asking.done():
            return 1  # interrupted
        asking.result()
        if not options.once:
            print("\nThe gateway stays up until Ctrl-C.", flush=True)
            await stop.wait()
        return 0
    finally:
        for task in (asking, stopping):
            task.cancel()
        await asyncio.gather(asking, stopping, return_exceptions=True)
        stop.set()
        await serving


async def _ask_and_report(settings: Config, questions: Sequence[Question], url: str, admin: str, once: bool) -> None:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        version = await _estimator_version(session, admin)
        print(f"  the gateway at {url}/v1, estimator {version}, threshold {settings.routing.threshold:g}\n", flush=True)
        print(report.HEADER)
        shown = [await _watch(session, url, question) for question in questions[:SHOWN]]
        if len(questions) > SHOWN:
            print(f"\nAnd {len(questions) - SHOWN} more, {CONCURRENCY} at a time:", flush=True)
        routed = dict(enumerate(shown))
        rest = {index: question for index, question in enumerate(questions) if index >= SHOWN}
        routed |= await _ask_all(session, url, rest, "auto", "routed")
        replies = {name: {i: reply for i, reply in routed.items() if reply.pool == name} for name in settings.pools}
        for name, known in replies.items():
            others = {index: question for index, question in enumerate(questions) if index not in known}
            known |= await _ask_all(session, url, others, name, f"the others, {name}")
    outcomes = [
        _outcome(settings, question, routed[index].pool, {name: replies[name][index] for name in replies})
        for index, question in enumerate(questions)
    ]
    print("\n" + report.summary(outcomes))
    if once:
        return
    sample = json.dumps({"model": "auto", "messages": [{"role": "user", "content": questions[0].text}]})
    print(f"\nTry it:   curl -si {url}/v1/chat/completions -H 'content-type: application/json' -d '{sample}'")
    print(f"Look at:  {admin}/admin/ in a browser")
    print(f"Metrics:  curl -s {admin}/metrics | grep ^gateway_", flush=True)


def _outcome(settings: Config, question: Question, pool: str, replies: dict[str, DemoReply]) -> Outcome:
    return Outcome(
        length=len(question.text),
        pool=pool,
        right={
            name: None if question.answer is None else _final(reply.text) == question.answer
            for name, reply in replies.items()
        },
        cost={name: settings.pools[name].cost * reply.tokens / 1000 for name, reply in replies.items()},
    )


async def _watch(session: aiohttp.ClientSession, url: str, question: Question) -> DemoReply:
    """One streamed query, printed as it comes."""
    parts: list[str] = []
    reply: DemoReply | None = None
    async for reply in _stream(session, url, question.text, "auto"):
        if not parts:
            print(report.row_start(question.text, reply.confidence, reply.pool, reply.reason), end="", flush=True)
        piece = reply.text[sum(map(len, parts)) :]
        parts.append(piece)
        print(piece.replace("\n", " "), end="", flush=True)
    assert reply is not None
    verdict = "" if question.answer is None else "  right" if _final(reply.text) == question.answer else "  wrong"
    print(verdict, flush=True)
    return reply


async def _ask_all(
    session: aiohttp.ClientSession, url: str, questions: dict[int, Question], model: str, label: str
) -> dict[int, DemoReply]:
    gate = asyncio.Semaphore(CONCURRENCY)
    replies: dict[int, DemoReply] = {}
    with tqdm(total=len(questions), desc=label, disable=not sys.stderr.isatty(), leave=False) as bar:

        async def ask(index: int, question: Question) -> None:
            async with gate:
                async for reply in _stream(session, url, question.text, model):
                    replies[index] = reply
            bar.update()

        await asyncio.gather(*(ask(index, question) for index, question in questions.items()))
    return replies


async def _stream(session: aiohttp.ClientSession, url: str, text: str, model: str) -> AsyncIterator[DemoReply]:
    """The reply as it grows; the last one is whole and knows its tokens."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": MAX_TOKENS,
        "temperature": 1.0,
        "seed": random.Random(text + model).randrange(2**31),
    }
    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
        if answer.status != 200:
            raise ValueError(f"the gateway answered {answer.status}: {(await answer.text())[:300]}")
        confidence = answer.headers.get("x-depo-confidence")
        pool, reason = answer.headers["x-depo-pool"], answer.headers["x-depo-reason"]
        written, tokens = "", 0
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            chunk = orjson.loads(line[6:])
            if "error" in chunk:
                raise ValueError(f"the stream broke off: {chunk['error'].get('message', chunk['error'])}")
            for choice in chunk.get("choices", []):
                written += choice.get("delta", {}).get("content") or ""
            if chunk.get("usage"):
                tokens = chunk["usage"].get("total_tokens", 0)
            yield DemoReply(pool, reason, float(confidence) if confidence else None, written, tokens)


async def _estimator_version(session: aiohttp.ClientSession, admin: str) -> str:
    async with session.get(f"{admin}/admin/status") as answer:
        return str((await answer.json())["estimator"])


async def _served_model(pool: str, url: str) -> str:
    """The name of the first model that a server of the user's own lists."""
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session,
            session.get(f"{url}/v1/models") as answer,
        ):
            listed = orjson.loads(await answer.read())["data"]
            return str(listed[0]["id"])
    except TimeoutError:
        raise ValueError(f"--backends {pool}={url}: GET /v1/models was not answered within 10 s") from None
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"--backends {pool}={url}: GET /v1/models did not answer with a list of models") from None
    except aiohttp.ClientError as error:
        raise ValueError(
            f"--backends {pool}={url}: GET /v1/models gave no model ({error or type(error).__name__})"
        ) from None


@contextlib.contextmanager
def _backend(name: str) -> Iterator[str]:
    """A llama.cpp server of its own process on one of the embedded models; yields its address."""
    command = [
        sys.executable,
        "-m",
        "depo_gateway.gateway.demo.llama_server",
        "--model",
        str(DATA / name / "model.gguf"),
        "--port",
        "0",
    ]
    process = subprocess.Popen([*command, "--alias", name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()  # it prints one line when it is ready, and nothing if it can't be
        address = re.search(r"http://\S+", line)
        if address is None:
            process.kill()
            said = (process.communicate()[1] or "no reason given").strip().splitlines()
            raise ValueError(f"the {name} model's server did not start: {said[-1]}")
        yield address.group()
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _questions(path: Path, count: int | None) -> list[Question]:
    rows = [orjson.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
    if count is not None and not 1 <= count <= len(rows):
        raise ValueError(f"--queries is {count} and must be between 1 and {len(rows)}, as many as there are")
    return [Question(row["question"], row.get("answer")) for row in rows[:count]]


def _final(text: str) -> str | None:
    """The last number of an answer."""
    numbers = re.findall(r"-?\d+", text)
    return numbers[-1] if numbers else None
