"""Report on the held-out predictions of a fit: how prompts were routed by models that were not fitted on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from depo_gateway.estimator.calibration import STAGES, Calibration, calibrate_quality
from depo_gateway.estimator.heads import labels_by_head
from depo_gateway.estimator.records.types import Example
from depo_gateway.training.evaluation.markdown import apgr_table
from depo_gateway.training.evaluation.report import outcome_report
from depo_gateway.training.evaluation.routing_metrics import ApgrEstimate
from depo_gateway.training.fitting.cross_fit import Fit
from depo_gateway.training.fitting.foldings import groups_of

HELD_OUT = ("questions", "groups")  # names of the foldings of foldings_of
FEW_EXAMPLES, FEW_GROUPS = 50, 10  # below these the text says that the figures are not reliable


def held_out_reports(examples: Sequence[Example], fit: Fit, calibrated: Calibration) -> dict[str, dict[str, Any]]:
    """Reports by name of the folding. Scores of question folds are centred; intervals of groups resample groups."""
    pools = calibrated.pools
    observed = labels_by_head(examples, pools)["quality"]
    length = np.array([len(example.prompt) for example in examples], float)
    reports = {}
    for name, held_out, folds in zip(HELD_OUT, fit.held_out, fit.foldings, strict=False):
        quality = {stage: calibrate_quality(calibrated.stages[stage], getattr(held_out, stage)) for stage in STAGES}
        by_group = name == "groups"
        reports[name] = outcome_report(
            quality,
            observed,
            length,
            pools,
            folds=None if by_group else folds,
            groups=groups_of(examples) if by_group else None,
        )
    return reports


def held_out_text(name: str, report: Mapping[str, Any]) -> str:
    """One report in words: its figures, and how reliable they are."""
    if "apgr" not in report:
        return f"{report['prompts']} prompts; none has labels of two pools, so there is no routing to measure\n"
    title = f"Held-out {name}: {report['with_all_labels']} prompts"
    if "groups" in report:
        title += f" in {report['groups']} groups"
    title += f", all small {report['small_quality']:.3f}, all large {report['large_quality']:.3f}"
    if np.isnan(report["perfect_apgr"]):
        return f"{title}: the large pool is no better than the small one, so there is no gap to measure\n\n"
    estimates = {key: ApgrEstimate(**of) for key, of in report["apgr"].items() if key != "random"}
    remarks = []
    if report["with_all_labels"] < FEW_EXAMPLES:
        remarks.append(f"Fewer than {FEW_EXAMPLES} prompts with labels of every pool: these figures are not reliable.")
    if report.get("groups", FEW_GROUPS) < FEW_GROUPS:
        remarks.append(f"With fewer than {FEW_GROUPS} groups, intervals are rough and usually too narrow.")
    if not estimates["gain (full)"].difference_low > 0:
        remarks.append(f"With {name} held out, gain is not shown to route better than prompt length does.")
    return "\n\n".join([f"{title}, perfect APGR {report['perfect_apgr']:.3f}", apgr_table(estimates), *remarks, ""])
