"""A third head is one row of HEADS: it is fitted, calibrated, exported, served, and trained further."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from depo_gateway.estimator import checkpoint, heads
from depo_gateway.estimator.heads import HEADS, ORIGINAL, Head, labels_by_head, split_heads
from depo_gateway.estimator.learner import Learner, LearnerConfig
from depo_gateway.estimator.model import load_model, select_pools
from depo_gateway.estimator.records.types import Example
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.training.__main__ import main
from tests.conftest import WORDS

BREVITY = Head("brevity", "brevity")  # how short a pool's answer is, say


@pytest.fixture
def three_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "HEADS", (*HEADS, BREVITY))


def table(place: Path, rows: int = 200) -> Path:
    """Outcomes where "hard" decides about the small pool's quality, and "three" about both pools' brevity."""
    chance = random.Random(0)
    with open(place, "w", encoding="utf-8") as file:
        for index in range(rows):
            hard, short = index % 2 == 1, index % 4 < 2
            words = [*chance.sample(WORDS[4:9], 4), "hard" if hard else "easy", "three" if short else "hello"]
            chance.shuffle(words)
            row: dict[str, Any] = {"question": f"{' '.join(words)} {index}"}
            row["correct"] = {"s": float(not hard), "l": float(chance.random() < 0.9)}
            row["brevity"] = {"s": 0.9 if short else 0.1, "l": 0.8 if short else 0.2}
            file.write(json.dumps(row) + "\n")
    return place


def fit(outcomes: Path, encoder: Path, out: Path, *more: str) -> None:
    arguments = ["fit", "--outcomes", str(outcomes), "--encoder", str(encoder), "--layers", "0", "--out", str(out)]
    assert main([*arguments, "--pools", "small=s", "large=l", "--folds", "5", "--max-epochs", "8", *more]) == 0


def brevity(place: Path) -> Mapping[str, tuple[float, ...]]:
    """The third head of a short and of a long answer's prompt."""
    runtime = Runtime.load(place)
    found = {word: runtime.score([runtime.prepare(f"what is easy {word}")])[0] for word in ("three", "hello")}
    assert found["three"].quality[0] > 0.6
    return {word: scores.by_head["brevity"] for word, scores in found.items()}


@pytest.mark.parametrize("part", ["linear", "trunk"])
def test_a_third_head_is_fitted_and_served(tiny_encoder: Path, tmp_path: Path, three_heads: None, part: str) -> None:
    fit(table(tmp_path / "t.jsonl"), tiny_encoder, tmp_path / "fitted", *(["--trunk"] if part == "trunk" else []))
    manifest = checkpoint.load_manifest(tmp_path / "fitted")
    assert manifest.heads == ("quality", "token_confidence", "brevity")
    found = brevity(tmp_path / "fitted")
    assert found["three"][0] == pytest.approx(0.9, abs=0.2)
    assert found["three"][1] == pytest.approx(0.8, abs=0.2)
    assert found["hello"][0] == pytest.approx(0.1, abs=0.2)


def test_a_third_head_is_trained_further_and_calibrated(
    tiny_encoder: Path, tmp_path: Path, three_heads: None, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = table(tmp_path / "t.jsonl")
    fit(outcomes, tiny_encoder, tmp_path / "fitted")
    model, tokenizer, _ = load_model(tmp_path / "fitted")
    learner = Learner(model, tokenizer, LearnerConfig())
    terms = learner.step([Example("what is easy three", {"small": 1.0}, others={"brevity": {"small": 0.9}})])
    assert set(terms) == {"advantage", "distillation", "brevity"}
    large = select_pools(model, ["large"])
    width = model.deep_weight.shape[0]
    assert large.deep_weight.tolist() == model.deep_weight.reshape(width, 2, 3)[:, 1].tolist()
    command = ["calibrate", "--checkpoint", str(tmp_path / "fitted"), "--outcomes", str(outcomes), "--include-fitted"]
    assert main([*command, "--out", str(tmp_path / "calibrated")]) == 0
    assert "The calibration of token confidence of small, large is unchanged" in capsys.readouterr().out
    assert brevity(tmp_path / "calibrated")["three"][0] == pytest.approx(0.9, abs=0.2)


def test_a_checkpoint_keeps_the_heads_it_was_fitted_with(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, three_heads: None
) -> None:
    assert "heads" not in json.loads((tiny_checkpoint / checkpoint.MANIFEST).read_text())  # as version 0.1 wrote them
    runtime = Runtime.load(tiny_checkpoint)
    assert set(runtime.score([runtime.prepare("what is easy")])[0].by_head) == set(ORIGINAL)
    model, tokenizer, _ = load_model(tiny_checkpoint)
    assert model.config.heads == ORIGINAL
    assert Learner(model, tokenizer, LearnerConfig()).score(["what is easy"]).shape == (1, 2, 2)


def test_a_head_that_this_version_lacks_is_served_but_not_trained(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(heads, "HEADS", (*HEADS, BREVITY))
        fit(table(tmp_path / "t.jsonl"), tiny_encoder, tmp_path / "fitted")
    assert brevity(tmp_path / "fitted")["three"][0] == pytest.approx(0.9, abs=0.2)
    with pytest.raises(ValueError, match="can't be trained further: the head 'brevity' is unknown"):
        load_model(tmp_path / "fitted")


def test_labels_and_outputs_go_by_head() -> None:
    examples = [Example("a", {"small": 1.0}, {"large": 0.5}), Example("b", {}, others={"brevity": {"large": 0.25}})]
    found = labels_by_head(examples, ("small", "large"), ("quality", "token_confidence", "brevity"))
    assert np.nan_to_num(found["quality"], nan=-1).tolist() == [[1.0, -1.0], [-1.0, -1.0]]
    assert np.nan_to_num(found["token_confidence"], nan=-1).tolist() == [[-1.0, 0.5], [-1.0, -1.0]]
    assert np.nan_to_num(found["brevity"], nan=-1).tolist() == [[-1.0, -1.0], [-1.0, 0.25]]
    assert split_heads(np.arange(12).reshape(2, 6), 3).tolist() == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]
    with pytest.raises(ValueError, match=r"brevity of pool 'small' is 2\.0; it must lie between 0 and 1"):
        Example("a", {}, others={"brevity": {"small": 2.0}})
