"""`depo-train evaluate`: a checkpoint's routing on an outcome table, beside random and prompt length.

It scores with the serving runtime, so what is measured is what is served.

Shapes: N prompts, K pools cheapest first, H = 2K outputs.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from estimator import calibration, checkpoint
from estimator.checkpoint import Manifest
from estimator.records import Example
from estimator.runtime import Runtime
from estimator.text import TextConfig
from estimator.text import read as text_of
from training.data import Pools, Row, examples_of, key_of, labels, parse_pools, read_tables
from training.measure import (
    Array,
    Measured,
    apgr,
    apgr_table,
    at_thresholds,
    calibration_error,
    centred,
    measure,
    routing_scores,
    share_curve,
    table,
)

FINGERPRINTS = 16_384  # a checkpoint remembers so many of the questions it was fitted on: 170 KiB
REPORT_JSON, REPORT_MD, CURVE, SCORES = "report.json", "report.md", "curve.png", "scores.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a checkpoint, or builtin")
    parser.add_argument("--outcomes", nargs="+", type=Path, required=True, metavar="FILE", help="outcome tables")
    parser.add_argument("--pools", nargs="+", metavar="NAME=MODEL", help="default: the models it was fitted on")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the report goes")


def run(args: argparse.Namespace) -> int:
    """The command: report.json, report.md, curve.png and scores.jsonl under --out."""
    runtime = Runtime.load(checkpoint.resolve(args.checkpoint), threads=os.cpu_count() or 1)
    pools = pools_of(args.pools, runtime.manifest)
    rows = read_tables(args.outcomes)
    examples = examples_of(rows, pools)
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file; give a directory")
    fitted = fitted_share(examples, runtime.manifest)
    warn_of_fitted("evaluate", fitted)
    args.out.mkdir(parents=True, exist_ok=True)
    prompts = list(dict.fromkeys((row.question, row.context) for row in rows))
    place = {prompt: index for index, prompt in enumerate(prompts)}
    full, cheap = logits_of(runtime, prompts)
    served = {"full": full, "cheap": cheap} if runtime.has_cheap else {"full": full}
    stages = {
        stage: calibration.apply(runtime.calibration.stages[stage], logits)[0] for stage, logits in served.items()
    }
    write_scores(args.out / SCORES, rows, stages["full"], place, runtime.pools)
    index = np.array([place[example.prompt, example.context] for example in examples])
    observed, _ = labels(examples, pools.names)
    length = np.array([len(example.prompt) for example in examples], float)
    source_of = {(key_of(row.question), row.context): row.source for row in rows}
    sources = np.array([source_of[key_of(example.prompt), example.context] for example in examples])
    quality = {stage: quality_all[index] for stage, quality_all in stages.items()}
    report: dict[str, Any] = {
        "checkpoint": runtime.version,
        "outcomes": [str(path) for path in args.outcomes],
        "pools": dict(zip(pools.names, pools.models, strict=True)),
        "fitted_share": fitted,
        "all": report_of(quality, observed, length, runtime.pools),
    }
    names = sorted(set(sources.tolist()))
    if len(names) > 1:
        report["sources"] = {
            name: report_of({s: q[sources == name] for s, q in quality.items()}, observed[sources == name],
                            length[sources == name], runtime.pools)
            for name in names
        }  # fmt: skip
    (args.out / REPORT_JSON).write_text(json.dumps(finite(report), indent=2) + "\n", encoding="utf-8")
    text = markdown(report)
    (args.out / REPORT_MD).write_text(text, encoding="utf-8")
    complete = ~np.isnan(observed).any(1)
    draw(args.out / CURVE, {s: q[complete] for s, q in quality.items()}, observed[complete], length[complete])
    sys.stdout.write(text)
    return 0


def pools_of(specifications: Sequence[str] | None, manifest: Manifest) -> Pools:
    """The pools asked for, or those the checkpoint was fitted on. Raises ValueError if they aren't the checkpoint's."""
    models: Mapping[str, Sequence[str]] = manifest.metrics.get("models", {name: [name] for name in manifest.pools})
    given = specifications or [f"{name}={','.join(models[name])}" for name in manifest.pools]
    pools = parse_pools(given)
    alone = len(manifest.pools) == 1 and pools.names[0] == manifest.pools[0]  # routes under difficulty alone
    if pools.names != manifest.pools and not alone:
        raise ValueError(f"the checkpoint's pools are {', '.join(manifest.pools)}, not {', '.join(pools.names)}")
    return pools


def fingerprints(examples: Sequence[Example]) -> str:
    """Base64 of 8 bytes of each question's sha256, sorted. Of many questions the lowest, which are a fair sample."""
    hashes = sorted({_fingerprint(example) for example in examples})
    return base64.b64encode(b"".join(hashes[:FINGERPRINTS])).decode()


def fitted_share(examples: Sequence[Example], manifest: Manifest) -> float | None:
    """The share of examples whose question the checkpoint was fitted on; None if it doesn't say which those are."""
    stored = manifest.metrics.get("fitted_on")
    if not isinstance(stored, str):
        return None
    data = base64.b64decode(stored)
    fitted = {data[start : start + 8] for start in range(0, len(data), 8)}
    last = max(fitted) if len(fitted) >= FINGERPRINTS else b"\xff" * 8  # beyond it nothing was stored
    known = [found for found in map(_fingerprint, examples) if found <= last]
    return sum(found in fitted for found in known) / len(known) if known else None


def warn_of_fitted(command: str, share: float | None) -> None:
    """One line on stderr if some of the prompts are those the checkpoint was fitted on."""
    if share:
        sys.stderr.write(
            f"depo-train {command}: the checkpoint was fitted on {share:.1%} of these prompts, and looks better on"
            " those than it is; use others\n"
        )


def _fingerprint(example: Example) -> bytes:
    return hashlib.sha256(key_of(example.prompt).encode()).digest()[:8]


def logits_of(runtime: Runtime, prompts: Sequence[tuple[str, str]], batch_size: int = 32) -> tuple[Array, Array]:
    """Raw logits of the full and the cheap stage, (N, K, 2) each, of (prompt, context) pairs.

    Without a cheap stage both are the full one's, so that its calibration, which nothing uses, is a sound one.
    """
    prepared = [runtime.prepare(*as_served(runtime.manifest.text, *prompt)) for prompt in prompts]
    order = sorted(range(len(prepared)), key=lambda i: len(prepared[i].ids))
    full: NDArray[np.float32] = np.zeros((len(prepared), 2 * len(runtime.pools)), np.float32)
    cheap = np.zeros_like(full)
    with tqdm(total=len(prepared), desc="score", unit="prompt", disable=None) as progress:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = [prepared[i] for i in rows]
            full[rows] = runtime.full_logits(batch)
            cheap[rows] = runtime.cheap_logits(batch) if runtime.has_cheap else full[rows]
            progress.update(len(rows))
    shape = (len(prepared), len(runtime.pools), 2)
    return full.astype(np.float64).reshape(shape), cheap.astype(np.float64).reshape(shape)


def as_served(config: TextConfig, prompt: str, context: str) -> tuple[str, str]:
    """What the gateway would read of a table's row: under a chat template, the one user turn it makes of it."""
    if not config.chat:
        return prompt, context
    return text_of(config, [{"role": "user", "content": f"{context}\n{prompt}" if context else prompt}])


def write_scores(
    path: Path, rows: Sequence[Row], quality: Array, place: Mapping[tuple[str, str], int], pools: tuple[str, ...]
) -> None:
    """One line a row of the tables, in their order. Confidence is the rule gain's; with one pool, difficulty's."""
    confidence = calibration.confidence(quality, "gain" if len(pools) > 1 else "difficulty")
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            index = place[row.question, row.context]
            scores = {
                "question": row.question,
                "quality": dict(zip(pools, quality[index].tolist(), strict=True)),
                "confidence": dict(zip(pools, confidence[index].tolist(), strict=True)),
            }
            file.write(json.dumps(scores, ensure_ascii=False) + "\n")


def report_of(
    quality: Mapping[str, Array],
    observed: Array,
    length: Array,
    pools: tuple[str, ...],
    folds: NDArray[np.int64] | None = None,
    groups: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The figures of one set of prompts: stage -> calibrated quality (N, K), against observed (N, pools asked for).

    `folds` (N,) of a cross-fit at random: scores are centred by fold. `groups` (N,): intervals resample whole groups.
    """
    complete = ~np.isnan(observed).any(1)
    report: dict[str, Any] = {
        "prompts": len(observed),
        "with_all_labels": int(complete.sum()),
        "calibration": {
            stage: {pool: calibration_error(q[:, k], observed[:, k]) for k, pool in enumerate(pools)}
            for stage, q in quality.items()
        },
    }
    if not complete.any() or observed.shape[1] < 2:
        return report
    observed, length = observed[complete], length[complete]
    quality = {stage: q[complete] for stage, q in quality.items()}
    small, large = observed[:, 0], observed[:, -1]
    scores = scores_of(quality, length, None if folds is None else folds[complete])
    numbers = None
    if groups is not None:
        names, numbers = np.unique(np.array(groups, dtype=object).astype(str)[complete], return_inverse=True)
        report["groups"] = len(names)
    measured = measure(scores, small, large, groups=numbers)
    report |= {
        "small_quality": float(small.mean()),
        "large_quality": float(large.mean()),
        "perfect_apgr": apgr(large - small, small, large),
        "apgr": {"random": 0.5} | {name: asdict(m) for name, m in measured.items()},
        "thresholds": {
            rule: at_thresholds(quality["full"], observed, rule)
            for rule in calibration.RULES
            if observed.shape[1] == quality["full"].shape[1]
        },
    }
    return report


def scores_of(quality: Mapping[str, Array], length: Array, folds: NDArray[np.int64] | None = None) -> dict[str, Array]:
    """Routing scores by name: length, then every rule in both stages; these centred by fold if folds are given."""
    scores = {"length": length}
    for stage, quality_NK in quality.items():
        for rule, score in sorted(routing_scores(quality_NK).items(), reverse=True):
            scores[f"{rule} ({stage})"] = score if folds is None else centred(score, folds)
    return scores


def markdown(report: Mapping[str, Any]) -> str:
    """report.md: what report.json says, for reading."""
    lines = [f"# Routing of checkpoint {report['checkpoint']}", ""]
    lines += [f"- {name}: {', '.join(models)}" for name, models in report["pools"].items()]
    fitted = report["fitted_share"]
    known = f"It was fitted on {fitted:.1%} of these prompts" if fitted is not None else (
        "Which prompts it was fitted on is not on record"
    )  # fmt: skip
    lines.append(f"- {known}{'.' if fitted == 0 else '; on those it looks better than it is.'}")
    parts = {"All prompts": report["all"], **{f"Source {n}": part for n, part in report.get("sources", {}).items()}}
    for title, part in parts.items():
        lines += [
            "",
            f"## {title}",
            "",
            f"{part['prompts']} prompts, {part['with_all_labels']} with labels of every pool.",
        ]
        if "apgr" not in part:
            continue
        lines[-1] += f" All small {part['small_quality']:.3f}, all large {part['large_quality']:.3f}."
        if np.isnan(part["perfect_apgr"]):
            lines[-1] += " The large pool is no better than the small one here, so there is no gap to measure."
            continue
        lines[-1] += f" Perfect knowledge would have APGR {part['perfect_apgr']:.3f}."
        lines += ["", apgr_table({n: Measured(**m) for n, m in part["apgr"].items() if n != "random"})]
        for rule, rows in part["thresholds"].items():
            shown = [
                (r["threshold"], f"{r['large_share']:.3f}", f"{r['quality']:.3f}", f"{r['coin']:.3f}") for r in rows
            ]
            lines += [
                "",
                f"Rule {rule}:",
                "",
                table(shown, ("threshold", "large share", "quality", "coin at that share")),
            ]
    return "\n".join(lines) + "\n"


def draw(path: Path, quality: Mapping[str, Array], observed: Array, length: Array) -> None:
    """Mean quality over the share of large calls, one line a routing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), dpi=120)
    if len(observed) and observed.shape[1] > 1:
        small, large = observed[:, 0], observed[:, -1]
        axes.plot([0, 1], [small.mean(), large.mean()], color="0.6", linestyle="--", label="random")
        for name, score in scores_of(quality, length).items():
            axes.plot(*share_curve(score, small, large), label=name, linewidth=1 if name == "length" else 1.6)
        axes.legend(loc="lower right", fontsize=8)
    axes.set(xlabel="share of calls to the large pool", ylabel="mean quality", xlim=(0, 1))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def finite(value: Any) -> Any:
    """NaN is not JSON: null stands for what can't be measured."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
