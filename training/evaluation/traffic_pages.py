"""The report of `depo-train evaluate --records`: a checkpoint's routing, estimated from what served traffic shows.

Shapes: N records, K pools cheapest first.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.records.types import Record
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.training.evaluation import logged_traffic
from depo_gateway.training.evaluation.calibration_data import traffic_calibration_data
from depo_gateway.training.evaluation.contamination import (
    UnseenPrompts,
    fitted_share,
    unseen_prompts,
    warn_of_contamination,
)
from depo_gateway.training.evaluation.front_page import change_blocks, threshold_blocks
from depo_gateway.training.evaluation.headline import FEW_PROMPTS, headline, percent
from depo_gateway.training.evaluation.logged_traffic import LoggedTraffic
from depo_gateway.training.evaluation.measurement import definitions, fitted_note, routing_note, sweep_rows
from depo_gateway.training.evaluation.off_policy_report import (
    METHODS,
    best_method,
    change_from_served,
    logs_blocks,
    logs_report,
    traffic_sweeps,
)
from depo_gateway.training.evaluation.page import Block, Heading, Paragraph, Report, TableBlock
from depo_gateway.training.evaluation.predictions import resolve_pools, stage_qualities, text_logits, write_scores
from depo_gateway.training.evaluation.report import outcome_report, part_blocks
from depo_gateway.training.evaluation.reported_routing import (
    ReportedRouting,
    default_routing,
    read_routing,
    with_target_met,
)
from depo_gateway.training.evaluation.routing_in_force import (
    UNKNOWN_MODEL,
    live_large_share,
    routing_in_force,
    served_models,
    threshold_periods,
)
from depo_gateway.training.evaluation.threshold_sweep import sweep_thresholds
from depo_gateway.training.evaluation.unfamiliar_prompts import deciding_quality, unfamiliar_note, unfamiliar_share

MANY_PERIODS = 12  # the newest that the appendix lists


def report_on_records(args: argparse.Namespace, runtime: Runtime, scores: Path) -> Report:
    """The report on logged traffic; writes the scores of every record's prompt to `scores`.

    Records with every pool's label (shadowed) are measured like an outcome table, besides the off-policy estimates.
    """
    pools = runtime.pools
    if args.pools is not None:
        resolve_pools(args.pools, runtime.manifest)
    read = logged_traffic.read_traffic(args.records, args.since, args.newest, pools, runtime.manifest.text)
    routing = read_routing(args, pools, _routing_of_records(read.records, pools))
    unseen = UnseenPrompts.everything(len(read.texts))
    if args.include_fitted:
        warn_of_contamination("evaluate", fitted_share(read.examples(), runtime.manifest))
    else:
        unseen = unseen_prompts(read.examples(), runtime.manifest)
    traffic = _labelled_traffic(read, unseen)
    scores.parent.mkdir(parents=True, exist_ok=True)
    logits = text_logits(runtime, read.texts, read.groups)
    stages = stage_qualities(runtime, logits)
    write_scores(scores, [prompt for prompt, _ in read.texts], stages["full"], logits.unfamiliar, pools)
    quality, unfamiliar = {stage: of[unseen.kept] for stage, of in stages.items()}, logits.unfamiliar[unseen.kept]
    deciding = deciding_quality(quality["full"], unfamiliar)
    routing = with_target_met(routing, runtime.calibration, deciding, traffic.tokens)
    served = served_models(read.records, pools)
    figures: dict[str, Any] = {
        "checkpoint": runtime.version,
        "records": traffic.source,
        "pools": {pool: [model for model in models if model != UNKNOWN_MODEL] for pool, models in served.items()},
        "served_models": served,
        "fitted_models": dict(zip(pools, resolve_pools(None, runtime.manifest).models, strict=True)),
        "live_large_share": live_large_share(read.records, pools[-1]),
        "fitted_share": fitted_share(traffic.examples(), runtime.manifest),
        "left_out": unseen.left_out(),
        **_measured(traffic, quality, deciding, routing, args.clip),
    }
    figures["all"]["unfamiliar"] = unfamiliar_share(unfamiliar, runtime)
    return Report(figures, pools, *_pages(figures, pools, routing, scores.name, read.records))


def _measured(
    traffic: LoggedTraffic, quality: Mapping[str, Array], deciding: Array, routing: ReportedRouting, clip: float
) -> dict[str, Any]:
    """The headline and everything that is estimated.

    Args:
        quality: predicted, by stage. deciding: (N, K) what routing goes by in the full stage.
    """
    pools = traffic.pools
    length = np.array([len(prompt) for prompt, _ in traffic.texts], float)
    found = traffic_sweeps(traffic, quality["full"], deciding, length, routing, clip)
    method, evidence = best_method(found, routing)
    decided = (deciding, traffic.tokens)
    if len(found.logs.pool):
        decided = (found.deciding_logs, found.tokens["doubly_robust"])
    head = headline(evidence, routing, *decided, pools)
    method = method if head["measured"] else "none"
    sweep = evidence.sweep if head["measured"] else None
    thresholds = sweep_thresholds(deciding, routing.rule, [routing.threshold])
    also = None if head["alternative"] is None else head["alternative"]["threshold"]
    conversations = [str(number) for number in traffic.conversation]
    weights = traffic_calibration_data(traffic).weights
    of_known = (quality, traffic.observed, length, pools)
    return {
        "headline": head | {"method": method},
        "sweep": sweep_rows(sweep, decided[0], routing, thresholds, decided[1], pools),
        "change": change_from_served(found, method, routing, also),
        "all": outcome_report(*of_known, groups=conversations, weights=weights, deciding=deciding),
        "logs": logs_report(found),
    }


def _routing_of_records(records: Sequence[Record], pools: tuple[str, ...]) -> ReportedRouting:
    """The routing in force when the newest records were served; the gateway's defaults where none was routed."""
    found = routing_in_force(records)
    if found is None:
        return default_routing(pools)
    costs = None
    if found.costs is not None and set(found.costs) == set(pools):
        ordered = tuple(found.costs[pool] for pool in pools)
        costs = ordered if ordered[-1] > 0 else None
    return ReportedRouting(found.rule, found.threshold, found.source, costs, found.target)


def _labelled_traffic(read: LoggedTraffic, unseen: UnseenPrompts) -> LoggedTraffic:
    """The records that the checkpoint was not fitted on. Raises ValueError where none of them has a label."""
    traffic = read.select(unseen.kept)
    if np.isnan(traffic.observed).all():
        raise ValueError(
            f"the checkpoint was fitted on {unseen.fitted + unseen.unknown} of the {len(read.texts)} usable records in"
            f" {read.source}, and none of the others has a label; wait for newer labels, or give --include-fitted"
        )
    return traffic


def _pages(
    figures: Mapping[str, Any],
    pools: tuple[str, ...],
    routing: ReportedRouting,
    scores: str,
    records: Sequence[Record],
) -> tuple[list[Block], list[Block], list[Block]]:
    """Beginning, tables and appendix."""
    head = figures["headline"]
    beginning: list[Block] = [Heading(1, head["sentence"])]
    if head["remarks"]:
        beginning.append(Paragraph(" ".join(head["remarks"]), strong=True))
    served = figures["change"]["served"]
    costs = f", at {percent(served['cost'])} of the cost of sending everything there" if "cost" in served else ""
    share = f" As served, {percent(served['large_share'])} went to {pools[-1]}{costs}." if served else ""
    unfamiliar = unfamiliar_note(figures["all"]["unfamiliar"])
    notes = [_method_note(figures), unfamiliar, _served_note(figures), fitted_note(figures, scores)]
    beginning.append(Paragraph(" ".join(filter(None, notes))))
    tokens = "a prompt's answer is taken to need as many tokens from each pool as the answer that was given"
    beginning.append(Paragraph(f"{routing_note(routing, pools, tokens)}{share}"))
    tables = threshold_blocks(head, figures["sweep"], pools) + change_blocks(figures["change"], head, pools)
    appendix: list[Block] = [Heading(2, "Appendix"), *map(Paragraph, definitions("conversations", FEW_PROMPTS))]
    appendix += _period_blocks(records)
    appendix += [Heading(3, "Prompts with labels"), *part_blocks(figures["all"])]
    return beginning, tables, [*appendix, *logs_blocks(figures["logs"], routing.threshold)]


def _method_note(figures: Mapping[str, Any]) -> str:
    """What the quality rests on, with the term off-policy."""
    logs, method = figures["logs"], figures["headline"]["method"]
    if method == "direct":
        return (
            f"Quality is measured on the {logs['complete']} records of {figures['records']} whose answers by every pool"
            " are labelled (shadowing)."
        )
    if method == "none":
        return f"Read from {figures['records']}: {logs['read']} records."
    return (
        f"Quality is an off-policy estimate ({METHODS[method]}) from {logs['weighted']} labelled records of"
        f" {figures['records']}: most show one pool's answer only, so each counts by one over the probability that this"
        " pool was chosen."
    )


def _served_note(figures: Mapping[str, Any]) -> str:
    """Which models answered, and where the checkpoint was fitted on others."""
    parts, differing = [], []
    for pool, models in figures["served_models"].items():
        named = [f"{model or 'a model that the records do not name'} ({count})" for model, count in models.items()]
        parts.append(f"{pool}: {', '.join(named)}" if named else f"{pool}: nothing")
        fitted = figures["fitted_models"][pool]
        if list(fitted) != [pool] and set(models) - {UNKNOWN_MODEL} - set(fitted):
            differing.append(f"{pool} {', '.join(fitted)}")
    note = f"Answered by (requests): {'; '.join(parts)}."
    if differing:
        note += f" The checkpoint's manifest names other models: {'; '.join(differing)}."
    live, pools = figures["live_large_share"], list(figures["served_models"])
    if live is not None:
        note += f" Where the threshold decided, random draws aside, {percent(live)} went to {pools[-1]}."
    return note


def _period_blocks(records: Sequence[Record]) -> list[Block]:
    """The settings over time, where they changed."""
    periods = threshold_periods(records)
    if len(periods) < 2:
        return []
    rows = []
    for period in periods[-MANY_PERIODS:]:
        since, until = (f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M}" for at in (period.since, period.until))
        target = "" if period.target is None else f" (target {period.target[0]} {period.target[1]:g})"
        rows.append([since, until, str(period.requests), period.rule, f"{period.threshold:.4g}{target}"])
    header = ("from (UTC)", "to", "requests", "rule", "threshold")
    note = f"The settings changed {len(periods) - 1} times; labels of all periods are used."
    return [Heading(3, "Settings over time"), Paragraph(note), TableBlock("Newest periods", header, rows)]
