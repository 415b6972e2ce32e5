"""Contamination: which questions a checkpoint was fitted on, so that it is not unknowingly measured on them."""

from __future__ import annotations

import base64
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from depo_gateway.estimator.checkpoint import Manifest
from depo_gateway.estimator.records.types import Example
from depo_gateway.training.outcomes.table import question_key

FINGERPRINTS = 16_384  # the most questions that a checkpoint remembers: 170 KiB


def fingerprints(examples: Sequence[Example], parent: Manifest | None = None) -> str:
    """Base64 of 8 bytes of each question's sha256, sorted. Of too many questions the lowest, a uniform sample.

    `parent`: the checkpoint whose weights the fit began with; its questions are fitted as well.
    """
    before = set() if parent is None else _recorded(parent)[0]
    hashes = sorted({_fingerprint(example) for example in examples} | before)
    return base64.b64encode(b"".join(hashes[:FINGERPRINTS])).decode()


def fitted_share(examples: Sequence[Example], manifest: Manifest) -> float | None:
    """The share of examples whose question the checkpoint was fitted on; None if its manifest does not record those."""
    if not isinstance(manifest.metrics.get("fitted_on"), str):
        return None
    fitted, last = _recorded(manifest)
    known = [found for found in map(_fingerprint, examples) if found <= last]
    return sum(found in fitted for found in known) / len(known) if known else None


def fitted_on(examples: Sequence[Example], manifest: Manifest) -> NDArray[np.bool_]:
    """Which examples (N,) ask a question that the checkpoint is recorded to have been fitted on."""
    fitted, _ = _recorded(manifest)
    return np.array([_fingerprint(example) in fitted for example in examples], bool)


def certainly_unseen(examples: Sequence[Example], manifest: Manifest) -> NDArray[np.bool_]:
    """Which examples (N,) ask a question that would be recorded if the checkpoint had been fitted on it, and is not."""
    fitted, last = _recorded(manifest)
    found = [_fingerprint(example) for example in examples]
    return np.array([fingerprint <= last and fingerprint not in fitted for fingerprint in found], bool)


@dataclass(frozen=True, slots=True)
class UnseenPrompts:
    """Which of N prompts a checkpoint was not fitted on, and how many of the others there are."""

    kept: NDArray[np.bool_]  # (N,)
    fitted: int  # recorded to have been fitted on
    unknown: int  # may have been: the checkpoint records only a sample of what it was fitted on

    @classmethod
    def everything(cls, count: int) -> UnseenPrompts:
        """All of N prompts, whatever the checkpoint was fitted on."""
        return cls(np.ones(count, bool), 0, 0)

    def left_out(self) -> dict[str, int]:
        """The prompts that are not kept, by reason."""
        return {"fitted": self.fitted, "unknown": self.unknown}


def unseen_prompts(examples: Sequence[Example], manifest: Manifest) -> UnseenPrompts:
    """The prompts that the checkpoint certainly was not fitted on; all, where its manifest records nothing.

    Raises ValueError where none is left.
    """
    count = len(examples)
    if not isinstance(manifest.metrics.get("fitted_on"), str):
        return UnseenPrompts.everything(count)
    unseen, fitted = certainly_unseen(examples, manifest), fitted_on(examples, manifest)
    found = UnseenPrompts(unseen, int(fitted.sum()), int((~fitted & ~unseen).sum()))
    if not unseen.any():
        which = "" if not found.unknown else f" or may have been fitted on {found.unknown} of them: it records a sample"
        raise ValueError(
            f"the checkpoint was fitted on {'all ' if not found.unknown else ''}{found.fitted} of these {count} prompts"
            f"{which}, so they don't show how it routes new ones; give other prompts, or --include-fitted"
        )
    return found


def warn_of_contamination(command: str, share: float | None) -> None:
    """Writes one line to stderr if the checkpoint was fitted on some of the prompts."""
    if share:
        sys.stderr.write(
            f"depo-train {command}: the checkpoint was fitted on {share:.1%} of these prompts, and results on those are"
            " optimistic; use other prompts\n"
        )


def _recorded(manifest: Manifest) -> tuple[set[bytes], bytes]:
    """The fingerprints in a manifest, and the largest one up to which all questions are recorded."""
    stored = manifest.metrics.get("fitted_on")
    data = base64.b64decode(stored) if isinstance(stored, str) else b""
    fitted = {data[start : start + 8] for start in range(0, len(data), 8)}
    return fitted, max(fitted) if len(fitted) >= FINGERPRINTS else b"\xff" * 8


def _fingerprint(example: Example) -> bytes:
    return hashlib.sha256(question_key(example.prompt).encode()).digest()[:8]
