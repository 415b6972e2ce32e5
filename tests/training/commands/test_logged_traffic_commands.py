"""depo-train evaluate and calibrate on logged traffic: a real store, a two-layer encoder."""

import json
import random
from pathlib import Path

import pytest

from depo_gateway.estimator import checkpoint
from depo_gateway.estimator.records.store import Feedback, Store
from depo_gateway.estimator.records.types import Label, Record, RoutingSettings
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.training.__main__ import main
from tests.training.commands.test_fit_evaluate_calibrate import fit, mistake, write_table

COSTS = ["--costs", "small=1", "large=5"]
WANTED = ["--target", "large-share=0.3", "quality=0.9", "cost=0.6"]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    folder = tmp_path_factory.mktemp("records")
    assert fit(write_table(folder / "first.jsonl", 300, 0), tiny_encoder, folder / "fitted") == 0
    return folder / "fitted"


def traffic(
    place: Path,
    count: int = 400,
    explore: float = 0.3,
    shadowed: float = 0.0,
    feedback: float = 1.0,
    asked: bool = True,
    pools: tuple[str, str] = ("small", "large"),
    settings: RoutingSettings | None = None,
    threshold: float = 0.7,
) -> str:
    """A store of what a router that sends "hard" questions to the large pool saw, and what became of them; its URL."""
    url = f"sqlite:///{place}"
    chance = random.Random(count)
    rows = [json.loads(line) for line in write_table(place.with_suffix(".jsonl"), count, 7).read_text().splitlines()]
    records, labels, scores = [], [], []
    for index, row in enumerate(rows):
        greedy = int("hard" in row["question"])
        explored = chance.random() < explore
        pool = chance.randrange(2) if explored else greedy
        propensity = explore / 2 + (1 - explore) * (pool == greedy)
        reason = "explore" if explored else ("confident", "unsure")[greedy]
        if index % 10 == 9:
            reason, propensity = "sticky", 1.0
        records.append(
            Record(
                f"r{index}", 1e9 + index, conversation=f"c{index // 2}", pool=pools[pool], reason=reason,
                propensity=propensity, pools=pools, status=500 if index % 40 == 0 else 200, prompt_tokens=20 + greedy,
                completion_tokens=30, asked=[{"role": "user", "content": row["question"]}] if asked else None,
                settings=settings, threshold=threshold if settings else None,
            )
        )  # fmt: skip
        outcome = [row["correct"]["s"], row["correct"]["l"]]
        if chance.random() < shadowed:
            labels += [Label(index + 1, name, "exact", outcome[k], 0.5 + k / 4) for k, name in enumerate(pools)]
        elif chance.random() < feedback:
            scores.append(Feedback(f"r{index}", "", outcome[pool]))
    store = Store(url)
    store.create()
    store.append(records)
    store.add_labels(labels)
    store.feedback(scores)
    store.close()
    return url


def evaluate(fitted: Path, url: str, out: Path, *more: str) -> dict:
    assert main(["evaluate", "--checkpoint", str(fitted), "--records", url, "--out", str(out), *more]) == 0
    return json.loads((out / "report.json").read_text())


def test_evaluate_from_feedback_alone(fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = evaluate(fitted, traffic(tmp_path / "records.db"), tmp_path / "report", *COSTS)
    assert "apgr" not in report["all"]  # no prompt has both labels
    logs = report["logs"]
    assert (logs["read"], logs["complete"], logs["unused"]) == (400, 0, {"not answered": 10})
    assert logs["not_weighted"] == {"sticky": 40}
    assert logs["weighted"] == 350
    for rule in ("gain", "difficulty"):
        for method in ("snips", "doubly_robust"):
            rows = logs["rules"][rule][method]
            assert [row["threshold"] for row in rows] == sorted(row["threshold"] for row in rows)
            best = max(rows, key=lambda row: row["against_coin"]["value"])
            assert best["against_coin"]["low"] > 0
            assert best["against_length"]["low"] > 0
            for row in rows:
                assert row["quality"]["low"] <= row["quality"]["value"] <= row["quality"]["high"]
                assert 0.199 <= row["cost"] <= 1.001
                assert row["coin_cost"] == pytest.approx(0.2 + 0.8 * row["large_share"])
    assert max(row["large_share"] for row in logs["rules"]["difficulty"]["snips"]) == 1.0
    assert (tmp_path / "report" / "curve.png").read_bytes().startswith(b"\x89PNG")
    scores = [json.loads(line) for line in (tmp_path / "report" / "scores.jsonl").read_text().splitlines()]
    assert len(scores) == 390
    assert {name for row in scores for name in row} == {"question", "quality", "confidence", "unfamiliar"}
    text = (tmp_path / "report" / "report.md").read_text()
    assert text.splitlines()[0] == f"# {capsys.readouterr().out.splitlines()[0]}"
    assert "Not weighted: 40 sticky." in text
    assert "| relative cost" in text
    assert "no support" not in text


def test_shadowed_records_are_measured_as_outcomes_too(fitted: Path, tmp_path: Path) -> None:
    report = evaluate(fitted, traffic(tmp_path / "records.db", explore=0.0, shadowed=0.5), tmp_path / "report")
    assert report["all"]["apgr"]["gain (full)"]["apgr"] > 0.6
    logs = report["logs"]
    assert logs["rules"]["gain"]["direct"][3]["quality"]["value"] > 0
    assert not logs["explored"]
    told = [row["quality"]["value"] is not None for row in logs["rules"]["difficulty"]["snips"]]
    assert not all(told)  # nobody knows what all-large would have scored on what was not shadowed
    assert all(row["quality"]["value"] is not None for row in logs["rules"]["difficulty"]["direct"])


def test_deterministic_logs_are_reported(fitted: Path, tmp_path: Path) -> None:
    report = evaluate(fitted, traffic(tmp_path / "records.db", explore=0.0), tmp_path / "report")
    rows = report["logs"]["rules"]["difficulty"]["snips"]
    assert rows[0]["quality"]["value"] is None
    assert rows[0]["unsupported"] > 0.3
    text = (tmp_path / "report" / "report.md").read_text()
    assert "were deterministic (routing.explore: 0)" in text
    assert "no support" in text


@pytest.mark.parametrize("shadowed", [0.0, 1.0])
def test_calibrate_on_traffic(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], shadowed: float
) -> None:
    url = traffic(tmp_path / "records.db", 600, shadowed=shadowed)
    words = ["calibrate", "--checkpoint", str(fitted), "--records", url, *WANTED, *COSTS]
    assert main([*words, "--out", str(tmp_path / "new")]) == 0
    child, parent = Runtime.load(tmp_path / "new"), Runtime.load(fitted)
    assert child.manifest.parent == parent.version
    assert set(child.calibration.targets) == {"large-share=0.3", "quality=0.9", "cost=0.6"}
    assert child.calibration.stages["full"]["quality"] != parent.calibration.stages["full"]["quality"]
    curve = child.calibration.curves["difficulty"]
    assert curve.quality is not None
    assert curve.quality[-1] == pytest.approx(0.95, abs=0.04)  # all large
    assert curve.quality[0] == pytest.approx((0.15 + 0.9) / 2, abs=0.08)  # all small
    at = child.calibration.targets["quality=0.9"]["difficulty"]
    assert 0.3 < child.calibration.large_share("difficulty", at) < 0.9
    assert "not met" not in capsys.readouterr().out


def test_partial_labels_are_weighted(fitted: Path, tmp_path: Path) -> None:
    """The small pool served easy questions, mostly: taken as they come its labels would boast."""
    url = traffic(tmp_path / "records.db", 1500, explore=0.2)
    assert main(["calibrate", "--checkpoint", str(fitted), "--records", url, "--out", str(tmp_path / "new")]) == 0
    runtime = Runtime.load(tmp_path / "new")
    rows = [json.loads(line)["question"] for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    scores = runtime.score([runtime.prepare(question) for question in rows[:400]])
    assert sum(score.quality[0] for score in scores) / 400 == pytest.approx(0.525, abs=0.05)


def test_calibrate_guarantees_a_loss(fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = traffic(tmp_path / "records.db", 2400, shadowed=1.0)
    words = ["calibrate", "--checkpoint", str(fitted), "--records", url, "--out"]
    assert main([*words, str(tmp_path / "new"), "--target", "loss=0.1", "loss=0", "--delta", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "loss=0.1@0.9 under gain: threshold" in out
    assert "loss=0@0.9 under difficulty: nothing passes" in out
    loaded = Runtime.load(tmp_path / "new")
    at = loaded.calibration.targets["loss=0.1@0.9"]["difficulty"]
    assert loaded.calibration.large_share("difficulty", at) < 0.8
    assert loaded.calibration.targets["loss=0@0.9"]["difficulty"] == 1.0
    proof = loaded.manifest.metrics["guarantees"]["loss=0.1@0.9"]["difficulty"]
    assert (proof["passed"], proof["threshold"]) == (True, at)
    assert proof["prompts"] == pytest.approx(800, abs=60)  # one turn a conversation, two thirds of them


def test_a_guarantee_takes_outcome_tables_too(fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(tmp_path / "table.jsonl", 900, 5)
    words = ["calibrate", "--checkpoint", str(fitted), "--outcomes", str(table), "--target", "loss=0.1"]
    assert main([*words, "--out", str(tmp_path / "new")]) == 0
    assert "loss=0.1@0.95 under difficulty: threshold" in capsys.readouterr().out
    own = write_table(tmp_path / "own.jsonl", 300, 0)  # what it was fitted on proves nothing
    words[4] = str(own)
    assert "was fitted on all 300 of these 300 prompts" in mistake(capsys, [*words, "--out", str(tmp_path / "other")])
    half = tmp_path / "half.jsonl"
    half.write_text('{"question": "an easy one", "correct": {"s": 1}}\n{"question": "a hard", "correct": {"l": 1}}\n')
    words[4] = str(half)
    assert "needs prompts with labels of every pool" in mistake(capsys, [*words, "--out", str(tmp_path / "other")])


def test_mistakes_of_records_are_one_line(fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("evaluate", "calibrate"):
        base = [command, "--checkpoint", str(fitted), "--out", str(tmp_path / f"{command}-out")]

        def said(url: str, *more: str, base: list[str] = base) -> str:
            return mistake(capsys, [*base, "--records", url, *more])

        empty = f"sqlite:///{tmp_path / f'{command}-empty.db'}"
        Store(empty).create()
        assert "holds no records" in said(empty)
        assert "no such file" in said(f"sqlite:///{tmp_path / 'absent.db'}")
        assert not (tmp_path / "absent.db").exists()
        assert "records.url names mysql" in said("mysql://x")
        place = tmp_path / command
        place.mkdir()
        full = traffic(place / "full.db", 40)
        assert "no records of the last 2 days" in said(full, "--since", "2")
        assert "--since is 0 days" in said(full, "--since", "0")
        assert "--newest is 0" in said(full, "--newest", "0")
        line = said(traffic(place / "textless.db", 40, asked=False))
        assert "records.prompts: full in gateway.yaml" in line
        assert "has a label; send scores to /v1/feedback" in said(traffic(place / "unlabelled.db", 40, feedback=0.0))
        line = said(traffic(place / "others.db", 40, pools=("tiny", "huge")))
        assert "the records' pools are huge, tiny, the checkpoint's small, large" in line
        assert "not allowed with" in said(full, "--outcomes", "x.jsonl")
        assert "required" in mistake(capsys, base)
        assert "--since goes with --records" in mistake(capsys, [*base, "--outcomes", "x", "--since", "2"])
        assert not (tmp_path / f"{command}-out").exists()
    line = mistake(capsys, ["calibrate", *base[1:], "--records", full, "--target", "loss=0.1", "--delta", "1"])
    assert "--delta is 1" in line
    assert "needs prompts with labels of every pool" in said(full, "--target", "loss=0.1")
    evaluating = ["evaluate", *base[1:], "--records", full]
    assert "--clip is 0.5" in mistake(capsys, [*evaluating, "--clip", "0.5"])
    assert "--costs must give each of small, large" in mistake(capsys, [*evaluating, "--costs", "small=1"])


def test_publish_from_records(fitted: Path, tmp_path: Path) -> None:
    url = traffic(tmp_path / "records.db", 100)
    words = ["calibrate", "--checkpoint", str(fitted), "--records", url, "--publish"]
    assert main([*words, "--out", str(tmp_path / "first")]) == 0
    assert checkpoint.resolve(tmp_path) == tmp_path / "first"
