"""evaluate and calibrate with a checkpoint that knows tasks by name, and which prompts are unlike those of its fit."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from depo_gateway.estimator import calibration, checkpoint
from depo_gateway.estimator.arrays import Array
from depo_gateway.estimator.calibration import Familiarity, route
from depo_gateway.estimator.records.store import Store
from depo_gateway.estimator.records.types import Label, Record
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.training.__main__ import main
from depo_gateway.training.evaluation.unfamiliar_prompts import deciding_quality
from tests.training.commands.test_fit_evaluate_calibrate import WORDS, fit, mistake

GROUPS = ("sums", "proofs")
STRANGE = ("theorem", "!")  # never in the table of the fit


def write_tasks(place: Path, count: int, seed: int, strange: int = 0) -> Path:
    """Questions whose text says nothing: those of the group `proofs` need the large model, mostly.

    The last `strange` ones are of other words.
    """
    chance = random.Random(seed)
    with open(place, "w") as file:
        for index in range(count):
            words, most = (WORDS, 12) if index < count - strange else (STRANGE, 20)
            proof = index % 2
            row = {
                "question": " ".join(chance.choice(words) for _ in range(chance.randint(most - 6, most))),
                "correct": {"s": int(chance.random() < (0.15 if proof else 0.9)), "l": int(chance.random() < 0.95)},
                "group": GROUPS[proof],
                "source": "usual" if words is WORDS else "strange",
            }
            file.write(json.dumps(row) + "\n")
    return place


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> dict[str, Path]:
    """A checkpoint that was fitted with groups, one without, and tables of other questions."""
    folder = tmp_path_factory.mktemp("tasks")
    first = write_tasks(folder / "first.jsonl", 400, 0)
    assert fit(first, tiny_encoder, folder / "told", "--groups") == 0
    assert fit(first, tiny_encoder, folder / "untold") == 0
    second = write_tasks(folder / "second.jsonl", 300, 1)
    mixed = write_tasks(folder / "mixed.jsonl", 400, 2, strange=120)
    names = {"told": folder / "told", "untold": folder / "untold"}
    return {**names, "folder": folder, "second": second, "mixed": mixed}


def evaluate(place: Path, out: Path, *flags: str) -> dict[str, Any]:
    assert main(["evaluate", "--checkpoint", str(place), "--out", str(out), *flags]) == 0
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def scores_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]


def gain_apgr(report: dict[str, Any]) -> float:
    apgr: float = report["all"]["apgr"]["gain (full)"]["apgr"]
    return apgr


# Groups.


def test_evaluate_tells_the_groups_with_the_flag_and_says_so_without(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = ["--outcomes", str(places["second"])]
    blind = evaluate(places["told"], tmp_path / "blind", *table)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("depo-train evaluate: the checkpoint knows the groups of 300 of these 300 prompts, and they")
    assert line.endswith("give --groups")
    told = evaluate(places["told"], tmp_path / "told", *table, "--groups")
    assert capsys.readouterr().err == ""
    assert gain_apgr(blind) < 0.6 < 0.7 < gain_apgr(told)
    runtime = Runtime.load(places["told"])
    row = json.loads(places["second"].read_text().splitlines()[1])
    (expected,) = runtime.score([runtime.prepare(row["question"], group="proofs")])
    assert tuple(scores_of(tmp_path / "told")[1]["quality"].values()) == pytest.approx(expected.quality, abs=1e-5)


def test_a_question_of_two_groups_has_the_scores_of_each(places: dict[str, Path], tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    row = {"question": "what is the question about the model", "correct": {"s": 1, "l": 1}}
    table.write_text("".join(json.dumps({**row, "group": group}) + "\n" for group in GROUPS))
    evaluate(places["told"], tmp_path / "report", "--outcomes", str(table), "--groups")
    sums, proofs = (scores["quality"]["small"] for scores in scores_of(tmp_path / "report"))
    assert sums > proofs + 0.3


def test_groups_that_make_no_difference_are_said(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = ["--outcomes", str(places["second"])]
    plain = evaluate(places["untold"], tmp_path / "plain", *table)
    assert capsys.readouterr().err == ""
    told = evaluate(places["untold"], tmp_path / "told", *table, "--groups")
    assert "--groups makes no difference: the checkpoint knows no groups" in capsys.readouterr().err
    assert told["all"] == plain["all"]
    other = tmp_path / "other.jsonl"
    other.write_text(places["second"].read_text().replace('"sums"', '"a"').replace('"proofs"', '"b"'))
    evaluate(places["told"], tmp_path / "other", "--outcomes", str(other), "--groups")
    assert "knows none of the groups of these prompts" in capsys.readouterr().err


def test_calibrate_tells_the_groups_with_the_flag(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["calibrate", "--checkpoint", str(places["told"]), "--outcomes", str(places["second"])]
    best = []
    for name, flags in (("blind", []), ("told", ["--groups"])):
        assert main([*words, "--out", str(tmp_path / name), *flags]) == 0
        assert ("give --groups" in capsys.readouterr().err) == (not flags)
        curve = Runtime.load(tmp_path / name).calibration.curves["gain"]
        assert curve.quality is not None
        large = [shares[-1] for shares in curve.shares]
        best.append(max(q for q, share in zip(curve.quality, large, strict=True) if 0.4 < share < 0.6))
    assert best[1] > best[0] + 0.08


def traffic(place: Path, table: Path) -> str:
    """Records with every pool's label, each with its group; the URL."""
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    records = [
        Record(
            f"r{index}", 1e9 + index, group=row["group"], pool="small", reason="confident", pools=("small", "large"),
            status=200, asked=[{"role": "user", "content": row["question"]}],
        )
        for index, row in enumerate(rows)
    ]  # fmt: skip
    labels = [
        Label(index + 1, pool, "exact", row["correct"][model])
        for index, row in enumerate(rows)
        for pool, model in (("small", "s"), ("large", "l"))
    ]
    store = Store(f"sqlite:///{place}")
    store.create()
    store.append(records)
    store.add_labels(labels)
    store.close()
    return f"sqlite:///{place}"


def test_records_are_scored_with_their_groups(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = traffic(tmp_path / "records.db", places["second"])
    report = evaluate(places["told"], tmp_path / "report", "--records", url)
    table = evaluate(places["told"], tmp_path / "table", "--outcomes", str(places["second"]), "--groups")
    assert gain_apgr(report) == pytest.approx(gain_apgr(table), abs=1e-6)
    words = ["calibrate", "--checkpoint", str(places["told"]), "--out"]
    assert main([*words, str(tmp_path / "records"), "--records", url]) == 0
    assert main([*words, str(tmp_path / "table-2"), "--outcomes", str(places["second"]), "--groups"]) == 0
    of_records, of_table = (Runtime.load(tmp_path / name).calibration for name in ("records", "table-2"))
    assert of_records.stages["full"]["quality"][0].offset == pytest.approx(
        of_table.stages["full"]["quality"][0].offset, abs=1e-5
    )
    for command in ("evaluate", "calibrate"):
        words = [command, "--checkpoint", str(places["told"]), "--records", url, "--out", str(tmp_path / "no")]
        assert "--groups goes with --outcomes" in mistake(capsys, [*words, "--groups"])


# Unfamiliar prompts.


def test_the_report_says_how_much_is_unfamiliar_and_counts_it_as_random(
    places: dict[str, Path], tmp_path: Path
) -> None:
    report = evaluate(places["told"], tmp_path, "--outcomes", str(places["mixed"]), "--groups", "--threshold", "0.7")
    rows = [json.loads(line) for line in places["mixed"].read_text().splitlines()]
    runtime = Runtime.load(places["told"])
    found = runtime.score([runtime.prepare(row["question"], group=row["group"]) for row in rows])
    flags = np.array([scores.unfamiliar for scores in found])
    for row, flag in zip(scores_of(tmp_path), flags, strict=True):
        assert set(row) == {"question", "quality", "confidence"} | ({"unfamiliar"} if flag else set())
        assert not flag or row["unfamiliar"] is True
    assert report["all"]["unfamiliar"] == pytest.approx(flags.mean())
    usual, strange = report["sources"]["usual"], report["sources"]["strange"]
    assert strange["unfamiliar"] > 0.8 > 0.25 > usual["unfamiliar"]
    text = (tmp_path / "report.md").read_text()
    assert f"{flags.mean():.1%} of the prompts are unfamiliar to the checkpoint" in text
    assert f"| {100 * strange['unfamiliar']:.0f}% " in text
    assert f", {strange['unfamiliar']:.1%} unfamiliar to the checkpoint." in text
    # what decides is known for the familiar prompts alone
    quality = np.array([scores.quality for scores in found])
    share = (route(quality[~flags], "gain", 0.7) == 1).mean()
    assert 0.3 < share < 0.7
    assert report["headline"]["in_force"]["large_share"] == pytest.approx(share, abs=0.01)
    assert strange["in_force"]["large_share"] == pytest.approx(share, abs=0.1)
    above = {name: of["in_force"]["kept_above_random"]["value"] for name, of in report["sources"].items()}
    assert abs(above["strange"]) < 0.05 < 0.1 < above["usual"]
    common = {row["threshold"]: row for row in report["all"]["thresholds"]["gain"]}[0.7]
    assert common["large_share"] == pytest.approx(report["headline"]["in_force"]["large_share"])
    assert strange["apgr"]["gain (full)"]["apgr"] < 0.65 < 0.7 < usual["apgr"]["gain (full)"]["apgr"]


def test_a_target_is_met_although_unfamiliar_prompts_are_predicted_alike(
    places: dict[str, Path], tmp_path: Path
) -> None:
    config = tmp_path / "gateway.yaml"
    config.write_text("pools: {small: {}, large: {}}\nrouting: {target: {large_share: 0.3}}\n")
    table = ["--outcomes", str(places["mixed"]), "--groups", "--config", str(config)]
    report = evaluate(places["told"], tmp_path / "report", *table)
    assert report["headline"]["in_force"]["large_share"] == pytest.approx(0.3, abs=0.01)


def test_a_checkpoint_that_cannot_tell_says_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    table = write_tasks(tmp_path / "table.jsonl", 60, 3, strange=30)
    pools = ["--pools", "small=s", "large=l"]
    report = evaluate(tiny_checkpoint, tmp_path / "report", "--outcomes", str(table), *pools)
    assert report["all"]["unfamiliar"] is None
    assert "unfamiliar" not in (tmp_path / "report/report.md").read_text()
    assert not any("unfamiliar" in row for row in scores_of(tmp_path / "report"))


def test_prompts_that_are_all_unfamiliar_are_one_line(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runtime = Runtime.load(places["told"])
    lines = [line for line in places["mixed"].read_text().splitlines() if '"strange"' in line]
    questions = [json.loads(line)["question"] for line in lines]
    found = runtime.score([runtime.prepare(question) for question in questions])
    table = tmp_path / "strange.jsonl"
    table.write_text("\n".join(line for line, scores in zip(lines, found, strict=True) if scores.unfamiliar))
    for command in ("evaluate", "calibrate"):
        words = [command, "--checkpoint", str(places["told"]), "--outcomes", str(table), "--groups"]
        line = mistake(capsys, [*words, "--out", str(tmp_path / command)])
        assert "prompts are unlike those that the checkpoint was fitted on, so its scores decide none of them" in line


def test_calibrate_keeps_the_familiarity_with_the_means_of_the_new_labels(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in places["mixed"].read_text().splitlines()]
    for row in rows:  # a large model that is worse than the one of the fit
        row["correct"]["l"] = int(row["correct"]["l"] and len(row["question"]) % 4 > 0)
    table = tmp_path / "table.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["calibrate", "--checkpoint", str(places["told"]), "--outcomes", str(table), "--groups"]
    assert main([*words, "--target", "large-share=0.3", "--out", str(tmp_path / "new")]) == 0
    said = capsys.readouterr().out
    parent, child = Runtime.load(places["told"]), Runtime.load(tmp_path / "new")
    before, after = parent.calibration.familiarity, child.calibration.familiarity
    assert before is not None
    assert after is not None
    assert (after.near, after.far) == (before.near, before.far)
    found = child.score([child.prepare(row["question"], group=row["group"]) for row in rows])
    flags = np.array([scores.unfamiliar for scores in found])
    assert f"{flags.sum()} of 400 prompts are unfamiliar to the checkpoint" in said
    labels = np.array([[row["correct"][model] for model in ("s", "l")] for row in rows])
    assert after.means == pytest.approx(labels[~flags].mean(0))
    assert after.means[1] < before.means[1] - 0.1
    # the curves are of what the new version serves
    quality = np.array([scores.quality for scores in found])
    assert quality[~flags].mean(0) == pytest.approx(labels[~flags].mean(0), abs=0.02)
    assert curves_differ_by(child, quality, flags) < 0.01
    steps = np.diff([shares[-1] for shares in child.calibration.curves["gain"].shares])
    assert steps.max() < 0.15  # the unfamiliar ones, over a quarter, don't all change the pool at one threshold
    assert checkpoint.load_manifest(tmp_path / "new").base.groups == ("proofs", "sums")


def curves_differ_by(runtime: Runtime, quality: Array, unfamiliar: np.ndarray) -> float:
    """The largest difference of the curve's large share from that of these scores, between the curve's thresholds."""
    deciding, thresholds = deciding_quality(quality, unfamiliar), np.arange(0.305, 1.0, 0.01)
    shares = [(route(deciding, "gain", threshold) == 1).mean() for threshold in thresholds]
    return max(
        abs(runtime.calibration.large_share("gain", threshold) - share)
        for threshold, share in zip(thresholds, shares, strict=True)
    )


def test_the_curves_are_of_the_new_version_where_its_parent_trusted_no_prediction_fully(
    places: dict[str, Path], tmp_path: Path
) -> None:
    manifest, files = checkpoint.load_checkpoint(places["told"])
    before = Runtime.load(places["told"]).calibration
    assert before.familiarity is not None
    wary = replace(before, familiarity=Familiarity(0.0, before.familiarity.far, (0.1, 0.99)))
    files[checkpoint.CALIBRATION] = calibration.dumps(wary)
    parent = tmp_path / "parent"
    checkpoint.write_checkpoint(parent, files, manifest.base, manifest.pools, manifest.text, manifest.metrics, None)
    words = ["calibrate", "--checkpoint", str(parent), "--outcomes", str(places["mixed"]), "--groups"]
    assert main([*words, "--out", str(tmp_path / "new")]) == 0
    child = Runtime.load(tmp_path / "new")
    rows = [json.loads(line) for line in places["mixed"].read_text().splitlines()]
    found = child.score([child.prepare(row["question"], group=row["group"]) for row in rows])
    flags = np.array([scores.unfamiliar for scores in found])
    assert curves_differ_by(child, np.array([scores.quality for scores in found]), flags) < 0.02
