"""The command `depo-train refresh`: one refresh, or with --follow one after another. Imports torch only when needed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depo_gateway.estimator.configuration.shared import database_url
from depo_gateway.estimator.records.store import Store
from depo_gateway.estimator.records.types import Labelled
from depo_gateway.training.online import checkpoint_retention
from depo_gateway.training.online import settings as learner_settings
from depo_gateway.training.online.reference_set import reference_rows
from depo_gateway.training.online.refresh_config import NO_TEXT, REFUSALS

if TYPE_CHECKING:
    from depo_gateway.training.online.publication import RefreshResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--records", metavar="URL", help="the gateways' database; required here or in --config")
    parser.add_argument(
        "--base", required=True, type=Path, metavar="DIR", help="the checkpoint to start from, or builtin"
    )
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="directory of checkpoints, in which `current` names the one that is served",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="learner.yaml")
    parser.add_argument(
        "--cold", action="store_true", help="while --out has no `current`, start from fresh heads on --base's encoder"
    )
    parser.add_argument(
        "--follow",
        action="store_true",
        help="keep running: shadow, judge, and refresh again whenever there are new labels",
    )
    parser.add_argument(
        "--max-cost-increase",
        type=float,
        metavar="X",
        help="hold back a checkpoint that raises the cost by more than this part of all-large's (0.1)",
    )
    parser.add_argument(
        "--publish",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let `current` in --out name the new checkpoint (on)",
    )


def run(args: argparse.Namespace) -> int:
    """The command: 0 published (or written, with --no-publish), 1 refused or held back, with the reasons on stderr."""
    if args.follow:
        from depo_gateway.training.online import daemon

        code: int = daemon.run_daemon(args)
        return code
    settings = learner_settings.load_settings(args.config, args.records, args.max_cost_increase)
    from depo_gateway.training.online.publication import owner_terms
    from depo_gateway.training.online.refresh import refresh

    with checkpoint_retention.directory_lock(args.out):
        store = Store(database_url(settings.records))
        try:
            labelled = read_labelled(store, settings.refresh.learn.newest)
            terms = owner_terms(store, settings, args.publish)
        finally:
            store.close()
        reference = reference_rows(settings, args.base, args.out)
        result = refresh(labelled, args.base, args.out, settings.refresh.learn, reference, cold=args.cold, terms=terms)
    for note in result.notes:
        sys.stderr.write(f"depo-train refresh: {note}\n")
    if result.held is not None:
        sys.stderr.write(f"depo-train refresh: {result.held.sentence}\n")
        return 1
    if result.published is None:
        reasons = "; ".join(result.verdict.reasons)
        sys.stderr.write(f"depo-train refresh: refused, {reasons}; {args.out / REFUSALS} has the figures\n")
        return 1
    sys.stdout.write(published_text(result))
    return 0


def read_labelled(store: Store, newest: int) -> list[Labelled]:
    """The newest labelled records. Raises ValueError where there are no records, or none with its prompt."""
    store.create()
    records, with_text = store.count_records()
    if not records:
        raise ValueError(
            f"there are no records yet in {store.name}: give the address in records.url of gateway.yaml, and"
            " let traffic come in"
        )
    if not with_text:
        raise ValueError(NO_TEXT)
    return store.labelled(newest)


def published_text(result: RefreshResult) -> str:
    """The lines that a published refresh prints."""
    assert result.published is not None
    figures = result.verdict.figures
    newest = figures["newest"]
    lines = [
        f"{result.labels} labelled prompts, from {figures['start']}, {figures['epochs']} epochs",
        f"newest {newest['prompts']} held-out prompts: {compare_text(newest)}",
    ]
    if "reference" in figures:
        lines.append(f"reference, {figures['reference']['prompts']} prompts: {compare_text(figures['reference'])}")
    errors = ", ".join(
        f"{name} {error:.3f} (at most {figures['calibration_bound'][name]:.3f})"
        for name, error in figures["calibration_error"].items()
    )
    if result.change is not None:
        lines.append(f"live traffic: {result.change.describe()}; known from {result.change.source}")
    return "\n".join(
        [*lines, f"calibration error: {errors}", f"{result.place}: checkpoint {result.published.version}", ""]
    )


def compare_text(figures: Mapping[str, Any]) -> str:
    """One line that compares candidate and champion."""
    point, low, high = figures["area_difference"]
    text = f"mean quality {point:+.4f} [{low:+.4f}, {high:+.4f}] against the champion"
    if "apgr" in figures:
        text = f"APGR {figures['apgr']:.3f}, the champion's {figures['rival_apgr']:.3f}; {text}"
    return text
