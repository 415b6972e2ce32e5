import dataclasses
from pathlib import Path

import pytest

from depo_gateway.estimator import checkpoint
from depo_gateway.estimator.checkpoint import Manifest
from depo_gateway.estimator.records.types import Example
from depo_gateway.training.evaluation.contamination import (
    certainly_unseen,
    fingerprints,
    fitted_on,
    fitted_share,
    unseen_prompts,
)

FITTED, NEW = ([Example(f"{name} {i}", {}) for i in range(1000)] for name in ("fitted", "new"))


@pytest.fixture
def manifest(tiny_checkpoint: Path) -> Manifest:
    loaded = checkpoint.load_manifest(tiny_checkpoint)
    return dataclasses.replace(loaded, metrics={"fitted_on": fingerprints(FITTED)})


def test_questions_that_were_fitted_on_are_known(manifest: Manifest) -> None:
    mixed = FITTED[:3] + NEW[:2]
    assert fitted_share(mixed, manifest) == 0.6
    assert fitted_on(mixed, manifest).tolist() == [True] * 3 + [False] * 2
    assert certainly_unseen(mixed, manifest).tolist() == [False] * 3 + [True] * 2


def test_a_manifest_without_a_record_says_nothing(manifest: Manifest) -> None:
    silent = dataclasses.replace(manifest, metrics={})
    assert fitted_share(FITTED, silent) is None
    assert not fitted_on(FITTED, silent).any()


def test_a_continued_checkpoint_remembers_its_parents_questions(
    monkeypatch: pytest.MonkeyPatch, manifest: Manifest
) -> None:
    child = dataclasses.replace(manifest, metrics={"fitted_on": fingerprints(NEW[:2], manifest)})
    assert fitted_on([FITTED[0], NEW[0], NEW[2]], child).tolist() == [True, True, False]
    monkeypatch.setattr("depo_gateway.training.evaluation.contamination.FINGERPRINTS", 64)
    parent = dataclasses.replace(manifest, metrics={"fitted_on": fingerprints(FITTED)})
    assert fingerprints(NEW, parent) == fingerprints(FITTED + NEW)  # of two samples still the lowest


def test_many_questions_are_remembered_by_a_sample(monkeypatch: pytest.MonkeyPatch, manifest: Manifest) -> None:
    monkeypatch.setattr("depo_gateway.training.evaluation.contamination.FINGERPRINTS", 64)
    sampled = dataclasses.replace(manifest, metrics={"fitted_on": fingerprints(FITTED)})
    assert len(sampled.metrics["fitted_on"]) < 700
    assert fitted_share(FITTED, sampled) == 1.0
    assert fitted_share(NEW, sampled) == 0.0
    assert fitted_share(FITTED + NEW, sampled) == pytest.approx(0.5, abs=0.15)
    assert fitted_on(FITTED, sampled).sum() == 64
    assert not certainly_unseen(FITTED, sampled).any()
    assert 0 < certainly_unseen(NEW, sampled).sum() < 200  # of most new questions it would not remember


def test_only_what_was_certainly_not_fitted_on_is_kept(monkeypatch: pytest.MonkeyPatch, manifest: Manifest) -> None:
    found = unseen_prompts(FITTED[:3] + NEW[:2], manifest)
    assert (found.kept.tolist(), found.left_out()) == ([False] * 3 + [True] * 2, {"fitted": 3, "unknown": 0})
    with pytest.raises(ValueError, match=r"was fitted on all 3 of these 3 prompts.*--include-fitted"):
        unseen_prompts(FITTED[:3], manifest)
    monkeypatch.setattr("depo_gateway.training.evaluation.contamination.FINGERPRINTS", 64)
    sampled = dataclasses.replace(manifest, metrics={"fitted_on": fingerprints(FITTED)})
    found = unseen_prompts(FITTED + NEW, sampled)
    assert found.fitted == 64
    assert found.kept.sum() + found.fitted + found.unknown == 2000
    assert not found.kept[:1000].any()
    with pytest.raises(ValueError, match=r"fitted on 64 of these 1000 prompts or may have been fitted on 936 of them"):
        unseen_prompts(FITTED, sampled)
