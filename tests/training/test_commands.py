"""depo-train fit, evaluate and calibrate end to end on a two-layer encoder, and what a user's mistake looks like."""

import json
import random
from pathlib import Path

import pytest

from estimator import checkpoint
from estimator.runtime import Runtime
from training.__main__ import main

POOLS = ["--pools", "small=s", "large=l"]
WORDS = ("what", "is", "the", "sum", "of", "one", "two", "three", "question", "about", "number", "model")


def write_table(place: Path, count: int, seed: int) -> Path:
    """Questions of which those with "hard" need the large model, mostly. Length tells nothing."""
    chance = random.Random(seed)
    with open(place, "w") as file:
        for index in range(count):
            hard = index % 2 == 1
            text = " ".join(chance.choice(WORDS) for _ in range(chance.randint(4, 10)))
            small = chance.random() < (0.15 if hard else 0.9)
            row = {
                "question": f"{text} {'hard' if hard else 'easy'} {chance.choice(WORDS)}",
                "correct": {"s": int(small), "l": int(chance.random() < 0.95)},
                "token_confidence": {"s": 0.3 if hard else 0.8, "l": 0.9},
                "source": "even" if index % 4 < 2 else "odd",
            }
            file.write(json.dumps(row) + "\n")
    return place


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> dict[str, Path]:
    """Two tables and a checkpoint fitted on the first."""
    folder = tmp_path_factory.mktemp("commands")
    first, second = write_table(folder / "first.jsonl", 300, 0), write_table(folder / "second.jsonl", 200, 1)
    assert fit(first, tiny_encoder, folder / "fitted") == 0
    return {"folder": folder, "first": first, "second": second, "fitted": folder / "fitted", "encoder": tiny_encoder}


def fit(outcomes: Path, encoder: Path, out: Path, *more: str) -> int:
    small = ["--encoder", str(encoder), "--layers", "0", "--folds", "3", "--max-epochs", "12", "--max-tokens", "32"]
    return main(["fit", "--outcomes", str(outcomes), *POOLS, "--out", str(out), *small, *more])


def test_fit_says_how_held_out_questions_were_routed(places: dict[str, Path]) -> None:
    manifest = checkpoint.load_manifest(places["fitted"])
    held_out = manifest.metrics["held_out"]["questions"]["apgr"]
    assert held_out["gain (full)"]["low"] > 0.6
    assert held_out["gain (full)"]["difference_low"] > 0  # against prompt length
    assert manifest.metrics["models"] == {"small": ["s"], "large": ["l"]}
    assert manifest.pools == ("small", "large")
    runtime = Runtime.load(places["fitted"])
    easy, hard = runtime.score([runtime.prepare("what is the easy sum"), runtime.prepare("what is the hard sum")])
    assert easy.quality[0] > 0.7 > 0.4 > hard.quality[0]
    assert easy.token_confidence[0] == pytest.approx(0.8, abs=0.2)
    assert hard.token_confidence[0] == pytest.approx(0.3, abs=0.25)


def test_fit_holds_out_whole_groups_too_where_there_are_many(places: dict[str, Path], tmp_path: Path) -> None:
    rows = [json.loads(line) for line in places["first"].read_text().splitlines()]
    grouped = tmp_path / "grouped.jsonl"
    grouped.write_text("".join(json.dumps({**row, "group": f"g{i % 12}"}) + "\n" for i, row in enumerate(rows)))
    assert fit(grouped, places["encoder"], tmp_path / "grouped") == 0
    held_out = checkpoint.load_manifest(tmp_path / "grouped").metrics["held_out"]
    assert set(held_out) == {"questions", "groups"}
    assert held_out["groups"]["apgr"]["gain (full)"]["low"] > 0.6


def test_fit_is_deterministic_by_seed(places: dict[str, Path], tmp_path: Path) -> None:
    assert fit(places["first"], places["encoder"], tmp_path / "again") == 0
    first, again = (checkpoint.load_manifest(place) for place in (places["fitted"], tmp_path / "again"))
    assert first.files == again.files
    assert fit(places["first"], places["encoder"], tmp_path / "other", "--seed", "1") == 0
    assert checkpoint.load_manifest(tmp_path / "other").files != first.files


def test_fit_trains_the_encoder_too(places: dict[str, Path], tmp_path: Path) -> None:
    trained = ("--train-layers", "1", "--max-epochs", "2", "--ranking-weight", "1", "--gain-weight", "1")
    assert fit(places["first"], places["encoder"], tmp_path / "deep", *trained) == 0
    manifest = checkpoint.load_manifest(tmp_path / "deep")
    assert manifest.base.trained
    assert all(".layer.1." in name for name in manifest.base.trained)


def test_evaluate_writes_what_the_contract_names(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "--checkpoint", str(places["fitted"]), "--outcomes", str(places["second"])]
    assert main([*arguments, *POOLS, "--out", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["all"]["prompts"] == report["all"]["with_all_labels"]
    assert set(report["sources"]) == {"even", "odd"}
    for stage in ("full", "cheap"):
        for rule in ("gain", "difficulty"):
            assert report["all"]["apgr"][f"{rule} ({stage})"]["apgr"] > 0.6
    assert 0.3 < report["all"]["apgr"]["length"]["apgr"] < 0.65
    assert [row["threshold"] for row in report["all"]["thresholds"]["difficulty"]][:4] == [0.3, 0.5, 0.7, 0.75]
    text = (tmp_path / "report" / "report.md").read_text()
    assert text in capsys.readouterr().out
    assert "| random" in text
    assert (tmp_path / "report" / "curve.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (tmp_path / "report" / "scores.jsonl").read_text().splitlines()]
    questions = [json.loads(line)["question"] for line in places["second"].read_text().splitlines()]
    assert [row["question"] for row in rows] == questions
    for row in rows:
        assert set(row) == {"question", "quality", "confidence"}
        quality, confidence = row["quality"], row["confidence"]
        lost = max(0.0, max(quality.values()) - quality["small"])
        assert confidence["small"] == pytest.approx(1 - lost)


def test_evaluate_knows_the_pools_by_itself_and_refuses_others(places: dict[str, Path], tmp_path: Path) -> None:
    arguments = ["evaluate", "--checkpoint", str(places["fitted"]), "--outcomes", str(places["second"])]
    assert main([*arguments, "--out", str(tmp_path / "default")]) == 0
    assert main([*arguments, "--pools", "tiny=s", "large=l", "--out", str(tmp_path / "other")]) == 2


def test_a_table_without_the_large_pool_measures_no_routing(places: dict[str, Path], tmp_path: Path) -> None:
    half = tmp_path / "half.jsonl"
    half.write_text(
        '{"question": "an easy one", "correct": {"s": 1}}\n{"question": "a hard one", "correct": {"l": 1}}\n'
    )
    arguments = ["evaluate", "--checkpoint", str(places["fitted"]), "--outcomes", str(half)]
    assert main([*arguments, "--out", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["all"]["prompts"] == 2
    assert "apgr" not in report["all"]


def test_calibrate_makes_a_new_version_whose_thresholds_hold(places: dict[str, Path], tmp_path: Path) -> None:
    arguments = ["calibrate", "--checkpoint", str(places["fitted"]), "--outcomes", str(places["second"])]
    targets = ["--target", "large-share=0.3", "quality=0.95", "cost=0.5", "--costs", "small=1", "large=5"]
    assert main([*arguments, *targets, "--out", str(tmp_path / "new")]) == 0
    parent, child = Runtime.load(places["fitted"]), Runtime.load(tmp_path / "new")
    assert child.manifest.parent == parent.version != child.version
    assert child.manifest.files["model.onnx"] == parent.manifest.files["model.onnx"]
    found = child.calibration.targets
    assert set(found) == {"large-share=0.3", "quality=0.95", "cost=0.5"}
    assert child.calibration.large_share("gain", found["large-share=0.3"]["gain"]) == pytest.approx(0.3, abs=0.03)
    with pytest.raises(ValueError, match="already exists"):
        checkpoint.ensure_free(tmp_path / "new")


def mistake(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    capsys.readouterr()
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_mistakes_are_one_line_and_exit_2(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "x", "correct": {"s": 1}}\n{"question": \n')
    fitting = ["fit", *POOLS, "--out", str(tmp_path / "out"), "--outcomes"]
    assert "bad.jsonl:2: not JSON" in mistake(capsys, [*fitting, str(bad)])
    assert "nowhere.jsonl: No such file" in mistake(capsys, [*fitting, str(tmp_path / "nowhere.jsonl")])
    taken = ["fit", *POOLS, "--outcomes", str(bad), "--out", str(places["fitted"])]
    assert "already exists" in mistake(capsys, taken)
    calibrating = ["calibrate", "--checkpoint", str(places["fitted"]), "--outcomes", str(places["second"])]
    assert "luck=1" in mistake(capsys, [*calibrating, "--out", str(tmp_path / "x"), "--target", "luck=1"])
    assert "--costs" in mistake(capsys, [*calibrating, "--out", str(tmp_path / "x"), "--target", "cost=0.5"])
    broken = ["evaluate", "--checkpoint", str(tmp_path), "--outcomes", str(bad), "--out", str(tmp_path / "r")]
    assert "is no checkpoint" in mistake(capsys, broken)
    assert "--luck" in mistake(capsys, [*fitting, str(bad), "--luck", "1"])
    assert "COMMAND" in mistake(capsys, ["guess"])
    assert not (tmp_path / "out").exists()


def test_help_and_version_on_every_level(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["--help"],
        ["--version"],
        *([name, "--help"] for name in ("collect", "fit", "evaluate", "calibrate")),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        assert "depo-train" in capsys.readouterr().out


def test_ctrl_c_is_quiet(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("training.fit.read_tables", interrupted)
    assert fit(places["first"], places["encoder"], tmp_path / "out") == 1
    assert capsys.readouterr().err == ""
