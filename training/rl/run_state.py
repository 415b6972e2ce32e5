"""What DepoTrainer writes: the state to resume a run from, and the estimator as a checkpoint for the gateway."""

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
from depo_gateway.estimator.heads import QUALITY
from depo_gateway.estimator.learner import Learner
from depo_gateway.estimator.model import select_pools
from depo_gateway.training.fitting.calibration import calibrate
from depo_gateway.training.rl.selection_config import POLICY
from depo_gateway.training.rl.selector import Selector
from depo_gateway.training.rl.tickets import PromptSelector

FOLDER, SELECTOR, ESTIMATOR = "depo", "selector.json", "estimator.pt"
# Version 0.1 wrote "whole" here. Under this name it does not find a state that it could not read, and says so.
BETWEEN = "between_generations"
LAST = "trainer_state.json"  # Trainer writes this file of a checkpoint last: with it, the checkpoint is whole
TORCH_WRITES = ("PytorchStreamWriter", "inline_container", "iostream")  # in torch.save's messages about a full disk
FALLBACK_PROMPTS = 64  # their scores make up the calibration's curves where no group was rolled out

log = logging.getLogger("depo")


class FinishedError(Exception):
    """The run to resume has taken all its steps."""


@contextmanager
def writing(place: Path, mine: bool = True) -> Iterator[None]:
    """Encloses the writing of a checkpoint. `mine`: this process writes Trainer's state.

    Raises OSError, which names the checkpoint to resume from, if writing fails.
    """
    try:
        if mine:
            (place / LAST).unlink(missing_ok=True)  # an earlier run's: from here on the checkpoint is not whole
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in TORCH_WRITES):
            raise
        whole = resumable(place.parent)
        usable = f"the newest to resume from is {whole[-1]}" if whole else "there is none to resume from"
        raise OSError(f"{place} could not be written ({str(error).splitlines()[0]}); {usable}") from error


def save(place: Path, selector: PromptSelector, learner: Learner | None, completions: int, whole: bool) -> None:
    """Write the state into a Trainer's checkpoint `place`. `whole`: it is between two generations, to resume from.

    Raises ValueError if the selector's state is not made of values for JSON.
    """
    folder = place / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    if learner is not None:
        with _beside(folder / ESTIMATOR) as path:
            torch.save(learner.state_dict(), path)
    state = {BETWEEN: whole, "completions": completions, "selector": selector.state_dict()}
    try:
        text = json.dumps(state)
    except TypeError as error:
        raise ValueError(
            f"the state of the selector {type(selector).__name__} cannot be saved as JSON: {error}"
        ) from None
    with _beside(folder / SELECTOR) as path:
        path.write_text(text, encoding="utf-8")


def restore(place: Path, selector: PromptSelector, learner: Learner | None) -> int:
    """Bring selector and learner into the state of save(). Returns the completions generated until then.

    Raises ValueError for a place that is no such checkpoint, or one of a run with other settings.
    """
    if not _readable(place):
        raise ValueError(
            f"{place} cannot be resumed from: it is no whole checkpoint of DepoTrainer, or was written in the middle "
            "of a generation"
        )
    state = json.loads((place / FOLDER / SELECTOR).read_text(encoding="utf-8"))
    selector.load_state_dict(state["selector"])
    if learner is not None:
        # weights_only: reads tensors and plain values, runs no pickled code
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
    """Write the policy's estimator as a checkpoint under `root`, and let `current` name it. Returns its directory.

    `limit`: how many older checkpoints stay (None: all).
    """
    place = root / f"step-{step}"
    number = 2
    while place.exists():  # an earlier run's, which a gateway may serve
        place = root / f"step-{step}-{number}"
        number += 1
    recent = selector.beliefs.recent
    logits = np.array([label.logit for label in recent])
    rates = np.array([label.pass_rate for label in recent])
    weights = np.array([label.weight for label in recent])
    if not recent:
        logits = learner.score(selector.prompts[: min(FALLBACK_PROMPTS, len(selector.prompts))])[:, 0, QUALITY]
        rates, weights = np.full(len(logits), np.nan), np.ones(len(logits))
    heads = learner.model.config.heads
    full = np.zeros((len(logits), 1, len(heads)))
    full[:, 0, QUALITY] = logits
    labels = dict.fromkeys(heads, np.full((len(logits), 1), np.nan)) | {"quality": rates[:, None]}
    calibrated = calibrate(full, full, labels, weights, (POLICY,))
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
    """A temporary file that replaces `path` once it is written whole."""
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
        return bool(isinstance(last, dict) and (state[BETWEEN] if BETWEEN in state else state["whole"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False
