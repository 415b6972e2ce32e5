"""What DepoTrainer writes: the state a run resumes from, and the estimator as a checkpoint that the gateway loads."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from depo_gateway.estimator import checkpoint
from depo_gateway.estimator import export as exporting
from depo_gateway.estimator.learner import Learner
from depo_gateway.estimator.model import select_pools
from depo_gateway.training.fitting.calibration import calibrate
from depo_gateway.training.rl.selection_config import POLICY
from depo_gateway.training.rl.selector import Selector

FOLDER, SELECTOR, ESTIMATOR = "depo", "selector.json", "estimator.pt"
LAST = "trainer_state.json"  # what Trainer writes last of a checkpoint: with it, the checkpoint is whole
TORCH_WRITES = ("PytorchStreamWriter", "inline_container", "iostream")  # in torch.save's words for a full disk
SAMPLE = 64  # prompts whose scores stand in where nothing has been observed

log = logging.getLogger("depo")


class FinishedError(Exception):
    """The run that is resumed has taken all its steps."""


@contextmanager
def writing(place: Path, mine: bool = True) -> Iterator[None]:
    """While a checkpoint is written; `mine`: this process writes Trainer's state.

    Raises OSError, saying what a run can resume from, if that fails.
    """
    try:
        if mine:
            (place / LAST).unlink(missing_ok=True)  # of a run before: from here on it is not whole
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in TORCH_WRITES):
            raise
        left = resumable(place.parent)
        usable = f"the newest to resume from is {left[-1]}" if left else "there is none to resume from"
        raise OSError(f"{place} could not be written ({str(error).splitlines()[0]}); {usable}") from error


def save(place: Path, selector: Selector, learner: Learner | None, completions: int, whole: bool) -> None:
    """Write the state into a Trainer's checkpoint `place`. `whole`: between two generations, so a run can resume."""
    folder = place / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    if learner is not None:
        with _beside(folder / ESTIMATOR) as path:
            torch.save(learner.state_dict(), path)
    state = {"whole": whole, "completions": completions, "selector": selector.state_dict()}
    with _beside(folder / SELECTOR) as path:
        path.write_text(json.dumps(state), encoding="utf-8")


def load(place: Path, selector: Selector, learner: Learner | None) -> int:
    """Put selector and learner where save() took them; completions generated until then.

    Raises ValueError for what is no such checkpoint, or one of other settings.
    """
    if not _readable(place):
        raise ValueError(
            f"{place} can't be resumed from: it is no checkpoint of DepoTrainer, only part of one, or was written in "
            "the middle of a generation"
        )
    state = json.loads((place / FOLDER / SELECTOR).read_text(encoding="utf-8"))
    selector.load_state_dict(state["selector"])
    if learner is not None:
        # weights_only: tensors and plain values, no pickled code
        learner.load_state_dict(torch.load(place / FOLDER / ESTIMATOR, map_location="cpu", weights_only=True))
    return int(state["completions"])


def newest(output_dir: Path) -> Path:
    """The newest checkpoint that is whole. Raises ValueError if there is none."""
    found = resumable(output_dir)
    if not found:
        raise ValueError(f"{output_dir} has no checkpoint to resume from")
    return found[-1]


def resumable(output_dir: Path) -> list[Path]:
    """The checkpoints to resume from, oldest first."""
    found = [place for place in output_dir.glob("checkpoint-*") if place.name.split("-")[1].isdigit()]
    return sorted(filter(_readable, found), key=lambda place: int(place.name.split("-")[1]))


def export(root: Path, step: int, learner: Learner, selector: Selector, limit: int | None) -> Path:
    """Write the policy's estimator as a checkpoint under `root` and make `current` name it; its place.

    Of older ones `limit` are kept (None: all).
    """
    place = root / f"step-{step}"
    again = 2
    while place.exists():  # of a run before, and perhaps served
        place = root / f"step-{step}-{again}"
        again += 1
    recent = np.array([label[:4] for label in selector.beliefs.recent]).reshape(-1, 4)
    logits, rates, weights = recent[:, 0], recent[:, 1], recent[:, 3]
    if not len(recent):
        some = selector.prompts[: min(SAMPLE, len(selector.prompts))]
        logits = learner.score(some)[:, 0, 0]
        rates, weights = np.full(len(logits), np.nan), np.ones(len(logits))
    full = np.stack([logits, np.zeros(len(logits))], axis=1)[:, None]
    unknown = np.full((len(logits), 1), np.nan)
    calibrated = calibrate(full, full, rates[:, None], unknown, weights, (POLICY,))
    metrics = {"trained_by": "depo-train rl", "steps": step, "labels": len(recent)}
    with learner.averaged() as model:
        exporting.export_checkpoint(
            place, select_pools(model, [POLICY]), learner.tokenizer, calibrated, metrics, learner.trained
        )
    checkpoint.publish(place)
    for old in sorted(root.glob("step-*"), key=os.path.getmtime)[: -limit if limit else 0]:
        if old != place:
            shutil.rmtree(old)
    return place


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A place to write to that becomes `path` once it is written whole."""
    beside = path.with_name(f".{path.name}")
    try:
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _readable(place: Path) -> bool:
    try:
        last, state = (
            json.loads(part.read_text(encoding="utf-8")) for part in (place / LAST, place / FOLDER / SELECTOR)
        )
        return bool(isinstance(last, dict) and state["whole"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
