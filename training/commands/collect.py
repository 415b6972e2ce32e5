"""`depo-train collect`: prompts -> k completions of each pool -> graded outcomes, one JSON line a prompt.

A row is written, whole and synced, when every pool has answered its prompt; so the file is a resumable record of what
is done, and the same command goes on after Ctrl-C, a crash or a backend's death. Rows are keyed by the model's name as
its server gives it, and how they were drawn stands beside the table (resume.py). Nothing here imports torch.
"""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import aiohttp
from tqdm import tqdm

from depo_gateway.training.outcomes.collection import Prompt, collect_outcomes, read_prompts
from depo_gateway.training.outcomes.sampling_client import (
    BackendError,
    Sampling,
    connect,
)
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
    parser.add_argument("--k", type=int, default=8, help="completions a prompt and pool (default 8)")
    parser.add_argument("--verifier", default="number", help=f"{NAMES} (default number)")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-tokens", type=int, default=512, help="a completion's limit (default 512)")
    parser.add_argument("--concurrency", type=int, default=16, help="requests in flight a backend (default 16)")
    parser.add_argument("--model", nargs="+", default=[], metavar="POOL=NAME", help="where a server has several models")
    parser.add_argument("--api-key-env", nargs="+", default=[], metavar="POOL=VARIABLE", help="variables with API keys")


def run(args: argparse.Namespace) -> int:
    """Exit code 0; 1 where a backend failed, refused every prompt, or the user interrupted. ValueError for mistakes."""
    if args.k < 1 or args.concurrency < 1 or args.max_tokens < 1 or args.temperature < 0:
        raise ValueError("--k, --concurrency and --max-tokens must be at least 1 and --temperature at least 0")
    sampling = Sampling(args.k, args.temperature, args.max_tokens, Grader(args.verifier))
    urls = pairs("--backends", args.backends)
    for pool, url in urls.items():
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--backends {pool}={url}: a URL begins with http:// or https://")
    prompts = read_prompts(args.prompts)
    if args.out.exists() and args.out.samefile(args.prompts):
        raise ValueError(f"--out {args.out} is the prompts file; give --out another file")

    async def collected() -> int:
        with closing(sampling.grader):  # before the loop, at its end, waits for the threads that grade
            return await _collect(urls, args, prompts, sampling)

    try:
        return asyncio.run(collected())
    except (BackendError, RewardError) as error:
        kept = f"; what is collected stays in {args.out}, the same command goes on" if args.out.exists() else ""
        print(f"{error}{kept}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; {args.out} stays, the same command goes on", file=sys.stderr)
        return 1


async def _collect(
    urls: Mapping[str, str], args: argparse.Namespace, prompts: Sequence[Prompt], sampling: Sampling
) -> int:
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
        settings = {
            "k": args.k,
            "temperature": args.temperature,
            "verifier": args.verifier,
            "max_tokens": args.max_tokens,
            "models": sorted(names),
        }
        refusals: dict[str, list[str]] = {}
        sums, counts = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)

        def count(row: Mapping[str, Any]) -> None:
            for name, rate in row["correct"].items():
                sums[name] += rate
                counts[name] += 1

        def rates(digits: int) -> dict[str, str]:
            return {name: f"{sums[name] / counts[name]:.{digits}f}" for name in names if counts[name]}

        with outcome_file(args.out, settings) as (file, done):
            missing = [prompt for prompt in prompts if prompt.key not in done]
            for row in done.values():
                count(row)
            begun = len(prompts) - len(missing)
            with tqdm(total=len(prompts), initial=begun, unit="prompt", disable=not sys.stderr.isatty()) as bar:
                async for row in collect_outcomes(session, backends, missing, sampling, args.concurrency, refusals):
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                    count(row)
                    bar.update()
                    if not bar.disable:
                        bar.set_postfix(rates(2), refresh=False)
    for name, words in refusals.items():
        some = f"{len(words)} of {len(prompts)} prompts, for instance"
        print(f"{name} refused {some if counts[name] else 'every prompt'}: {words[0]}", file=sys.stderr)
    grades = sampling.grader.counts()
    if grades["timeouts"] or grades["failures"]:
        lost = f"{grades['timeouts']} took over {sampling.grader.deadline_s:g} s and {grades['failures']} failed"
        print(
            f"verifier {args.verifier}: of {sum(grades.values())} completions {lost}; they are left out",
            file=sys.stderr,
        )
    unknown = [name for name in names if not counts[name]]
    if unknown:
        print(f"{args.out} has no outcome of {', '.join(unknown)}: there is nothing to fit", file=sys.stderr)
        return 1
    rates_text = ", ".join(f"{name} {rate} of {counts[name]}" for name, rate in rates(3).items())
    pools_text = " ".join(f"{backend.pool}={backend.model}" for backend in backends)
    print(f"{args.out}: pass rates {rates_text}")
    if all(float(rate) == 0 for rate in rates(3).values()):
        print(f"not one answer passed: look at --verifier ({args.verifier}) and --max-tokens ({args.max_tokens})")
    print(f"next: depo-train fit --outcomes {args.out} --pools {pools_text} --out DIR")
    return 0


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
