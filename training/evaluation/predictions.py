"""Predictions of a checkpoint for prompts, computed by the serving runtime.

Shapes: N prompts, K pools cheapest first, H heads, O = K * H outputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from depo_gateway.estimator import calibration
from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.checkpoint import Manifest
from depo_gateway.estimator.heads import split_heads
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.estimator.text import TextConfig
from depo_gateway.estimator.text import extract_text as text_of
from depo_gateway.training.outcomes.table import Pools, parse_pools


@dataclass(frozen=True, slots=True)
class ServedLogits:
    """What a checkpoint predicts for N prompts, before calibration: (N, K, H) each.

    Without a cheap stage both are the full stage's, so that the unused calibration of the cheap stage is valid.
    """

    full: Array
    cheap: Array
    unfamiliar: NDArray[np.bool_]  # (N,) to the full stage; none where the checkpoint can't tell


def resolve_pools(specifications: Sequence[str] | None, manifest: Manifest) -> Pools:
    """The given pools, or those the checkpoint was fitted on. Raises ValueError unless they are the checkpoint's."""
    models: Mapping[str, Sequence[str]] = manifest.metrics.get("models", {name: [name] for name in manifest.pools})
    given = specifications or [f"{name}={','.join(models[name])}" for name in manifest.pools]
    pools = parse_pools(given)
    single = len(manifest.pools) == 1 and pools.names[0] == manifest.pools[0]  # routes under difficulty
    if pools.names != manifest.pools and not single:
        raise ValueError(f"the checkpoint's pools are {', '.join(manifest.pools)}, not {', '.join(pools.names)}")
    return pools


def prompt_logits(runtime: Runtime, prompts: Sequence[tuple[str, str]], groups: Sequence[str]) -> ServedLogits:
    """text_logits of an outcome table's (prompt, context) pairs."""
    return text_logits(runtime, [served_text(runtime.manifest.text, *prompt) for prompt in prompts], groups)


def text_logits(
    runtime: Runtime, texts: Sequence[tuple[str, str]], groups: Sequence[str], batch_size: int = 32
) -> ServedLogits:
    """The logits of texts from estimator.text.extract_text().

    Args:
        groups: (N,) the names of the prompts' tasks; "": none.
    """
    prepared = [runtime.prepare(*text, group) for text, group in zip(texts, groups, strict=True)]
    order, heads = sorted(range(len(prepared)), key=lambda i: len(prepared[i].ids)), len(runtime.manifest.heads)
    full: NDArray[np.float32] = np.zeros((len(prepared), len(runtime.pools) * heads), np.float32)
    cheap, unfamiliar = np.zeros_like(full), np.zeros(len(prepared), np.bool_)
    with tqdm(total=len(prepared), desc="score", unit="prompt", disable=None) as progress:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = [prepared[i] for i in rows]
            full[rows], unfamiliar[rows] = runtime.full(batch)
            cheap[rows] = runtime.cheap_logits(batch) if runtime.has_cheap else full[rows]
            progress.update(len(rows))
    full_NKH, cheap_NKH = (split_heads(stage.astype(np.float64), heads) for stage in (full, cheap))
    return ServedLogits(full_NKH, cheap_NKH, unfamiliar)


def served_text(config: TextConfig, prompt: str, context: str) -> tuple[str, str]:
    """What the gateway would read for a table's row: under a chat template, a conversation of one user turn."""
    if not config.chat:
        return prompt, context
    return text_of(config, [{"role": "user", "content": f"{context}\n{prompt}" if context else prompt}])


def stage_qualities(runtime: Runtime, logits: ServedLogits) -> dict[str, Array]:
    """Calibrated quality (N, K) of each stage that the checkpoint has."""
    stages = {"full": logits.full, "cheap": logits.cheap} if runtime.has_cheap else {"full": logits.full}
    calibrated = runtime.calibration.stages
    return {stage: calibration.calibrate_quality(calibrated[stage], of) for stage, of in stages.items()}


def write_scores(
    path: Path, questions: Sequence[str], quality: Array, unfamiliar: NDArray[np.bool_], pools: tuple[str, ...]
) -> None:
    """Writes a JSON line per question (N,). Confidence is the rule gain's; with one pool, difficulty's."""
    confidence = calibration.confidence(quality, "gain" if len(pools) > 1 else "difficulty")
    with open(path, "w", encoding="utf-8") as file:
        for index, question in enumerate(questions):
            scores: dict[str, Any] = {
                "question": question,
                "quality": dict(zip(pools, quality[index].tolist(), strict=True)),
                "confidence": dict(zip(pools, confidence[index].tolist(), strict=True)),
            }
            if unfamiliar[index]:
                scores["unfamiliar"] = True
            file.write(json.dumps(scores, ensure_ascii=False) + "\n")
