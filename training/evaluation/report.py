"""Report of a checkpoint's routing where outcomes are known: figures, Markdown, a plot.

Shapes: N prompts, K pools cheapest first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator import calibration
from depo_gateway.estimator.arrays import Array
from depo_gateway.training.evaluation.markdown import apgr_table, table
from depo_gateway.training.evaluation.routing_metrics import (
    ApgrEstimate,
    apgr,
    at_thresholds,
    calibration_error,
    centre_by_fold,
    measure_apgr,
    routing_scores,
    share_curve,
)


def outcome_report(
    quality: Mapping[str, Array],
    observed: Array,
    length: Array,
    pools: tuple[str, ...],
    folds: NDArray[np.int64] | None = None,
    groups: Sequence[str] | None = None,
    weights: Array | None = None,
) -> dict[str, Any]:
    """The figures of one set of prompts: calibrated quality (N, K) by stage, against observed (N, requested pools).

    `folds` (N,) of a cross-fit with random folds: scores are centred by fold. `groups` (N,): intervals resample whole
    groups. `weights` (N,): of labels, used only in calibration errors.
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


def report_markdown(report: Mapping[str, Any]) -> str:
    """report.md: the figures of report.json, for reading."""
    lines = [f"# Routing of checkpoint {report['checkpoint']}", ""]
    lines += [f"- {name}: {', '.join(models)}" for name, models in report["pools"].items()]
    fitted = report["fitted_share"]
    if fitted is None:
        lines.append(
            "- The checkpoint does not record which prompts it was fitted on; results on those would be optimistic."
        )
    else:
        optimistic = "" if fitted == 0 else "; results on those are optimistic"
        lines.append(f"- It was fitted on {fitted:.1%} of these prompts{optimistic}.")
    parts = {"All prompts": report["all"], **{f"Source {n}": part for n, part in report.get("sources", {}).items()}}
    for title, part in parts.items():
        lines += ["", f"## {title}", "", *_part_lines(part)]
    return "\n".join(lines) + "\n"


def _part_lines(part: Mapping[str, Any]) -> list[str]:
    """The lines on one set of prompts."""
    summary = f"{part['prompts']} prompts, {part['with_all_labels']} with labels of every pool."
    if "apgr" not in part:
        return [summary]
    summary += f" All small {part['small_quality']:.3f}, all large {part['large_quality']:.3f}."
    if np.isnan(part["perfect_apgr"]):
        return [f"{summary} The large pool is no better than the small one here, so there is no gap to measure."]
    lines = [f"{summary} Perfect knowledge would have APGR {part['perfect_apgr']:.3f}.", ""]
    lines.append(apgr_table({name: ApgrEstimate(**of) for name, of in part["apgr"].items() if name != "random"}))
    for rule, rows in part["thresholds"].items():
        cells = [(r["threshold"], f"{r['large_share']:.3f}", f"{r['quality']:.3f}", f"{r['coin']:.3f}") for r in rows]
        lines += ["", f"Rule {rule}:", "", table(cells, ("threshold", "large share", "quality", "random, same share"))]
    return lines


@contextmanager
def curve_axes(path: Path) -> Iterator[Any]:
    """Axes for mean quality over the share of large calls; afterwards the figure is saved at `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), dpi=120)
    axes.set(xlabel="share of calls to the large pool", ylabel="mean quality", xlim=(0, 1))
    yield axes
    if axes.lines:
        axes.legend(loc="lower right", fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def plot_outcomes(path: Path, quality: Mapping[str, Array], observed: Array, length: Array) -> None:
    """Plots mean quality over the share of large calls, a line for each routing."""
    with curve_axes(path) as axes:
        if len(observed) and observed.shape[1] > 1:
            small, large = observed[:, 0], observed[:, -1]
            axes.plot([0, 1], [small.mean(), large.mean()], color="0.6", linestyle="--", label="random")
            for name, score in scores_by_name(quality, length).items():
                axes.plot(*share_curve(score, small, large), label=name, linewidth=1 if name == "length" else 1.6)


def nan_to_null(value: Any) -> Any:
    """The value with None for each NaN or infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: nan_to_null(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [nan_to_null(part) for part in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
