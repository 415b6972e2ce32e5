"""depo-train fit by the flags that change what is fitted: the trunk, and the whole of an encoder."""

import base64
import json
from pathlib import Path

import pytest

from depo_gateway.estimator import checkpoint, model
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.training.__main__ import main


def write_table(place: Path, count: int) -> Path:
    """Questions of which those with "hard" need the large model."""
    words = ("what", "is", "the", "sum", "of", "one", "two", "three")
    with open(place, "w") as file:
        for index in range(count):
            hard = index % 2 == 1
            text = " ".join((words[index % 8], words[index // 8 % 8], "hard" if hard else "easy", words[index // 64]))
            file.write(json.dumps({"question": text, "correct": {"s": int(not hard), "l": 1}}) + "\n")
    return place


def test_fit_with_the_trunk_on_a_whole_encoder_is_served(tiny_encoder: Path, tmp_path: Path) -> None:
    table = write_table(tmp_path / "table.jsonl", 200)
    small = ["--layers", "0", "--folds", "5", "--max-epochs", "6", "--max-tokens", "32"]
    arguments = ["--outcomes", str(table), "--pools", "small=s", "large=l", "--encoder", str(tiny_encoder), *small]
    assert main(["fit", *arguments, "--trunk", "--train-layers", "-1", "--out", str(tmp_path / "fitted")]) == 0
    base = checkpoint.load_manifest(tmp_path / "fitted").base
    assert (base.wide, base.trunk, base.rounded) == (True, True, False)
    loaded, _, _ = model.load_model(tmp_path / "fitted")
    assert set(base.trained) == {f"encoder.{name}" for name, _ in loaded.encoder.named_parameters()}
    runtime = Runtime.load(tmp_path / "fitted")
    easy, hard = runtime.score([runtime.prepare("what is the easy sum"), runtime.prepare("what is the hard sum")])
    assert easy.quality[0] > 0.6 > 0.4 > hard.quality[0]


def write_prior(place: Path, models: tuple[str, ...] = ("a", "b", "c")) -> Path:
    """Further questions like those of write_table, which other models answered: stronger ones also some hard ones."""
    words = ("three", "two", "one", "of", "sum", "the", "is", "what")
    with open(place, "w") as file:
        for index in range(120):
            hard = index % 2 == 1
            text = " ".join((words[index % 8], "hard" if hard else "easy", words[index // 8 % 8], words[index // 64]))
            correct = {model: int(not hard or index % 7 < strength) for strength, model in enumerate(models)}
            file.write(json.dumps({"question": text, "correct": correct}) + "\n")
    return place


def arguments_with_prior(encoder: Path, place: Path, prior: Path) -> list[str]:
    own = ["--outcomes", str(write_table(place / "own.jsonl", 60)), "--prior-outcomes", str(prior)]
    small = ["--layers", "0", "--folds", "3", "--max-tokens", "32", "--encoder", str(encoder)]
    return ["fit", *own, "--pools", "small=s", "large=l", *small, "--out", str(place / "fitted")]


def test_fit_says_whether_the_prior_is_used_and_the_manifest_keeps_it(
    tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prior = write_prior(tmp_path / "prior.jsonl", ("a", "b", "s", "c"))
    assert main(arguments_with_prior(tiny_encoder, tmp_path, prior)) == 0
    said = capsys.readouterr().out
    assert "--prior-outcomes: outcomes of s are left out, because a pool has that model" in said
    metrics = checkpoint.load_manifest(tmp_path / "fitted").metrics
    kept = metrics["prior"]
    assert kept["models"] == 3
    assert f"{kept['further_questions']} questions besides yours" in said
    assert ("Prior used: " in said) == kept["used"]
    assert ("Prior not used" in said) != kept["used"]
    assert metrics["examples"] == 60  # own ones alone
    assert len(base64.b64decode(metrics["fitted_on"])) / 8 > 150  # a prior's questions are no held-out ones either


def test_a_prior_that_cannot_help_is_refused_in_one_sentence(
    tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_only = write_prior(tmp_path / "own_only.jsonl", ("s", "l"))
    assert main(arguments_with_prior(tiny_encoder, tmp_path, own_only)) == 2
    assert "the prior outcomes name no models but the pools' own: l, s" in capsys.readouterr().err
    known = tmp_path / "known.jsonl"
    known.write_text(write_table(tmp_path / "same.jsonl", 60).read_text().replace('"l"', '"other"'))
    assert main(arguments_with_prior(tiny_encoder, tmp_path, known)) == 2
    assert "no question besides your own" in capsys.readouterr().err
    prior = write_prior(tmp_path / "prior.jsonl")
    assert main([*arguments_with_prior(tiny_encoder, tmp_path, prior), "--trunk"]) == 2
    assert "needs linear heads on a frozen encoder" in capsys.readouterr().err
    assert not (tmp_path / "fitted").exists()
