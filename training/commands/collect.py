"""`depo-train collect`: prompts -> k completions of each pool -> labelled outcomes, one JSON line a prompt.

A row is written, whole and synced, when every pool has answered its prompt. The file therefore records what is done,
and the same command continues after Ctrl-C, a crash, a failed backend or a judge's cap. Rows are keyed by the model's
name as its server reports it; how they were sampled is recorded beside the table (outcomes/table_file.py). Nothing here
imports torch.
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

from depo_gateway.training.judging.openai_client import base_url
from depo_gateway.training.judging.spend_cap import SpentError
from depo_gateway.training.outcomes.collection import collect_outcomes
from depo_gateway.training.outcomes.collection_judge import (
    add_judge_arguments,
    check_judge_arguments,
    open_labelling,
    requested_judge,
)
from depo_gateway.training.outcomes.collection_summary import CollectionSummary
from depo_gateway.training.outcomes.labelling import JudgeError, Labeller, by_verifier
from depo_gateway.training.outcomes.prompts import Prompt, check_references, read_prompts
from depo_gateway.training.outcomes.sampling_client import (
    Backend,
    BackendError,
    Sampling,
    key_headers,
    probe,
    served_model,
)
from depo_gateway.training.outcomes.saved_completions import check_free, saved_completions
from depo_gateway.training.outcomes.table_file import COMPLETIONS, EXTRA_BODY, outcome_file
from depo_gateway.training.rewards.verifiers import NAMES, Grader
from depo_gateway.training.rewards.worker_pool import RewardError

DEFAULT_VERIFIER = "number"
VERIFIER_K, JUDGE_K = 8, 1
# Request fields that a flag or this program sets
OWN_FIELDS = frozenset(
    {"model", "messages", "n", "stream", "temperature", "max_tokens", "max_completion_tokens", "logprobs"}
)
LEAST_TIMEOUT_SECONDS = 600.0  # of a request
SECONDS_PER_TOKEN = 0.2  # a slower server is taken to hang


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        help='JSON lines: {"question" or "messages", "answer", "group"?, "source"?}; no "answer" with --judge',
    )
    parser.add_argument(
        "--backends", nargs="+", required=True, metavar="POOL=URL", help="OpenAI servers, cheapest first"
    )
    parser.add_argument("--out", type=Path, required=True, help="the outcome table; an unfinished one is continued")
    parser.add_argument(
        "--save-completions",
        type=Path,
        metavar="FILE",
        help="append every completion with its reference and label, JSON lines, to check the labels by eye",
    )
    parser.add_argument(
        "--k", type=int, help=f"completions per prompt and pool (default {VERIFIER_K}; with --judge {JUDGE_K})"
    )
    parser.add_argument("--verifier", help=f"{NAMES} (default {DEFAULT_VERIFIER})")
    parser.add_argument("--temperature", type=float, default=1.0, help="(default 1)")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=512,
        help="of a completion, reasoning included (default 512; a thinking model takes 8192 and more)",
    )
    parser.add_argument("--concurrency", type=int, default=16, help="requests in flight per backend (default 16)")
    parser.add_argument("--model", nargs="+", default=[], metavar="POOL=NAME", help="for servers of several models")
    parser.add_argument(
        "--api-key-env", nargs="+", default=[], metavar="POOL=VARIABLE", help="environment variables with API keys"
    )
    parser.add_argument(
        "--extra-body",
        nargs="+",
        default=[],
        metavar="POOL=JSON",
        help="""further fields of each request, as in small='{"chat_template_kwargs": {"enable_thinking": false}}'""",
    )
    add_judge_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code 0; 1 if a backend or the judge failed, if nothing has a label or nothing passed, or on Ctrl-C.
    ValueError for the user's mistakes.
    """
    if args.k is None:
        args.k = VERIFIER_K if args.judge is None else JUDGE_K
    if args.k < 1 or args.concurrency < 1 or args.max_tokens < 1 or args.temperature < 0:
        raise ValueError("--k, --concurrency and --max-tokens must be at least 1 and --temperature at least 0")
    check_judge_arguments(args)
    urls = _pairs("--backends", args.backends)
    for pool, url in urls.items():
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--backends {pool}={url}: a URL begins with http:// or https://")
    extra = {pool: _extra_body(pool, text) for pool, text in _pairs("--extra-body", args.extra_body, urls).items()}
    prompts = read_prompts(args.prompts, need_reference=args.judge is None)
    if args.out.exists() and args.out.samefile(args.prompts):
        raise ValueError(f"--out {args.out} is the prompts file; give --out another file")
    if args.save_completions is not None:
        check_free(args.save_completions, {"--out": args.out, "--prompts": args.prompts})

    async def collected() -> int:
        if args.judge is not None:
            return await _collect(urls, extra, args, prompts, None)
        with closing(Grader(args.verifier or DEFAULT_VERIFIER)) as grader:  # before the event loop ends: it waits for
            await asyncio.to_thread(check_references, args.prompts, prompts, grader)  # the threads that grade
            return await _collect(urls, extra, args, prompts, grader)

    try:
        return asyncio.run(collected())
    except (BackendError, RewardError, JudgeError) as error:
        remedy = f"; {args.out} is kept, and the same command continues it" if args.out.exists() else ""
        print(f"{error}{remedy}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; {args.out} is kept, and the same command continues it", file=sys.stderr)
        return 1


async def _collect(
    urls: Mapping[str, str],
    extra: Mapping[str, Mapping[str, Any]],
    args: argparse.Namespace,
    prompts: Sequence[Prompt],
    grader: Grader | None,
) -> int:
    sampling = Sampling(args.k, args.temperature, args.max_tokens)
    summary = CollectionSummary()
    timeout_s = LEAST_TIMEOUT_SECONDS + SECONDS_PER_TOKEN * args.max_tokens
    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=5), connector=aiohttp.TCPConnector(limit=0)
    ) as session:
        backends = await _connect_all(session, urls, extra, args, sampling)
        if grader is not None:
            spent = await _write_rows(session, backends, args, prompts, by_verifier(grader), grader.name, summary)
            judged = ""
        else:
            judge = await requested_judge(session, args, timeout_s)
            pools = {backend.model: backend.pool for backend in backends}
            async with open_labelling(judge, session, pools, args.concurrency) as opened:
                label = opened.labels.label
                spent = await _write_rows(session, backends, args, prompts, label, judge.name, summary)
                judged = opened.text()
    print(summary.refusal_lines(len(prompts)), end="", file=sys.stderr)
    print(summary.completion_lines(backends) + judged, end="")
    if spent is not None:
        print(
            f"the judge's cap is used up ({spent}): {args.out} has {summary.rows} of {len(prompts)} prompts, and the"
            " same command continues with a new cap"
        )
    return _report_outcomes(args, backends, summary)


async def _connect_all(
    session: aiohttp.ClientSession,
    urls: Mapping[str, str],
    extra: Mapping[str, Mapping[str, Any]],
    args: argparse.Namespace,
    sampling: Sampling,
) -> list[Backend]:
    models = _pairs("--model", args.model, allowed=urls)
    key_variables = _pairs("--api-key-env", args.api_key_env, allowed=urls)
    backends = []
    for pool, url in urls.items():
        headers = key_headers(f"--api-key-env {pool}", key_variables.get(pool))
        base = base_url(url)
        model = await served_model(session, pool, base, models.get(pool), headers, f"--model {pool}=NAME")
        backends.append(await probe(session, Backend(pool, base, model, headers, extra.get(pool, {})), sampling))
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
    label: Labeller,
    verifier: str,
    summary: CollectionSummary,
) -> SpentError | None:
    """Collects the prompts that the table lacks, each row synced to disk before the next. The result says which cap of
    the judge ended it; None: the table is complete.
    """
    sampling = Sampling(args.k, args.temperature, args.max_tokens)
    settings: dict[str, Any] = {
        "k": args.k,
        "temperature": args.temperature,
        "verifier": verifier,
        "max_tokens": args.max_tokens,
        "models": sorted(backend.model for backend in backends),
    }
    extra = {backend.model: dict(backend.extra_body) for backend in backends if backend.extra_body}
    if extra:
        settings[EXTRA_BODY] = extra
    with outcome_file(args.out, settings) as (file, done):
        missing = [prompt for prompt in prompts if prompt.key not in done]
        for row in done.values():
            summary.add(row)
        if old := sum(COMPLETIONS not in row for row in done.values()):
            print(
                f"{args.out}: {old} rows were written by version 0.1, which graded some answers otherwise and labelled"
                " cut-off ones; start a new file to have all rows graded alike",
                file=sys.stderr,
            )
        begun = len(prompts) - len(missing)
        with (
            tqdm(total=len(prompts), initial=begun, unit="prompt", disable=not sys.stderr.isatty()) as bar,
            saved_completions(args.save_completions) as save,
        ):
            rows = collect_outcomes(
                session, backends, missing, sampling, label, args.concurrency, summary.refusals, save
            )
            try:
                async for row in rows:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                    summary.add(row)
                    bar.update()
                    if not bar.disable:
                        bar.set_postfix(summary.progress(backends), refresh=False)
            except SpentError as error:
                return error
    return None


def _report_outcomes(args: argparse.Namespace, backends: Sequence[Backend], summary: CollectionSummary) -> int:
    """Prints the pass rates and the next command. Exit code 1 if a model has no outcome, or nothing passed."""
    names = [backend.model for backend in backends]
    print(summary.cut_off_lines(backends, args.max_tokens), end="", file=sys.stderr)
    without = [name for name in names if not summary.labelled.get(name)]
    if without:
        print(f"{args.out} has no outcome of {', '.join(without)}: there is nothing to fit", file=sys.stderr)
        return 1
    rates = ", ".join(f"{name} {summary.rate(name):.3f} of {summary.labelled[name]}" for name in names)
    print(f"{args.out}: {'pass rates' if args.judge is None else 'mean quality'} {rates}")
    if summary.nothing_passed:
        print(_nothing_passed(args), file=sys.stderr)
        return 1
    if not summary.too_often_cut_off(backends):
        pools = " ".join(f"{backend.pool}={backend.model}" for backend in backends)
        print(f"next: depo-train fit --outcomes {args.out} --pools {pools} --out DIR")
    return 0


def _nothing_passed(args: argparse.Namespace) -> str:
    if args.judge is not None:
        return "the judge gave every answer 0, so there is nothing to fit: check the judge, its rubric and the answers"
    return (
        f"no answer passed at any pool, so there is nothing to fit: check that --verifier {args.verifier or 'number'}"
        f" reads both your references and the models' answers, and that --max-tokens ({args.max_tokens}) suffices"
    )


def _extra_body(pool: str, text: str) -> dict[str, Any]:
    """The value of --extra-body for a pool."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--extra-body {pool}: not JSON ({error})") from None
    if not isinstance(body, dict):
        raise ValueError(f"--extra-body {pool}: must be a JSON object")
    own = OWN_FIELDS & set(body)
    if own:
        raise ValueError(f"--extra-body {pool}: {', '.join(sorted(own))} can't be set here; collect has its own flags")
    return body


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
