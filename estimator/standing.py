"""What labels say of the router in service: standing.json beside the checkpoints. The learner writes, gateways read."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depo_gateway.estimator import checkpoint

STANDING = "standing.json"


@dataclass(frozen=True, slots=True)
class Standing:
    """The router of one checkpoint on recent labels, against a coin that sends each pool the same share."""

    version: str  # of the checkpoint
    time: float  # Unix seconds
    labels: int
    advantage: float  # mean quality of the router minus the coin's
    low: float  # of the advantage's interval
    high: float
    beats_random: bool  # False: gateways that serve `version` route by share
    large_share: float  # of the calls it was measured on, the last pool's


def write_standing(directory: Path, standing: Standing) -> None:
    """Replaces the file in a checkpoints directory, atomically."""
    beside = directory / f".{STANDING}.{os.getpid()}"
    with open(beside, "w", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(standing), indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, directory / STANDING)


def read_standing(directory: Path) -> Standing | None:
    """The standing in a checkpoints directory, None where there is none.

    Raises:
        ValueError: one sentence that says why the file can't be used.
    """
    place = directory / STANDING
    try:
        raw = json.loads(place.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"can't read {place}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{place} is no standing: it holds no mapping")
    values = {}
    for field in dataclasses.fields(Standing):
        if field.name not in raw:
            raise ValueError(f"{place} is no standing: it lacks {field.name!r}")
        values[field.name] = _checked(field.name, str(field.type), raw[field.name], place)
    if not 0.0 <= values["large_share"] <= 1.0:
        raise ValueError(f"{place} says large_share: {values['large_share']}; it must be between 0 and 1")
    return Standing(**values)


def checkpoints_directory(place: str) -> Path | None:
    """The checkpoints directory that `estimator.path` means: where `current` lies, or a lone checkpoint's parent.

    None for the shipped estimator, which nobody measures.
    """
    if place == "builtin":
        return None
    path = Path(place)
    return path if path.is_dir() and not (path / checkpoint.MANIFEST).is_file() else path.parent


def _checked(name: str, kind: str, value: Any, place: Path) -> Any:
    types = {"str": (str,), "bool": (bool,), "int": (int,), "float": (int, float)}[kind]
    wrong = not isinstance(value, types) or (isinstance(value, bool) and kind != "bool")
    if wrong or (kind == "float" and not math.isfinite(value)):
        raise ValueError(f"{place} says {name}: {value!r}; it must be of the kind {kind}")
    return value
