"""The reports of depo-train evaluate, as their readers get them: on outcome tables and on logged traffic."""

import json
import math
import re
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver

from depo_gateway.estimator.records.types import RoutingSettings, ServedPool
from depo_gateway.training.__main__ import main
from depo_gateway.training.evaluation.headline import difference_text, kept_text, percent, threshold_text
from tests import chromium as browsers
from tests.chromium import chromium
from tests.training.commands.test_fit_evaluate_calibrate import fit, mistake, write_table
from tests.training.commands.test_logged_traffic_commands import traffic
from tests.training.evaluation.test_page import Page, loads_nothing

__all__ = ["chromium"]  # a fixture
COSTS = ["--costs", "small=1", "large=5"]
SERVED = {"small": ServedPool("org/small-7b", 1.0), "large": ServedPool("org/large-70b", 5.0)}
SETTINGS = RoutingSettings("gain", 0.7, {}, SERVED)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """A folder with tables, and a checkpoint fitted on the first."""
    folder = tmp_path_factory.mktemp("reports")
    write_table(folder / "second.jsonl", 400, 1)
    assert fit(write_table(folder / "first.jsonl", 300, 0), tiny_encoder, folder / "fitted") == 0
    return folder


def evaluate(place: Path, out: Path, *flags: str) -> dict[str, Any]:
    assert main(["evaluate", "--checkpoint", str(place / "fitted"), "--out", str(out), *flags]) == 0
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def numbers(of: dict[str, Any]) -> dict[str, float]:
    """A value and interval of report.json, whose null is NaN."""
    return {name: math.nan if value is None else value for name, value in of.items()}


def cells(text: str) -> list[list[str]]:
    """The rows of all Markdown tables."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ .*$", text, re.MULTILINE)


def test_sentence_table_and_json_have_the_same_numbers(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = evaluate(place, tmp_path, "--outcomes", str(place / "second.jsonl"), *COSTS)
    said = capsys.readouterr().out
    head = report["headline"]
    row = head["in_force"]
    kept = kept_text(numbers(row["kept_quality"]))
    assert said.splitlines()[0] == head["sentence"]
    assert head["sentence"].startswith(
        f"At threshold 0.85 you send {percent(row['large_share'])} to large, pay {percent(row['cost'])} of all-large's"
        f" cost and keep {kept} of its quality"
    )
    (shown,) = [line for line in cells(said) if line[0] == "threshold 0.85, in force"]
    above = difference_text(numbers(row["kept_above_random"]))
    assert shown[1:] == [
        percent(row["large_share"]),
        percent(row["cost"]),
        f"{row['quality']['value']:.3f}",
        kept,
        above,
    ]
    (swept,) = [point for point in report["sweep"] if point["threshold"] == 0.85]
    assert swept == row
    old = {point["threshold"]: point for point in report["all"]["thresholds"]["gain"]}[0.85]
    assert row["large_share"] == pytest.approx(old["large_share"])
    assert row["quality"]["value"] == pytest.approx(old["quality"])
    assert row["coin"]["value"] == pytest.approx(old["coin"])
    assert row["cost"] == pytest.approx(0.2 + 0.8 * row["large_share"])
    assert row["kept_quality"]["value"] == pytest.approx(row["quality"]["value"] / report["all"]["large_quality"])


def test_the_report_is_a_sentence_a_figure_two_tables_and_an_appendix(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = evaluate(place, tmp_path, "--outcomes", str(place / "second.jsonl"))
    said, text = capsys.readouterr().out, (tmp_path / "report.md").read_text()
    assert text.startswith(f"# {report['headline']['sentence']}\n")
    assert headings(text) == [
        f"# {report['headline']['sentence']}",
        "## What each threshold would do",
        "## By source",
        "## Appendix",
        "### All prompts",
        "### Source even",
        "### Source odd",
    ]
    front, appendix = text.split("## Appendix")
    assert front.count("|--") - front.count("-|--") == 2  # tables
    assert front.count("![") == text.count("![") == 1
    assert front.index("](curve.png)") < front.index("## What each")
    assert front.index("Random: the same share") < front.index("| all-small")
    assert "APGR" not in front
    assert "| rule gain" not in front
    assert "APGR of every routing" in appendix
    assert "No costs are known: give --costs small=X large=X" in front
    assert "Appendix" not in said
    assert "| all-small" in said
    assert said.endswith(
        f"Figure and appendix: {tmp_path / 'report.html'} (the same in report.md; figures in report.json)\n"
    )


def test_with_one_source_the_ways_to_route_are_compared_and_apgr_is_explained(place: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (place / "second.jsonl").read_text().splitlines()]
    one = tmp_path / "one.jsonl"
    one.write_text("".join(json.dumps({**row, "source": "one"}) + "\n" for row in rows))
    report = evaluate(place, tmp_path / "report", "--outcomes", str(one))
    front, _ = (tmp_path / "report/report.md").read_text().split("## Appendix")
    assert front.index("APGR, average performance gap recovered:") < front.index("| APGR")
    shown = {line[0]: line[1] for line in cells(front)}
    for rule in ("gain", "difficulty"):
        assert shown[f"rule {rule}"] == f"{report['all']['apgr'][f'{rule} (full)']['apgr']:.3f}"
    assert shown["prompt length"] == f"{report['all']['apgr']['length']['apgr']:.3f}"


def test_the_page_has_all_of_it_and_loads_nothing(place: Path, tmp_path: Path) -> None:
    report = evaluate(place, tmp_path, "--outcomes", str(place / "second.jsonl"), *COSTS)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert loads_nothing(text)
    (image,) = page.named("img")
    assert "threshold 0.85 with" in (image["alt"] or "")
    assert percent(report["headline"]["in_force"]["large_share"]) in (image["alt"] or "")
    assert len(page.named("h1")) == 1
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert len(page.named("caption")) == len(page.named("table")) >= 2
    for line in cells((tmp_path / "report.md").read_text()):
        assert all(f">{cell}<" in text for cell in line if not set(cell) <= {"-"}), line


@pytest.mark.parametrize("width", [1200, 400])
def test_the_page_fits_its_window(place: Path, tmp_path: Path, chromium: webdriver.Chrome, width: int) -> None:
    evaluate(place, tmp_path, "--outcomes", str(place / "second.jsonl"), *COSTS)
    browsers.resize(chromium, width)
    chromium.get((tmp_path / "report.html").as_uri())
    deadline = time.monotonic() + 20
    while not chromium.execute_script("return document.querySelector('img').complete"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
    assert chromium.execute_script("return document.querySelector('img').naturalWidth") > 0
    assert chromium.execute_script("return performance.getEntriesByType('resource').length") <= 1  # the data: picture


def test_prompts_that_were_fitted_on_are_left_out(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (place / f"{name}.jsonl" for name in ("first", "second"))
    both = ["--outcomes", str(first), str(second)]
    alone, report = evaluate(place, tmp_path / "alone", *both[:1], both[2]), evaluate(place, tmp_path / "both", *both)
    assert capsys.readouterr().err == ""
    assert report["left_out"]["fitted"] == 300
    assert (report["all"], report["headline"]) == (alone["all"], alone["headline"])
    text = (tmp_path / "both/report.md").read_text()
    assert "300 prompts were left out because the checkpoint was fitted on them (--include-fitted includes them" in text
    scores = (tmp_path / "both/scores.jsonl").read_text().splitlines()
    assert len(scores) == 700  # of every prompt
    included = evaluate(place, tmp_path / "included", *both, "--include-fitted")
    assert included["all"]["prompts"] == 300 + report["all"]["prompts"]
    assert "results on those are optimistic" in (tmp_path / "included/report.md").read_text()
    assert "the checkpoint was fitted on" in capsys.readouterr().err
    words = [
        "evaluate",
        "--checkpoint",
        str(place / "fitted"),
        "--out",
        str(tmp_path / "none"),
        "--outcomes",
        str(first),
    ]
    line = mistake(capsys, words)
    assert "was fitted on all 300 of these 300 prompts" in line
    assert "give other prompts, or --include-fitted" in line
    assert not (tmp_path / "none").exists()


def test_little_data_is_said_instead_of_a_number(place: Path, tmp_path: Path) -> None:
    lines = (place / "second.jsonl").read_text().splitlines()
    (tmp_path / "few.jsonl").write_text("\n".join(lines[:20]))
    half = [json.loads(line) for line in lines[:200]]
    for index, row in enumerate(half):
        row["correct"].pop("s" if index % 2 else "l")
    (tmp_path / "half.jsonl").write_text("\n".join(map(json.dumps, half)))
    for name, why in (("few", "only 20 prompts have labels"), ("half", "no prompt has labels of every pool")):
        report = evaluate(place, tmp_path / name, "--outcomes", str(tmp_path / f"{name}.jsonl"), *COSTS)
        row = report["headline"]["in_force"]
        assert report["headline"]["sentence"].startswith(
            f"At threshold 0.85 you send {percent(row['large_share'])} to large and pay {percent(row['cost'])} of"
            f" all-large's cost; how much quality that keeps can't be said: {why}"
        )
        front, _ = (tmp_path / name / "report.md").read_text().split("## Appendix")
        assert "nan" not in (tmp_path / name / "report.md").read_text()
        assert "quality kept" not in front or name == "few" or "too few labels" in front
        assert (tmp_path / name / "curve.png").exists()


def test_a_large_pool_that_is_no_better_is_said_first(place: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (place / "second.jsonl").read_text().splitlines()]
    same = tmp_path / "same.jsonl"
    same.write_text("".join(json.dumps({**row, "correct": {"s": row["correct"]["s"], "l": 0}}) + "\n" for row in rows))
    report = evaluate(place, tmp_path / "report", "--outcomes", str(same), *COSTS)
    assert report["headline"]["sentence"].startswith("Large is no better than small on these prompts (quality 0.000")
    assert "nan" not in (tmp_path / "report/report.md").read_text()


def test_the_config_of_the_gateway_sets_what_is_reported(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text(
        "version: 1\nrouting: {rule: difficulty, target: {large_share: 0.3}}\n"
        "pools: {small: {model: s, cost: 1, backends: []}, large: {model: l, cost: 4, backends: []}}\n"
    )
    report = evaluate(place, tmp_path / "report", "--outcomes", str(place / "second.jsonl"), "--config", str(path))
    head = report["headline"]
    assert (head["rule"], head["costs"]) == ("difficulty", {"small": 1.0, "large": 4.0})
    assert head["in_force"]["large_share"] == pytest.approx(0.3, abs=0.01)
    assert "meets routing.target large_share 0.3 on these prompts" in (tmp_path / "report/report.md").read_text()


def test_a_report_on_records_is_about_the_models_and_the_threshold_that_served(place: Path, tmp_path: Path) -> None:
    url = traffic(tmp_path / "records.db", 1500, settings=SETTINGS)
    report = evaluate(place, tmp_path / "report", "--records", url)
    head, row = report["headline"], report["headline"]["in_force"]
    assert report["pools"] == {"small": ["org/small-7b"], "large": ["org/large-70b"]}
    assert report["fitted_models"] == {"small": ["s"], "large": ["l"]}
    assert (head["threshold"], head["costs"]) == (0.7, {"small": 1.0, "large": 5.0})
    assert head["sentence"].startswith(
        f"At threshold 0.7 you send {percent(row['large_share'])} to large, pay {percent(row['cost'])} of all-large's"
        f" cost and keep {kept_text(numbers(row['kept_quality']))} of its quality"
    )
    text = (tmp_path / "report/report.md").read_text()
    assert "Answered by (requests): small: org/small-7b (" in text
    assert "The checkpoint's manifest names other models: small s; large l." in text
    assert "the gateway's settings on 100 of the newest 100 routed records" in text
    front, _ = text.split("## Appendix")
    assert front.index("off-policy estimate (doubly robust) from") < front.index("| routing")
    assert headings(front)[1:] == ["## What each threshold would do", "## The change from what served"]
    (swept,) = [point for point in report["logs"]["rules"]["gain"]["doubly_robust"] if point["threshold"] == 0.7]
    assert swept == row
    later = evaluate(place, tmp_path / "other", "--records", url, "--threshold", "0.4", *COSTS)
    assert later["headline"]["threshold"] == 0.4


def test_the_change_from_what_served_is_on_the_same_records(place: Path, tmp_path: Path) -> None:
    url = traffic(tmp_path / "records.db", 1500, settings=SETTINGS)
    report = evaluate(place, tmp_path / "report", "--records", url)
    served, change, row = report["change"]["served"], report["change"]["in_force"], report["headline"]["in_force"]
    assert change["large_share"] == pytest.approx(row["large_share"] - served["large_share"])
    assert change["cost"] == pytest.approx(row["cost"] - served["cost"])
    difference = row["kept_quality"]["value"] - served["kept_quality"]["value"]
    assert change["kept_quality"]["value"] == pytest.approx(difference)
    wide = row["kept_quality"]["high"] - row["kept_quality"]["low"]
    assert 0 < change["kept_quality"]["high"] - change["kept_quality"]["low"] < wide  # paired
    text = (tmp_path / "report/report.md").read_text()
    at = threshold_text(report["headline"]["threshold"])
    (line,) = [cell for cell in cells(text) if cell[0] == f"change to this checkpoint at {at}"]
    assert line[-1] == difference_text(numbers(change["kept_quality"]))
    (line,) = [cell for cell in cells(text) if cell[0] == "as served"]
    assert line[1:3] == [percent(served["large_share"]), percent(served["cost"])]


def test_a_target_that_served_is_met_by_the_new_checkpoint_too(place: Path, tmp_path: Path) -> None:
    settings = RoutingSettings("gain", None, {"large_share": 0.4}, SERVED)
    url = traffic(tmp_path / "records.db", 800, settings=settings, threshold=0.6)
    report = evaluate(place, tmp_path / "report", "--records", url)
    assert report["headline"]["in_force"]["large_share"] == pytest.approx(0.4, abs=0.04)
    assert "it meets routing.target large_share 0.4 on these prompts" in (tmp_path / "report/report.md").read_text()


def test_records_without_another_pools_answer_give_shares_only(place: Path, tmp_path: Path) -> None:
    url = traffic(tmp_path / "records.db", 400, explore=0.0, settings=SETTINGS)
    report = evaluate(place, tmp_path / "report", "--records", url)
    assert report["headline"]["sentence"].endswith(
        "can't be said: the records don't show what the other pool would have answered (routing.explore is 0 and"
        " nothing was shadowed)."
    )
    change = report["change"]["in_force"]
    assert change["kept_quality"]["value"] is None
    assert change["large_share"] == pytest.approx(
        report["headline"]["in_force"]["large_share"] - report["change"]["served"]["large_share"]
    )
    assert report["change"]["served"]["quality"]["value"] > 0.8  # of what served, the labels tell
    assert "nan" not in (tmp_path / "report/report.md").read_text()


def test_records_that_were_fitted_on_are_left_out(
    place: Path, tmp_path: Path, tiny_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = traffic(tmp_path / "records.db", 600, settings=SETTINGS)
    rows = (tmp_path / "records.jsonl").read_text().splitlines()
    half = tmp_path / "half.jsonl"
    half.write_text("\n".join(rows[:300]))
    assert fit(half, tiny_encoder, tmp_path / "fitted") == 0
    report = evaluate(tmp_path, tmp_path / "report", "--records", url)
    assert report["left_out"]["fitted"] == 292  # of 300, eight were not answered
    assert report["all"]["prompts"] == 585 - 292
    assert "292 prompts were left out" in (tmp_path / "report/report.md").read_text()
    assert len((tmp_path / "report/scores.jsonl").read_text().splitlines()) == 585
    included = evaluate(tmp_path, tmp_path / "included", "--records", url, "--include-fitted")
    assert included["all"]["prompts"] == 585
    assert fit(tmp_path / "records.jsonl", tiny_encoder, tmp_path / "all") == 0
    words = ["evaluate", "--checkpoint", str(tmp_path / "all"), "--records", url, "--out", str(tmp_path / "none")]
    assert "give other prompts, or --include-fitted" in mistake(capsys, words)
