"""Predictions of a checkpoint for prompts, computed by the serving runtime.

Shapes: N prompts, K pools cheapest first, H heads, O = K * H outputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

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


def resolve_pools(specifications: Sequence[str] | None, manifest: Manifest) -> Pools:
    """The given pools, or those the checkpoint was fitted on. Raises ValueError unless they are the checkpoint's."""
    models: Mapping[str, Sequence[str]] = manifest.metrics.get("models", {name: [name] for name in manifest.pools})
    given = specifications or [f"{name}={','.join(models[name])}" for name in manifest.pools]
    pools = parse_pools(given)
    single = len(manifest.pools) == 1 and pools.names[0] == manifest.pools[0]  # routes under difficulty
    if pools.names != manifest.pools and not single:
        raise ValueError(f"the checkpoint's pools are {', '.join(manifest.pools)}, not {', '.join(pools.names)}")
    return pools


def prompt_logits(runtime: Runtime, prompts: Sequence[tuple[str, str]]) -> tuple[Array, Array]:
    """text_logits of an outcome table's (prompt, context) pairs."""
    return text_logits(runtime, [served_text(runtime.manifest.text, *prompt) for prompt in prompts])


def text_logits(runtime: Runtime, texts: Sequence[tuple[str, str]], batch_size: int = 32) -> tuple[Array, Array]:
    """Raw logits of the full and the cheap stage, (N, K, H) each, of texts from estimator.text.extract_text().

    Without a cheap stage both are the full stage's, so that the unused calibration of the cheap stage is valid.
    """
    prepared = [runtime.prepare(*text) for text in texts]
    order, heads = sorted(range(len(prepared)), key=lambda i: len(prepared[i].ids)), len(runtime.manifest.heads)
    full: NDArray[np.float32] = np.zeros((len(prepared), len(runtime.pools) * heads), np.float32)
    cheap = np.zeros_like(full)
    with tqdm(total=len(prepared), desc="score", unit="prompt", disable=None) as progress:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = [prepared[i] for i in rows]
            full[rows] = runtime.full_logits(batch)
            cheap[rows] = runtime.cheap_logits(batch) if runtime.has_cheap else full[rows]
            progress.update(len(rows))
    return split_heads(full.astype(np.float64), heads), split_heads(cheap.astype(np.float64), heads)


def served_text(config: TextConfig, prompt: str, context: str) -> tuple[str, str]:
    """What the gateway would read for a table's row: under a chat template, a conversation of one user turn."""
    if not config.chat:
        return prompt, context
    return text_of(config, [{"role": "user", "content": f"{context}\n{prompt}" if context else prompt}])


def stage_qualities(runtime: Runtime, full: Array, cheap: Array) -> dict[str, Array]:
    """Calibrated quality (N, K) of each stage that the checkpoint has, from the logits of both."""
    stages = {"full": full, "cheap": cheap} if runtime.has_cheap else {"full": full}
    calibrated = runtime.calibration.stages
    return {stage: calibration.calibrate_quality(calibrated[stage], logits) for stage, logits in stages.items()}


def write_scores(path: Path, questions: Sequence[str], quality: Array, pools: tuple[str, ...]) -> None:
    """Writes a JSON line per question (N,). Confidence is the rule gain's; with one pool, difficulty's."""
    confidence = calibration.confidence(quality, "gain" if len(pools) > 1 else "difficulty")
    with open(path, "w", encoding="utf-8") as file:
        for index, question in enumerate(questions):
            scores = {
                "question": question,
                "quality": dict(zip(pools, quality[index].tolist(), strict=True)),
                "confidence": dict(zip(pools, confidence[index].tolist(), strict=True)),
            }
            file.write(json.dumps(scores, ensure_ascii=False) + "\n")
