"""`depo-train collect`: prompts -> k completions of each pool -> graded outcomes, one JSON line a prompt.

A row is written, whole and synced, when every pool has answered its prompt. The file therefore records what is done,
and the same command continues after Ctrl-C, a crash or a failed backend. Rows are keyed by the model's name as its
server reports it; how they were sampled is recorded beside the table (outcomes/table_file.py). Nothing here imports
torch.
"""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from tqdm import tqdm

from depo_gateway.training.outcomes.collection import Prompt, collect_outcomes, read_prompts
from depo_gateway.training.outcomes.sampling_client import Backend, BackendError, Sampling, connect
from depo_gateway.training.outcomes.table_file import outcome_file
from depo_gateway.training.rewards.verifiers import NAMES, Grader
from depo_gateway.training.rewards.worker_pool import RewardError


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
    parser.add_argument("--k", type=int, default=8, help="completions per prompt and pool (default 8)")
    parser.add_argument("--verifier", default="number", help=f"{NAMES} (default number)")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-tokens", type=int, default=512, help="of a completion (default 512)")
    parser.add_argument("--concurrency", type=int, default=16, help="requests in flight per backend (default 16)")
    parser.add_argument("--model", nargs="+", default=[], metavar="POOL=NAME", help="for servers of several models")
    parser.add_argument(
        "--api-key-env", nargs="+", default=[], metavar="POOL=VARIABLE", help="environment variables with API keys"
    )


def run(args: argparse.Namespace) -> int:
    """Exit code 0; 1 if a backend failed or refused every prompt, or on Ctrl-C. ValueError for the user's mistakes."""
    if args.k < 1 or args.concurrency < 1 or args.max_tokens < 1 or args.temperature < 0:
        raise ValueError("--k, --concurrency and --max-tokens must be at least 1 and --temperature at least 0")
    sampling = Sampling(args.k, args.temperature, args.max_tokens, Grader(args.verifier))
    urls = _pairs("--backends", args.backends)
    for pool, url in urls.items():
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--backends {pool}={url}: a URL begins with http:// or https://")
    prompts = read_prompts(args.prompts)
    if args.out.exists() and args.out.samefile(args.prompts):
        raise ValueError(f"--out {args.out} is the prompts file; give --out another file")

    async def collected() -> int:
        with closing(sampling.grader):  # before the event loop ends, which waits for the threads that grade
            return await _collect(urls, args, prompts, sampling)

    try:
        return asyncio.run(collected())
    except (BackendError, RewardError) as error:
        remedy = f"; {args.out} is kept, and the same command continues it" if args.out.exists() else ""
        print(f"{error}{remedy}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; {args.out} is kept, and the same command continues it", file=sys.stderr)
        return 1


@dataclass(slots=True)
class _Tally:
    """Counts of what was collected, by model."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    refusals: dict[str, list[str]] = field(default_factory=dict)  # the server's message, one a refused prompt

    def add(self, row: Mapping[str, Any]) -> None:
        for name, rate in row["correct"].items():
            self.sums[name] = self.sums.get(name, 0.0) + rate
            self.counts[name] = self.counts.get(name, 0) + 1

    def pass_rates(self, names: Sequence[str], digits: int) -> dict[str, str]:
        return {name: f"{self.sums[name] / self.counts[name]:.{digits}f}" for name in names if self.counts.get(name)}


async def _collect(
    urls: Mapping[str, str], args: argparse.Namespace, prompts: Sequence[Prompt], sampling: Sampling
) -> int:
    tally = _Tally()
    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=600, sock_connect=5), connector=aiohttp.TCPConnector(limit=0)
    ) as session:
        backends = await _connect_all(session, urls, args, sampling)
        await _write_rows(session, backends, args, prompts, sampling, tally)
    _report_losses(args.verifier, sampling.grader, tally, len(prompts))
    return _report_outcomes(args, backends, tally)


async def _connect_all(
    session: aiohttp.ClientSession, urls: Mapping[str, str], args: argparse.Namespace, sampling: Sampling
) -> list[Backend]:
    models = _pairs("--model", args.model, allowed=urls)
    key_variables = _pairs("--api-key-env", args.api_key_env, allowed=urls)
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
    return backends


async def _write_rows(
    session: aiohttp.ClientSession,
    backends: Sequence[Backend],
    args: argparse.Namespace,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    tally: _Tally,
) -> None:
    """Collects the prompts that the table lacks, each row synced to disk before the next."""
    names = [backend.model for backend in backends]
    settings = {
        "k": args.k,
        "temperature": args.temperature,
        "verifier": args.verifier,
        "max_tokens": args.max_tokens,
        "models": sorted(names),
    }
    with outcome_file(args.out, settings) as (file, done):
        missing = [prompt for prompt in prompts if prompt.key not in done]
        for row in done.values():
            tally.add(row)
        begun = len(prompts) - len(missing)
        with tqdm(total=len(prompts), initial=begun, unit="prompt", disable=not sys.stderr.isatty()) as bar:
            async for row in collect_outcomes(session, backends, missing, sampling, args.concurrency, tally.refusals):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
                tally.add(row)
                bar.update()
                if not bar.disable:
                    bar.set_postfix(tally.pass_rates(names, 2), refresh=False)


def _report_losses(verifier: str, grader: Grader, tally: _Tally, prompts: int) -> None:
    """Reports on stderr which prompts were refused and which completions could not be graded."""
    for name, messages in tally.refusals.items():
        some = f"{len(messages)} of {prompts} prompts, for instance"
        print(f"{name} refused {some if tally.counts.get(name) else 'every prompt'}: {messages[0]}", file=sys.stderr)
    grades = grader.counts()
    if grades["timeouts"] or grades["failures"]:
        lost = f"{grades['timeouts']} took over {grader.deadline_s:g} s and {grades['failures']} failed"
        print(f"verifier {verifier}: of {sum(grades.values())} completions {lost}; they are left out", file=sys.stderr)


def _report_outcomes(args: argparse.Namespace, backends: Sequence[Backend], tally: _Tally) -> int:
    """Prints the pass rates and the next command. Exit code 1 if a model has no outcome."""
    names = [backend.model for backend in backends]
    rates = tally.pass_rates(names, 3)
    without = [name for name in names if name not in rates]
    if without:
        print(f"{args.out} has no outcome of {', '.join(without)}: there is nothing to fit", file=sys.stderr)
        return 1
    print(f"{args.out}: pass rates " + ", ".join(f"{n} {rate} of {tally.counts[n]}" for n, rate in rates.items()))
    if all(float(rate) == 0 for rate in rates.values()):
        print(f"no answer passed: check --verifier ({args.verifier}) and --max-tokens ({args.max_tokens})")
    pools = " ".join(f"{backend.pool}={backend.model}" for backend in backends)
    print(f"next: depo-train fit --outcomes {args.out} --pools {pools} --out DIR")
    return 0


def _pairs(flag: str, items: Sequence[str], allowed: Mapping[str, str] | None = None) -> dict[str, str]:
    """`small=URL` arguments as a mapping, in their order."""
    found: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not (name and equals and value) or name in found:
            raise ValueError(f"{flag} takes POOL=VALUE, each pool once, not {item!r}")
        if allowed is not None and name not in allowed:
            raise ValueError(f"{flag} names {name!r}, but the pools are {', '.join(allowed)}")
        found[name] = value
    return found
