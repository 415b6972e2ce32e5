"""standing.json: the router's advantage over random routing on recent labels. The learner writes, gateways read."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depo_gateway.estimator import checkpoint
from depo_gateway.estimator.json_file import read_json, replace_json

STANDING = "standing.json"


@dataclass(frozen=True, slots=True)
class Standing:
    """One checkpoint's router on recent labels, compared with random routing at the same share."""

    version: str  # of the checkpoint
    time: float  # Unix seconds
    labels: int
    advantage: float  # the router's mean quality minus random routing's
    low: float  # ends of the advantage's interval
    high: float
    beats_random: bool  # False: gateways that serve `version` route at random, by share
    large_share: float  # the last pool's share of the calls measured


def write_standing(directory: Path, standing: Standing) -> None:
    """Replaces the file in a directory of checkpoints, atomically."""
    replace_json(directory / STANDING, dataclasses.asdict(standing))


def read_standing(directory: Path) -> Standing | None:
    """The standing in a directory of checkpoints; None without the file.

    Raises:
        ValueError: one sentence: why the file can't be used.
    """
    place = directory / STANDING
    try:
        raw = read_json(place)
    except FileNotFoundError:
        return None
    if not isinstance(raw, dict):
        raise ValueError(f"{place} is not a standing: it holds no mapping")
    values = {}
    for field in dataclasses.fields(Standing):
        if field.name not in raw:
            raise ValueError(f"{place} is not a standing: it lacks {field.name!r}")
        values[field.name] = _checked(field.name, str(field.type), raw[field.name], place)
    if not 0.0 <= values["large_share"] <= 1.0:
        raise ValueError(f"{place} says large_share: {values['large_share']}; it must be between 0 and 1")
    return Standing(**values)


def checkpoints_directory(place: str) -> Path | None:
    """The directory of checkpoints behind `estimator.path`: the one with `current`, or a single checkpoint's parent.

    None for the shipped estimator, which no learner measures.
    """
    if place == "builtin":
        return None
    path = Path(place)
    return path if path.is_dir() and not (path / checkpoint.MANIFEST).is_file() else path.parent


def _checked(name: str, kind: str, value: Any, place: Path) -> Any:
    types = {"str": (str,), "bool": (bool,), "int": (int,), "float": (int, float)}[kind]
    wrong = not isinstance(value, types) or (isinstance(value, bool) and kind != "bool")
    if wrong or (kind == "float" and not math.isfinite(value)):
        raise ValueError(f"{place} says {name}: {value!r}; it must be of type {kind}")
    return value
