"""The report of `depo-train evaluate --outcomes`: every prompt's outcome with each pool is known.

Shapes: N prompts, K pools cheapest first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.heads import labels_by_head
from depo_gateway.estimator.records.types import Example
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.training.evaluation.contamination import (
    UnseenPrompts,
    fitted_share,
    unseen_prompts,
    warn_of_contamination,
)
from depo_gateway.training.evaluation.front_page import method_blocks, source_blocks, threshold_blocks
from depo_gateway.training.evaluation.group_option import chosen_groups
from depo_gateway.training.evaluation.headline import FEW_PROMPTS, Evidence, headline
from depo_gateway.training.evaluation.measurement import (
    definitions,
    fitted_note,
    model_lists,
    models_note,
    routing_note,
    sweep_rows,
)
from depo_gateway.training.evaluation.page import Block, Heading, Paragraph, Report
from depo_gateway.training.evaluation.predictions import prompt_logits, resolve_pools, stage_qualities, write_scores
from depo_gateway.training.evaluation.report import outcome_report, part_blocks
from depo_gateway.training.evaluation.reported_routing import (
    ReportedRouting,
    default_routing,
    read_routing,
    with_target_met,
)
from depo_gateway.training.evaluation.threshold_sweep import differing_outcomes, sweep_outcomes, sweep_thresholds
from depo_gateway.training.evaluation.unfamiliar_prompts import deciding_quality, unfamiliar_note, unfamiliar_share
from depo_gateway.training.outcomes.table import (
    Row,
    cut_off_models,
    cut_off_warning,
    examples_of,
    question_key,
    read_tables,
)

FEW_GROUPS = 10  # with fewer, a bootstrap of whole groups is rough


@dataclass(frozen=True, slots=True)
class ScoredOutcomes:
    """N prompts with their predicted and observed qualities."""

    quality: Mapping[str, Array]  # by stage, (N, K)
    unfamiliar: NDArray[np.bool_]  # (N,) to the full stage
    deciding: Array  # (N, K) what routing goes by in the full stage: the quality, if no prompt is unfamiliar
    observed: Array  # (N, pools)
    length: Array  # (N,) characters
    groups: tuple[str, ...]  # (N,): related prompts have the same
    sources: NDArray[np.str_]  # (N,)

    def select(self, rows: NDArray[np.bool_]) -> ScoredOutcomes:
        quality = {stage: of[rows] for stage, of in self.quality.items()}
        groups = tuple(group for group, kept in zip(self.groups, rows, strict=True) if kept)
        arrays = ("unfamiliar", "deciding", "observed", "length", "sources")
        selected = {name: getattr(self, name)[rows] for name in arrays}
        return replace(self, quality=quality, groups=groups, **selected)

    @property
    def complete(self) -> NDArray[np.bool_]:
        """(N,): whether every pool has a label."""
        return np.asarray(~np.isnan(self.observed).any(1))


def report_on_outcomes(args: argparse.Namespace, runtime: Runtime, scores: Path) -> Report:
    """The report on outcome tables; writes the scores of every prompt to `scores`."""
    pools = resolve_pools(args.pools, runtime.manifest)
    rows = read_tables(args.outcomes)
    cut_off = cut_off_models(rows, pools)
    if cut_off:
        sys.stderr.write(f"depo-train evaluate: {cut_off_warning(cut_off)}\n")
    examples = examples_of(rows, pools)
    unseen = UnseenPrompts.everything(len(examples))
    if args.include_fitted:
        warn_of_contamination("evaluate", fitted_share(examples, runtime.manifest))
    else:
        unseen = unseen_prompts(examples, runtime.manifest)
    routing = read_routing(args, pools.names, default_routing(runtime.pools))
    groups = chosen_groups([row.group for row in rows], args.groups, runtime.manifest, "evaluate")
    kept = [example for example, unfitted in zip(examples, unseen.kept, strict=True) if unfitted]
    scored = _scored_outcomes(rows, groups, kept, pools.names, runtime, scores)
    grouped = any(example.group for example in kept)
    routing = with_target_met(routing, runtime.calibration, scored.deciding, np.ones(len(scored.observed)))
    figures: dict[str, Any] = {
        "checkpoint": runtime.version,
        "outcomes": [str(path) for path in args.outcomes],
        "pools": dict(zip(pools.names, pools.models, strict=True)),
        "fitted_share": fitted_share(kept, runtime.manifest),
        "left_out": unseen.left_out(),
        "cut_off": cut_off,
        **_measured(scored, routing, pools.names, grouped),
        "all": _part(scored, runtime, grouped),
    }
    names = sorted(set(scored.sources.tolist()))
    if len(names) > 1:
        of_sources = {name: scored.select(scored.sources == name) for name in names}
        figures["sources"] = {
            name: _part(own, runtime, grouped) | _in_force(own, routing, pools.names, grouped)
            for name, own in of_sources.items()
        }
    return Report(figures, pools.names, *_pages(figures, pools.names, routing, scores.name, grouped))


def _scored_outcomes(
    rows: Sequence[Row],
    groups: Sequence[str],
    examples: Sequence[Example],
    pools: tuple[str, ...],
    runtime: Runtime,
    scores: Path,
) -> ScoredOutcomes:
    """The examples with their predictions; writes the scores of every row to `scores`.

    Args:
        groups: of each row, by which the checkpoint scores. A question of several has that of its first row.
    """
    scores.parent.mkdir(parents=True, exist_ok=True)
    named = [(row.question, row.context, group) for row, group in zip(rows, groups, strict=True)]
    index_of = {prompt: index for index, prompt in enumerate(dict.fromkeys(named))}
    logits = prompt_logits(runtime, [prompt[:2] for prompt in index_of], [group for *_, group in index_of])
    stages = stage_qualities(runtime, logits)
    of_rows = np.array([index_of[prompt] for prompt in named])
    questions = [row.question for row in rows]
    write_scores(scores, questions, stages["full"][of_rows], logits.unfamiliar[of_rows], runtime.pools)
    first = {(question, context): index_of[question, context, group] for question, context, group in reversed(named)}
    of_examples = np.array([first[example.prompt, example.context] for example in examples])
    unfamiliar, full = logits.unfamiliar[of_examples], stages["full"][of_examples]
    source_of = {(question_key(row.question), row.context): row.source for row in rows}
    return ScoredOutcomes(
        {stage: of_prompts[of_examples] for stage, of_prompts in stages.items()},
        unfamiliar,
        deciding_quality(full, unfamiliar),
        labels_by_head(examples, pools)["quality"],
        np.array([len(example.prompt) for example in examples], float),
        tuple(example.group or _alone(example) for example in examples),
        np.array([source_of[question_key(example.prompt), example.context] for example in examples]),
    )


def _in_force(
    scored: ScoredOutcomes, routing: ReportedRouting, pools: tuple[str, ...], grouped: bool
) -> dict[str, Any]:
    """One source's figures at the threshold in force."""
    head = _measured(scored, routing, pools, grouped, [routing.threshold])["headline"]
    return {key: head[key] for key in ("measured", "in_force", "gap") if key in head}


def _measured(
    scored: ScoredOutcomes,
    routing: ReportedRouting,
    pools: tuple[str, ...],
    grouped: bool,
    thresholds: Sequence[float] | None = None,
) -> dict[str, Any]:
    """The headline, and the rows of its sweep: at `thresholds`, or over all."""
    full, complete = scored.deciding, scored.complete
    count = int(complete.sum())
    at = np.array(thresholds or sweep_thresholds(full, routing.rule, [routing.threshold]))
    sweep, differing = None, None
    if count and len(pools) > 1:
        known = scored.select(complete)
        units = np.unique(np.array(known.groups, dtype=object).astype(str), return_inverse=True)[1]
        if not grouped:
            units = np.arange(count)
        of_known = (known.observed, known.deciding, known.length)
        sweep = sweep_outcomes(*of_known, routing.rule, at, units, routing.costs)
        differing = differing_outcomes(*of_known[:2], routing.rule, routing.threshold)
    missing = "the checkpoint scores one pool, and nothing else is compared" if len(pools) == 1 else ""
    evidence = Evidence(sweep, count, missing, differing)
    tokens = np.ones(len(full))
    head = headline(evidence, routing, full, tokens, pools)
    return {
        "headline": head,
        "sweep": sweep_rows(sweep if head["measured"] else None, full, routing, at, tokens, pools),
    }


def _part(scored: ScoredOutcomes, runtime: Runtime, grouped: bool) -> dict[str, Any]:
    groups = scored.groups if grouped else None
    measured = (scored.quality, scored.observed, scored.length, runtime.pools)
    part = outcome_report(*measured, groups=groups, deciding=scored.deciding)
    return part | {"unfamiliar": unfamiliar_share(scored.unfamiliar, runtime)}


def _pages(
    figures: Mapping[str, Any], pools: tuple[str, ...], routing: ReportedRouting, scores: str, grouped: bool
) -> tuple[list[Block], list[Block], list[Block]]:
    """Beginning, tables and appendix."""
    head, part = figures["headline"], figures["all"]
    units = "whole groups of related prompts" if grouped else "prompts"
    sources = figures.get("sources", {})
    of = f" from {len(sources)} sources" if sources else ""
    measured = (
        f"Measured on {part['with_all_labels']} of {part['prompts']} prompts{of}: those with labels of every pool."
    )
    if part["with_all_labels"] == part["prompts"]:
        measured = f"Measured on {part['prompts']} prompts{of}, all with labels of every pool."
    beginning: list[Block] = [Heading(1, head["sentence"])]
    remarks = list(head["remarks"])
    if figures["cut_off"]:
        remarks.append(f"{cut_off_warning(figures['cut_off'])}.")
    if remarks:
        beginning.append(Paragraph(" ".join(remarks), strong=True))
    notes = [measured, unfamiliar_note(part["unfamiliar"]), models_note(figures["pools"]), fitted_note(figures, scores)]
    beginning.append(Paragraph(" ".join(filter(None, notes))))
    beginning.append(Paragraph(routing_note(routing, pools, "every prompt is taken to need the same number of tokens")))
    tables = threshold_blocks(head, figures["sweep"], pools)
    if sources:
        tables += source_blocks(sources, head, pools)
    elif head["measured"]:
        tables += method_blocks(part, pools)
    appendix: list[Block] = [Heading(2, "Appendix"), *map(Paragraph, definitions(units, FEW_PROMPTS))]
    appendix += map(Paragraph, model_lists(figures["pools"]))
    if grouped and part.get("groups", FEW_GROUPS) < FEW_GROUPS:
        appendix.append(Paragraph(f"With fewer than {FEW_GROUPS} groups, intervals are rough and usually too narrow."))
    appendix += [Heading(3, "All prompts"), *part_blocks(part)]
    for name, own in sources.items():
        appendix += [Heading(3, f"Source {name}"), *part_blocks(own)]
    return beginning, tables, appendix


def _alone(example: Example) -> str:
    """The name of a group of one question."""
    return f"alone {question_key(example.prompt)} {example.context}"
