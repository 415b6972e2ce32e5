"""Prompts as a checkpoint scores them, by the serving runtime.

Shapes: N prompts, K pools cheapest first, H = 2K outputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from depo_gateway.estimator import calibration
from depo_gateway.estimator.checkpoint import Manifest
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.estimator.text import TextConfig
from depo_gateway.estimator.text import extract_text as text_of
from depo_gateway.training.evaluation.routing_metrics import Array
from depo_gateway.training.outcomes.table import Pools, parse_pools


def pools_of(specifications: Sequence[str] | None, manifest: Manifest) -> Pools:
    """The pools asked for, or those the checkpoint was fitted on. Raises ValueError if they aren't the checkpoint's."""
    models: Mapping[str, Sequence[str]] = manifest.metrics.get("models", {name: [name] for name in manifest.pools})
    given = specifications or [f"{name}={','.join(models[name])}" for name in manifest.pools]
    pools = parse_pools(given)
    alone = len(manifest.pools) == 1 and pools.names[0] == manifest.pools[0]  # routes under difficulty alone
    if pools.names != manifest.pools and not alone:
        raise ValueError(f"the checkpoint's pools are {', '.join(manifest.pools)}, not {', '.join(pools.names)}")
    return pools


def logits_of(runtime: Runtime, prompts: Sequence[tuple[str, str]], batch_size: int = 32) -> tuple[Array, Array]:
    """Raw logits of the full and the cheap stage, (N, K, 2) each, of a table's (prompt, context) pairs.

    Without a cheap stage both are the full one's, so that its calibration, which nothing uses, is a sound one.
    """
    return logits_of_texts(runtime, [as_served(runtime.manifest.text, *prompt) for prompt in prompts], batch_size)


def logits_of_texts(runtime: Runtime, texts: Sequence[tuple[str, str]], batch_size: int = 32) -> tuple[Array, Array]:
    """The same of what estimator.text.extract_text() took from requests."""
    prepared = [runtime.prepare(*text) for text in texts]
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


def qualities_of(runtime: Runtime, full: Array, cheap: Array) -> dict[str, Array]:
    """Logits of both stages -> stage -> calibrated quality (N, K), for the stages that the checkpoint has."""
    served = {"full": full, "cheap": cheap} if runtime.has_cheap else {"full": full}
    return {
        stage: calibration.apply_calibration(runtime.calibration.stages[stage], logits)[0]
        for stage, logits in served.items()
    }


def write_scores(path: Path, questions: Sequence[str], quality: Array, pools: tuple[str, ...]) -> None:
    """One line a question (N,). Confidence is the rule gain's; with one pool, difficulty's."""
    confidence = calibration.confidence(quality, "gain" if len(pools) > 1 else "difficulty")
    with open(path, "w", encoding="utf-8") as file:
        for index, question in enumerate(questions):
            scores = {
                "question": question,
                "quality": dict(zip(pools, quality[index].tolist(), strict=True)),
                "confidence": dict(zip(pools, confidence[index].tolist(), strict=True)),
            }
            file.write(json.dumps(scores, ensure_ascii=False) + "\n")
