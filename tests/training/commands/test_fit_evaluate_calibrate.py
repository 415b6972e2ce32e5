"""depo-train fit, evaluate and calibrate end to end on a two-layer encoder, and what a user's mistake looks like."""

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest

from depo_gateway.estimator import checkpoint
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.training.__main__ import main
from depo_gateway.training.evaluation.contamination import fitted_share, unseen_prompts
from depo_gateway.training.evaluation.measurement import fitted_note
from depo_gateway.training.outcomes.table import examples_of, parse_pools, read_tables

POOLS = ["--pools", "small=s", "large=l"]
WORDS = ("what", "is", "the", "sum", "of", "one", "two", "three", "question", "about", "number", "model")


def write_table(place: Path, count: int, seed: int) -> Path:
    """Questions of which those with "hard" need the large model, mostly. Length says nothing."""
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


@pytest.mark.parametrize("count", [2, 12])
def test_fit_holds_out_whole_groups_too(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    rows = [json.loads(line) for line in places["first"].read_text().splitlines()]
    grouped = tmp_path / "grouped.jsonl"
    grouped.write_text(
        "".join(
            json.dumps({**row, "source": "all", "group": f"g{i // 2 % count}"}) + "\n" for i, row in enumerate(rows)
        )
    )
    assert fit(grouped, places["encoder"], tmp_path / "grouped") == 0
    out = capsys.readouterr().out
    assert "calibrated on the held-out questions; on new groups the calibration is less accurate" in out
    assert ("fewer than 10 groups, intervals are rough" in out) == (count == 2)
    held_out = checkpoint.load_manifest(tmp_path / "grouped").metrics["held_out"]
    assert set(held_out) == {"questions", "groups"}
    assert held_out["groups"]["groups"] == count
    assert "groups" not in held_out["questions"]
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
    first, *_ = capsys.readouterr().out.splitlines()
    assert text.splitlines()[0] == f"# {first}"
    assert "| random" in text
    assert (tmp_path / "report" / "curve.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (tmp_path / "report" / "scores.jsonl").read_text().splitlines()]
    questions = [json.loads(line)["question"] for line in places["second"].read_text().splitlines()]
    assert [row["question"] for row in rows] == questions
    for row in rows:
        assert set(row) - {"unfamiliar"} == {"question", "quality", "confidence"}
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


def without(place: Path, table: Path, model: str) -> Path:
    """The table without a model's outcomes, but for five rows."""
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    for row in rows[5:]:
        del row["correct"][model], row["token_confidence"][model]
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def test_calibrate_keeps_what_it_has_no_labels_for(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = without(tmp_path / "half.jsonl", places["second"], "l")
    arguments = ["calibrate", "--checkpoint", str(places["fitted"]), "--outcomes", str(half)]
    assert main([*arguments, "--target", "large-share=0.3", "--out", str(tmp_path / "new")]) == 0
    out = capsys.readouterr().out
    assert "The calibration of quality of small, large is unchanged: fewer than 20 labels" in out
    assert "The calibration of token confidence of large is unchanged: fewer than 20 labels" in out
    parent, child = (Runtime.load(place).calibration.stages for place in (places["fitted"], tmp_path / "new"))
    for stage in ("full", "cheap"):
        assert child[stage]["quality"] == parent[stage]["quality"]
        assert child[stage]["token_confidence"][1] == parent[stage]["token_confidence"][1]
        assert child[stage]["token_confidence"][0] != parent[stage]["token_confidence"][0]


def test_calibrate_says_which_share_it_reaches(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = tmp_path / "few.jsonl"
    runtime = Runtime.load(places["fitted"])
    lines = places["second"].read_text().splitlines()
    scores = runtime.score([runtime.prepare(json.loads(line)["question"]) for line in lines])
    familiar = [line for line, of in zip(lines, scores, strict=True) if not of.unfamiliar]
    few.write_text("".join(line + "\n" for line in familiar[:2]))
    arguments = ["calibrate", "--checkpoint", str(places["fitted"]), "--outcomes", str(few), "--target"]
    assert main([*arguments, "large-share=0.3", "large-share=0.5", "--out", str(tmp_path / "new")]) == 0
    out = capsys.readouterr().out
    assert "large-share=0.3 is not met under difficulty: the nearest threshold gives 0.500\n" in out
    assert "large-share=0.5 is not met under difficulty" not in out


def test_rows_that_were_fitted_on_are_reported(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = tmp_path / "mixed.jsonl"
    lines = [places[name].read_text().splitlines(keepends=True)[:100] for name in ("first", "second")]
    mixed.write_text("".join(lines[0] + lines[1]))
    for command in ("calibrate", "evaluate"):
        arguments = [command, "--checkpoint", str(places["fitted"]), "--out", str(tmp_path / command), "--outcomes"]
        assert main([*arguments, str(mixed), "--include-fitted"]) == 0
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"depo-train {command}: the checkpoint was fitted on 50.0% of these prompts" in line
    assert "fitted on 50.0% of these prompts" in (tmp_path / "evaluate" / "report.md").read_text()
    assert main(["evaluate", *arguments[1:4], str(tmp_path / "clean"), "--outcomes", str(places["second"])]) == 0
    assert capsys.readouterr().err == ""


def test_calibrate_leaves_out_what_was_fitted_on(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(places["first"].read_text() + places["second"].read_text())
    calibrations = []
    for name, table in (("mixed", mixed), ("unseen", places["second"])):
        arguments = ["calibrate", "--checkpoint", str(places["fitted"]), "--outcomes", str(table)]
        assert main([*arguments, "--target", "large-share=0.3", "--out", str(tmp_path / name)]) == 0
        calibrations.append((tmp_path / name / "calibration.json").read_text())
        error = capsys.readouterr().err
        assert ("prompts are left out, because the checkpoint was fitted on them" in error) == (name == "mixed")
    assert calibrations[0] == calibrations[1]
    arguments = ["calibrate", "--checkpoint", str(places["fitted"]), "--outcomes", str(places["first"])]
    assert main([*arguments, "--target", "large-share=0.3", "--out", str(tmp_path / "none")]) == 2
    assert "was fitted on all" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_checkpoint_of_old_does_not_know_what_it_was_fitted_on(places: dict[str, Path]) -> None:
    manifest = checkpoint.load_manifest(places["fitted"])
    examples = examples_of(read_tables([places["first"]]), parse_pools(POOLS[1:]))
    assert fitted_share(examples, manifest) == 1.0
    old = dataclasses.replace(manifest, metrics={k: v for k, v in manifest.metrics.items() if k != "fitted_on"})
    assert fitted_share(examples, old) is None
    assert unseen_prompts(examples, old).kept.all()
    note = fitted_note({"fitted_share": None, "left_out": {"fitted": 0, "unknown": 0}}, "scores.jsonl")
    assert "does not record which prompts it was fitted on; results on those would be optimistic" in note


def test_fit_says_what_its_figures_are_worth(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = places["first"].read_text().splitlines()
    coin = random.Random(0)
    tables = {"few": lines[:30], "blind": [], "same": []}
    for line in lines[:200]:
        row = json.loads(line)
        blind = {**row, "correct": {"s": int(coin.random() < 0.4), "l": int(coin.random() < 0.8)}}
        tables["blind"].append(json.dumps(blind))
        tables["same"].append(json.dumps({**row, "correct": {"s": row["correct"]["s"], "l": 0}}))
    said = {}
    for name, rows in tables.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
        assert fit(tmp_path / f"{name}.jsonl", places["encoder"], tmp_path / name, "--max-epochs", "2") == 0
        said[name] = capsys.readouterr().out
    assert "Fewer than 50 prompts" in said["few"]
    assert "gain is not shown to route better than prompt length does" in said["blind"]
    assert "no better than the small one, so there is no gap to measure" in said["same"]
    assert "nan" not in said["same"]
    assert "calibrated on the held-out questions" in said["same"]


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
    for flag, value in (("--max-epochs", "0"), ("--folds", "1"), ("--folds", "0"), ("--balance", "-1")):
        line = mistake(capsys, [*fitting, str(places["first"]), flag, value])
        assert f"{flag} is {float(value):g}" in line.replace(".0;", ";")
    assert "must be 0 or more" in mistake(capsys, [*fitting, str(places["first"]), "--ranking-weight", "-1"])
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


def test_ctrl_c_is_one_line(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("depo_gateway.training.commands.fit.read_tables", interrupted)
    assert fit(places["first"], places["encoder"], tmp_path / "out") == 1
    assert capsys.readouterr().err == "depo-train fit: interrupted\n"


def test_fit_says_what_to_do_next_and_what_a_threshold_would_do() -> None:
    from depo_gateway.training.commands.fit import next_step

    calibrated = Runtime.load(checkpoint.resolve("builtin")).calibration
    said = next_step(Path("checkpoints/first"), calibrated, np.ones(700))
    assert said.startswith("next: estimator: {path: checkpoints/first} in gateway.yaml; share of large on such prompts")
    assert f"0.85: {calibrated.large_share('gain', 0.85):.0%} [" in said
    assert "With so few prompts" not in said
    few = next_step(Path("checkpoints/first"), calibrated, np.ones(100))
    assert "With so few prompts, a share of 50% may be 10 points more or less: fit on 400 or more" in few


def test_publish_lets_current_name_the_new_checkpoint(places: dict[str, Path], tmp_path: Path) -> None:
    assert fit(places["first"], places["encoder"], tmp_path / "first", "--publish") == 0
    assert checkpoint.resolve(tmp_path) == tmp_path / "first"
    words = ["--checkpoint", str(tmp_path), "--outcomes", str(places["second"]), "--target", "large-share=0.3"]
    assert main(["calibrate", *words, "--out", str(tmp_path / "second")]) == 0
    assert checkpoint.resolve(tmp_path) == tmp_path / "first"  # not asked for
    assert main(["calibrate", *words, "--out", str(tmp_path / "third"), "--publish"]) == 0
    assert checkpoint.resolve(tmp_path) == tmp_path / "third"
