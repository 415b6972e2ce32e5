"""Report of a checkpoint's routing where outcomes are known: figures, and their blocks in the appendix.

Shapes: N prompts, K pools cheapest first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator import calibration
from depo_gateway.estimator.arrays import Array
from depo_gateway.training.evaluation.headline import FEW_PROMPTS
from depo_gateway.training.evaluation.markdown import APGR_HEADER, apgr_rows
from depo_gateway.training.evaluation.page import Block, Paragraph, TableBlock
from depo_gateway.training.evaluation.routing_metrics import (
    ApgrEstimate,
    apgr,
    at_thresholds,
    calibration_error,
    centre_by_fold,
    measure_apgr,
    routing_scores,
)


def outcome_report(
    quality: Mapping[str, Array],
    observed: Array,
    length: Array,
    pools: tuple[str, ...],
    folds: NDArray[np.int64] | None = None,
    groups: Sequence[str] | None = None,
    weights: Array | None = None,
    deciding: Array | None = None,
) -> dict[str, Any]:
    """The figures of one set of prompts: calibrated quality (N, K) by stage, against observed (N, requested pools).

    `folds` (N,) of a cross-fit with random folds: scores are centred by fold. `groups` (N,): intervals resample whole
    groups. `weights` (N,): of labels, used only in calibration errors. `deciding`: what routing goes by in the full
    stage, if not its quality (unfamiliar_prompts.py).
    """
    complete = ~np.isnan(observed).any(1)
    report: dict[str, Any] = {
        "prompts": len(observed),
        "with_all_labels": int(complete.sum()),
        "calibration": {
            stage: {pool: calibration_error(q[:, k], observed[:, k], weights=weights) for k, pool in enumerate(pools)}
            for stage, q in quality.items()
        },
    }
    if not complete.any() or observed.shape[1] < 2:
        return report
    observed, length = observed[complete], length[complete]
    quality = {stage: q[complete] for stage, q in quality.items()}
    if deciding is not None:
        quality["full"] = deciding[complete]
    small, large = observed[:, 0], observed[:, -1]
    scores = scores_by_name(quality, length, None if folds is None else folds[complete])
    numbers = None
    if groups is not None:
        names, numbers = np.unique(np.array(groups, dtype=object).astype(str)[complete], return_inverse=True)
        report["groups"] = len(names)
    estimates = measure_apgr(scores, small, large, groups=numbers)
    report |= {
        "small_quality": float(small.mean()),
        "large_quality": float(large.mean()),
        "perfect_apgr": apgr(large - small, small, large),
        "apgr": {"random": 0.5} | {name: asdict(estimate) for name, estimate in estimates.items()},
        "thresholds": {
            rule: at_thresholds(quality["full"], observed, rule)
            for rule in calibration.RULES
            if observed.shape[1] == quality["full"].shape[1]
        },
    }
    return report


def scores_by_name(
    quality: Mapping[str, Array], length: Array, folds: NDArray[np.int64] | None = None
) -> dict[str, Array]:
    """Routing scores: prompt length, then every rule in both stages, centred by fold if folds are given."""
    scores = {"length": length}
    for stage, quality_NK in quality.items():
        for rule, score in sorted(routing_scores(quality_NK).items(), reverse=True):
            scores[f"{rule} ({stage})"] = score if folds is None else centre_by_fold(score, folds)
    return scores


def part_blocks(part: Mapping[str, Any]) -> list[Block]:
    """The appendix on one set of prompts: every routing's APGR, common thresholds, errors of the predictions."""
    summary = f"{part['prompts']} prompts, {part['with_all_labels']} with labels of every pool"
    summary += f", {part['unfamiliar']:.1%} unfamiliar to the checkpoint." if part.get("unfamiliar") else "."
    if "apgr" not in part:
        return [Paragraph(summary)]
    summary += f" All small {part['small_quality']:.3f}, all large {part['large_quality']:.3f}."
    if np.isnan(part["perfect_apgr"]):
        remark = "The large pool is no better than the small one here, so there is no gap to measure."
        return [Paragraph(f"{summary} {remark}")]
    blocks: list[Block] = [Paragraph(f"{summary} Perfect knowledge would have APGR {part['perfect_apgr']:.3f}.")]
    if part["with_all_labels"] < FEW_PROMPTS:
        blocks.append(Paragraph(f"Fewer than {FEW_PROMPTS} prompts with labels of every pool: not reliable."))
    estimates = {name: ApgrEstimate(**of) for name, of in part["apgr"].items() if name != "random"}
    blocks.append(TableBlock("APGR of every routing", APGR_HEADER, apgr_rows(estimates)))
    for rule, rows in part["thresholds"].items():
        cells = [
            (f"{r['threshold']:g}", f"{r['large_share']:.3f}", f"{r['quality']:.3f}", f"{r['coin']:.3f}") for r in rows
        ]
        header = ("threshold", "large share", "quality", "random, same shares")
        blocks.append(TableBlock(f"Rule {rule} at common thresholds", header, cells))
    errors = [
        (f"{pool} ({stage})", f"{of['brier']:.3f}", f"{of['ece']:.3f}")
        for stage, by_pool in part["calibration"].items()
        for pool, of in by_pool.items()
    ]
    columns = ("predicted quality of", "Brier score", "expected calibration error")
    return [*blocks, TableBlock("Errors of the predicted qualities", columns, errors)]


def nan_to_null(value: Any) -> Any:
    """The value with None for each NaN or infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: nan_to_null(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [nan_to_null(part) for part in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
