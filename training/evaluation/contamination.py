"""Which questions a checkpoint was fitted on, so that nobody measures it on them unawares."""

from __future__ import annotations

import base64
import hashlib
import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator.checkpoint import Manifest
from depo_gateway.estimator.records.types import Example
from depo_gateway.training.outcomes.table import question_key

FINGERPRINTS = 16_384  # a checkpoint remembers so many of the questions it was fitted on: 170 KiB


def fingerprints(examples: Sequence[Example]) -> str:
    """Base64 of 8 bytes of each question's sha256, sorted. Of many questions the lowest, which are a fair sample."""
    hashes = sorted({_fingerprint(example) for example in examples})
    return base64.b64encode(b"".join(hashes[:FINGERPRINTS])).decode()


def fitted_share(examples: Sequence[Example], manifest: Manifest) -> float | None:
    """The share of examples whose question the checkpoint was fitted on; None if it doesn't say which those are."""
    stored = manifest.metrics.get("fitted_on")
    if not isinstance(stored, str):
        return None
    data = base64.b64decode(stored)
    fitted = {data[start : start + 8] for start in range(0, len(data), 8)}
    last = max(fitted) if len(fitted) >= FINGERPRINTS else b"\xff" * 8  # beyond it nothing was stored
    known = [found for found in map(_fingerprint, examples) if found <= last]
    return sum(found in fitted for found in known) / len(known) if known else None


def known_of(examples: Sequence[Example], manifest: Manifest) -> NDArray[np.bool_]:
    """Which examples (N,) ask a question that the checkpoint remembers having been fitted on."""
    stored = manifest.metrics.get("fitted_on")
    data = base64.b64decode(stored) if isinstance(stored, str) else b""
    fitted = {data[start : start + 8] for start in range(0, len(data), 8)}
    return np.array([_fingerprint(example) in fitted for example in examples], bool)


def surely_new_to(examples: Sequence[Example], manifest: Manifest) -> NDArray[np.bool_]:
    """Which examples (N,) ask a question that the checkpoint was not fitted on, for all that it says: of those that it
    would have forgotten, none.
    """
    stored = manifest.metrics.get("fitted_on")
    data = base64.b64decode(stored) if isinstance(stored, str) else b""
    full = len(data) >= 8 * FINGERPRINTS
    told = np.array([not full or _fingerprint(example) <= data[-8:] for example in examples], bool)
    fresh: NDArray[np.bool_] = told & ~known_of(examples, manifest)
    return fresh


def warn_of_fitted(command: str, share: float | None) -> None:
    """One line on stderr if some of the prompts are those the checkpoint was fitted on."""
    if share:
        sys.stderr.write(
            f"depo-train {command}: the checkpoint was fitted on {share:.1%} of these prompts, and looks better on"
            " those than it is; use others\n"
        )


def _fingerprint(example: Example) -> bytes:
    return hashlib.sha256(question_key(example.prompt).encode()).digest()[:8]
