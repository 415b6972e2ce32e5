"""What a publish changes for live traffic: of one that is held back, in held.json, and of one in service.

held.json names a checkpoint that the learner wrote and does not publish until its owner accepts the rise in cost. The
file is in the directory of checkpoints, beside `current`. The learner writes it, `depo-train accept` removes it, and
gateways show it.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depo_gateway.estimator.checkpoint import Manifest
from depo_gateway.estimator.json_file import read_json, replace_json
from depo_gateway.estimator.standing import Standing

HELD = "held.json"
PUBLISH_CHANGE = "publish_change"  # in the metrics of a manifest


@dataclass(frozen=True, slots=True)
class HeldPublish:
    """One checkpoint that is held back."""

    checkpoint: str  # its directory's name
    version: str
    champion: str  # the version that it was compared with; "": none was served
    time: float  # Unix seconds
    sentence: str  # what is held, the numbers, and how to accept it or raise the gate
    share_change: float  # of the large share
    cost_change: float | None  # relative to all-large's cost; None: the costs are unknown
    standing: Standing | None = None  # the checkpoint's, for standing.json once it is accepted


@dataclass(frozen=True, slots=True)
class PublishedChange:
    """What the publish of a checkpoint changed, as its manifest records it."""

    share: float  # of the large share
    cost: float | None  # relative to all-large's cost; None: the costs are unknown


def published_change(manifest: Manifest) -> PublishedChange | None:
    """None for a checkpoint whose manifest records no change: not the learner's, or the change was unknown."""
    recorded = manifest.metrics.get(PUBLISH_CHANGE)
    known = recorded if isinstance(recorded, dict) else {}
    share, cost = known.get("share_change"), known.get("cost_change")
    if not isinstance(share, int | float):
        return None
    return PublishedChange(float(share), float(cost) if isinstance(cost, int | float) else None)


def write_held(directory: Path, held: HeldPublish) -> None:
    """Replaces the file, atomically."""
    replace_json(directory / HELD, dataclasses.asdict(held))


def read_held(directory: Path) -> HeldPublish | None:
    """The checkpoint held in a directory; None where none is.

    Raises:
        ValueError: one sentence: why the file can't be used.
    """
    place = directory / HELD
    try:
        raw = read_json(place)
    except FileNotFoundError:
        return None
    try:
        return _held_of(raw)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{place} does not name a held checkpoint: {error!r}; remove it") from None


def remove_held(directory: Path) -> None:
    """Nothing is held any more."""
    (directory / HELD).unlink(missing_ok=True)


def _held_of(raw: Any) -> HeldPublish:
    texts = {name: raw[name] for name in ("checkpoint", "version", "champion", "sentence")}
    if odd := [name for name, value in texts.items() if not isinstance(value, str)]:
        raise TypeError(f"{odd[0]} is no text")
    if os.path.basename(texts["checkpoint"]) != texts["checkpoint"] or texts["checkpoint"] in ("", ".", ".."):
        raise ValueError("checkpoint is no name of a directory beside it")
    cost, standing = raw["cost_change"], raw["standing"]
    return HeldPublish(
        **texts,
        time=float(raw["time"]),
        share_change=float(raw["share_change"]),
        cost_change=None if cost is None else float(cost),
        standing=None if standing is None else Standing(**standing),
    )
