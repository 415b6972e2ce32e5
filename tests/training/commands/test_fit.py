"""depo-train fit by the flags that change what is fitted: the trunk, and the whole of an encoder."""

import json
from pathlib import Path

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
    small = ["--layers", "0", "--folds", "2", "--max-epochs", "6", "--max-tokens", "32"]
    arguments = ["--outcomes", str(table), "--pools", "small=s", "large=l", "--encoder", str(tiny_encoder), *small]
    assert main(["fit", *arguments, "--trunk", "--train-layers", "-1", "--out", str(tmp_path / "fitted")]) == 0
    base = checkpoint.load_manifest(tmp_path / "fitted").base
    assert (base.wide, base.trunk, base.rounded) == (True, True, False)
    loaded, _, _ = model.load_model(tmp_path / "fitted")
    assert set(base.trained) == {f"encoder.{name}" for name, _ in loaded.encoder.named_parameters()}
    runtime = Runtime.load(tmp_path / "fitted")
    easy, hard = runtime.score([runtime.prepare("what is the easy sum"), runtime.prepare("what is the hard sum")])
    assert easy.quality[0] > 0.6 > 0.4 > hard.quality[0]
