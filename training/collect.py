"""`depo-train collect`: prompts -> k completions of each pool -> graded outcomes, one JSON line a prompt.

A row is written, whole and synced, when every pool has answered its prompt; so the file is a resumable record of what
is done, and the same command goes on after Ctrl-C, a crash or a backend's death. Rows are keyed by the model's name as
its server gives it. Nothing here imports torch.
"""

import argparse
import asyncio
import fcntl
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import aiohttp
from tqdm import tqdm

from training.backends import Backend, BackendFailed, Outcome, Sampling, connect, mean, outcome
from training.rewards import VERIFIERS, verifier


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of the prompts file."""

    messages: tuple[Mapping[str, Any], ...]
    reference: str
    row: Mapping[str, Any]  # what the outcome row repeats: question or messages, group, source

    @property
    def key(self) -> str:
        return key_of(self.row)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        help='JSON lines: {"question" or "messages", "answer", "group"?, "source"?}',
    )
    parser.add_argument(
        "--backends", nargs="+", required=True, metavar="POOL=URL", help="OpenAI servers, cheapest first"
    )
    parser.add_argument("--out", type=Path, required=True, help="the outcome table; an unfinished one is continued")
    parser.add_argument("--k", type=int, default=8, help="completions a prompt and pool (default 8)")
    parser.add_argument("--verifier", default="number", help=f"{', '.join(VERIFIERS)} (default number)")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-tokens", type=int, default=512, help="a completion's limit (default 512)")
    parser.add_argument("--concurrency", type=int, default=16, help="requests in flight a backend (default 16)")
    parser.add_argument("--model", nargs="+", default=[], metavar="POOL=NAME", help="where a server has several models")
    parser.add_argument("--api-key-env", nargs="+", default=[], metavar="POOL=VARIABLE", help="variables with API keys")


def run(args: argparse.Namespace) -> int:
    """Exit code 0; 1 where a backend failed or the user interrupted. ValueError for the user's mistakes."""
    if args.k < 1 or args.concurrency < 1 or args.max_tokens < 1 or args.temperature < 0:
        raise ValueError("--k, --concurrency and --max-tokens must be at least 1 and --temperature at least 0")
    sampling = Sampling(args.k, args.temperature, args.max_tokens, verifier(args.verifier))
    urls = pairs("--backends", args.backends)
    for pool, url in urls.items():
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--backends {pool}={url}: a URL begins with http:// or https://")
    prompts = read_prompts(args.prompts)
    try:
        asyncio.run(_collect(urls, args, prompts, sampling))
    except BackendFailed as error:
        kept = f"; what is collected stays in {args.out}, the same command goes on" if args.out.exists() else ""
        print(f"{error}{kept}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; {args.out} stays, the same command goes on", file=sys.stderr)
        return 1
    return 0


async def _collect(
    urls: Mapping[str, str], args: argparse.Namespace, prompts: Sequence[Prompt], sampling: Sampling
) -> None:
    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=600, sock_connect=5), connector=aiohttp.TCPConnector(limit=0)
    ) as session:
        models = pairs("--model", args.model, allowed=urls)
        key_variables = pairs("--api-key-env", args.api_key_env, allowed=urls)
        backends = [
            await connect(session, pool, url, models.get(pool), key_variables.get(pool), sampling)
            for pool, url in urls.items()
        ]
        names = [backend.model for backend in backends]
        if len(set(names)) < len(names):
            raise ValueError(
                f"two backends call their model {names[0]!r}, and rows are keyed by that: "
                "start one under another name (vLLM: --served-model-name, llama.cpp: --alias)"
            )
        with outcome_file(args.out) as (file, done):
            check_same_models(args.out, done, names)
            missing = [prompt for prompt in prompts if prompt.key not in done]
            passed = {name: [row["correct"][name] for row in done.values() if name in row["correct"]] for name in names}
            bar = tqdm(
                total=len(prompts), initial=len(prompts) - len(missing), unit="prompt", disable=not sys.stderr.isatty()
            )
            with bar:
                async for row in outcomes(session, backends, missing, sampling, args.concurrency):
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                    for name, rate in row["correct"].items():
                        passed[name].append(rate)
                    bar.update()
                    bar.set_postfix({name: f"{mean(rates):.2f}" for name, rates in passed.items() if rates})
    rates_text = ", ".join(f"{name} {mean(rates):.3f} of {len(rates)}" for name, rates in passed.items() if rates)
    pools_text = " ".join(f"{backend.pool}={backend.model}" for backend in backends)
    print(f"{args.out}: pass rates {rates_text}")
    print(f"next: depo-train fit --outcomes {args.out} --pools {pools_text} --out DIR")


async def outcomes(
    session: aiohttp.ClientSession,
    backends: Sequence[Backend],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    concurrency: int,
) -> AsyncIterator[dict[str, Any]]:
    """Rows as they are done, in no order. A prompt that every backend refuses gives no row."""
    gates = {backend.pool: asyncio.Semaphore(concurrency) for backend in backends}
    waiting = iter(prompts)
    refusals: dict[str, list[str]] = {}

    async def row_of(prompt: Prompt) -> dict[str, Any] | None:
        async with asyncio.TaskGroup() as group:
            asked = {
                backend.model: group.create_task(
                    outcome(session, gates[backend.pool], backend, prompt.messages, prompt.reference, sampling)
                )
                for backend in backends
            }
        answered: dict[str, Outcome] = {}
        for name, task in asked.items():
            result = task.result()
            if isinstance(result, Outcome):
                answered[name] = result
            else:
                refusals.setdefault(name, []).append(result)
        if not answered:
            return None
        row = {**prompt.row, "correct": {name: result.correct for name, result in answered.items()}}
        sure = {name: r.token_confidence for name, r in answered.items() if r.token_confidence is not None}
        return {**row, "token_confidence": sure} if sure else row

    running: set[asyncio.Task[dict[str, Any] | None]] = set()
    try:
        while True:
            while len(running) < 2 * concurrency and (prompt := next(waiting, None)) is not None:
                running.add(asyncio.create_task(row_of(prompt)))
            if not running:
                break
            finished, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in finished:
                try:
                    row = task.result()
                except* BackendFailed as group:
                    raise group.exceptions[0] from None
                if row is not None:
                    yield row
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    for name, messages in refusals.items():
        print(f"{name} refused {len(messages)} prompts, for instance: {messages[0]}", file=sys.stderr)


def read_prompts(path: Path) -> list[Prompt]:
    """Different prompts of a JSON-lines file, in order. ValueError names file and line."""
    prompts: dict[str, Prompt] = {}
    for number, record in json_lines(path):
        place = f"{path}, line {number}"
        has = [name for name in ("question", "messages") if name in record]
        if len(has) != 1:
            raise ValueError(f'{place}: needs either "question" or "messages"')
        content = record[has[0]]
        if has == ["question"] and not (isinstance(content, str) and content.strip()):
            raise ValueError(f'{place}: "question" must be a text')
        if has == ["messages"] and not (
            isinstance(content, list) and content and all(isinstance(turn, dict) and "role" in turn for turn in content)
        ):
            raise ValueError(f'{place}: "messages" must be a list of OpenAI messages')
        if not isinstance(record.get("answer"), str | int | float) or isinstance(record["answer"], bool):
            raise ValueError(f'{place}: needs "answer", the reference that completions are graded against')
        messages = content if has == ["messages"] else [{"role": "user", "content": content}]
        row: dict[str, Any] = {name: record[name] for name in (has[0], "group", "source") if name in record}
        prompt = Prompt(tuple(messages), str(record["answer"]), row)
        prompts.setdefault(prompt.key, prompt)
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return list(prompts.values())


def key_of(row: Mapping[str, Any]) -> str:
    """What makes two rows the same prompt."""
    return json.dumps(row["question"] if "question" in row else row["messages"], sort_keys=True)


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers from 1 and objects; blank lines are skipped. ValueError names file and line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number}: must be a JSON object")
            yield number, record


@contextmanager
def outcome_file(path: Path) -> Iterator[tuple[IO[str], dict[str, dict[str, Any]]]]:
    """The table opened for appending, ours alone, and its rows by prompt; a line torn by a crash is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another collect is writing {path}") from None
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
        rows = {}
        for number, row in json_lines(path):
            if not isinstance(row.get("correct"), dict) or not ("question" in row or "messages" in row):
                raise ValueError(f"{path}, line {number}: not a row of an outcome table; give --out a new file")
            rows[key_of(row)] = row
        yield file, rows


def check_same_models(path: Path, done: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> None:
    """ValueError where a table was begun with other models."""
    strangers = {name for row in done.values() for name in row["correct"]} - set(names)
    if strangers:
        raise ValueError(
            f"{path} was collected from {', '.join(sorted(strangers))}, not from {', '.join(names)}: "
            "give --out another file, or the same servers"
        )


def pairs(flag: str, items: Sequence[str], allowed: Mapping[str, str] | None = None) -> dict[str, str]:
    """`small=URL` arguments as a mapping, order kept."""
    found: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not (name and equals and value) or name in found:
            raise ValueError(f"{flag} takes POOL=VALUE, each pool once, not {item!r}")
        if allowed is not None and name not in allowed:
            raise ValueError(f"{flag} names {name!r}, but the pools are {', '.join(allowed)}")
        found[name] = value
    return found
