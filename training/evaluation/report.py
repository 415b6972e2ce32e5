"""What is said of a checkpoint's routing where outcomes are known: figures, Markdown, a plot.

Shapes: N prompts, K pools cheapest first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator import calibration
from depo_gateway.training.evaluation.routing_metrics import (
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


def report_of(
    quality: Mapping[str, Array],
    observed: Array,
    length: Array,
    pools: tuple[str, ...],
    folds: NDArray[np.int64] | None = None,
    groups: Sequence[str] | None = None,
    weights: Array | None = None,
) -> dict[str, Any]:
    """The figures of one set of prompts: stage -> calibrated quality (N, K), against observed (N, pools asked for).

    `folds` (N,) of a cross-fit at random: scores are centred by fold. `groups` (N,): intervals resample whole groups.
    `weights` (N,): of labels, in calibration errors alone.
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
