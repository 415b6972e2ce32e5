"""The command `depo-train refresh`: one refresh, or with --follow one after another. Torch waits until it is needed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depo_gateway.estimator.records.store import Store
from depo_gateway.estimator.records.types import Labelled
from depo_gateway.training.online import checkpoint_retention
from depo_gateway.training.online import settings as learner_settings
from depo_gateway.training.online.reference_set import reference_rows
from depo_gateway.training.online.refresh_config import NO_TEXT, REFUSALS

if TYPE_CHECKING:
    from depo_gateway.training.online.refresh import Outcome


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--records", metavar="URL", help="the gateways' database; here or in --config")
    parser.add_argument(
        "--base", required=True, type=Path, metavar="DIR", help="the checkpoint to start from, or builtin"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="directory of checkpoints and `current`")
    parser.add_argument("--config", type=Path, metavar="FILE", help="learner.yaml")
    parser.add_argument(
        "--cold", action="store_true", help="while --out has no `current`, begin with fresh heads on --base's encoder"
    )
    parser.add_argument("--follow", action="store_true", help="stay, shadow and judge too, and refresh again and again")
    parser.add_argument(
        "--publish",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let `current` in --out name the new checkpoint (on)",
    )


def run(args: argparse.Namespace) -> int:
    """The command: 0 published (or written, with --no-publish), 1 refused, with the reasons on stderr."""
    if args.follow:
        from depo_gateway.training.online import daemon

        code: int = daemon.run(args)
        return code
    settings = learner_settings.load_settings(args.config, args.records)
    from depo_gateway.training.online.refresh import refresh

    with checkpoint_retention.held(args.out):
        labelled = labelled_of(learner_settings.database_url(settings.records), settings.refresh.learn.newest)
        reference = reference_rows(settings, args.base, args.out)
        outcome = refresh(
            labelled, args.base, args.out, settings.refresh.learn, reference, cold=args.cold, publish=args.publish
        )
    for note in outcome.notes:
        sys.stderr.write(f"depo-train refresh: {note}\n")
    if outcome.published is None:
        reasons = "; ".join(outcome.verdict.reasons)
        sys.stderr.write(f"depo-train refresh: refused, {reasons}; {args.out / REFUSALS} has the figures\n")
        return 1
    sys.stdout.write(told(outcome))
    return 0


def labelled_of(url: str, newest: int) -> list[Labelled]:
    """The newest labelled records. Raises ValueError where there are no records, or none with its text."""
    store = Store(url)
    try:
        store.create()
        records, asked = store.count_records()
        if not records:
            raise ValueError(
                f"there are no records yet in {store.name}: name the database of records.url in gateway.yaml, and let"
                " traffic come in"
            )
        if not asked:
            raise ValueError(NO_TEXT)
        return store.labelled(newest)
    finally:
        store.close()


def told(outcome: Outcome) -> str:
    """What a published refresh prints."""
    assert outcome.published is not None
    figures = outcome.verdict.figures
    newest = figures["newest"]
    lines = [
        f"{outcome.labels} labelled prompts, from {figures['start']}, {figures['epochs']} epochs",
        f"newest {newest['prompts']} held-out prompts: {compared(newest)}",
    ]
    if "reference" in figures:
        lines.append(f"reference, {figures['reference']['prompts']} prompts: {compared(figures['reference'])}")
    errors = ", ".join(
        f"{name} {error:.3f} (at most {figures['calibration_bound'][name]:.3f})"
        for name, error in figures["calibration_error"].items()
    )
    return "\n".join(
        [*lines, f"calibration error: {errors}", f"{outcome.place}: checkpoint {outcome.published.version}", ""]
    )


def compared(figures: Mapping[str, Any]) -> str:
    """Candidate against champion, in words."""
    point, low, high = figures["area_difference"]
    said = f"quality averaged over all shares {point:+.4f} [{low:+.4f}, {high:+.4f}] against the champion"
    if "apgr" in figures:
        said = f"APGR {figures['apgr']:.3f}, the champion's {figures['rival_apgr']:.3f}; {said}"
    return said
