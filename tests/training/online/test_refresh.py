"""Served traffic to a published checkpoint, or to a refusal: whole refreshes on a two-layer BERT."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from depo_gateway.estimator import checkpoint, standing
from depo_gateway.estimator.records.store import Feedback, Store
from depo_gateway.estimator.records.types import FEEDBACK, Label, Labelled, Record
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.training.__main__ import main
from depo_gateway.training.online.embedding_cache import EmbeddingCache
from depo_gateway.training.online.refresh import RefreshResult, refresh
from depo_gateway.training.online.refresh_config import REFUSALS, GateConfig, RefreshConfig
from tests.conftest import WORDS

CONFIG = RefreshConfig(min_labels=50, learning_rate=0.4, wide_learning_rate=0.4, gate=GateConfig(resamples=200))
POOLS = ("small", "large")


def asked(index: int, seed: int = 0) -> str:
    chance = random.Random(1000 * seed + index)
    words = [chance.choice(WORDS[4:]) for _ in range(12)]
    words.insert(chance.randrange(13), "hard" if index % 2 else "easy")
    return " ".join(words)


def truth(pool: str, index: int, flip: bool = False) -> float:
    """The large pool is right 9 times in 10, the small one where it is easy; flip: where it is hard."""
    chance = random.Random(7 * index + len(pool))
    easy = (index % 2 == 0) != flip
    return float(chance.random() < (0.9 if pool == "large" or easy else 0.15))


def record(index: int, key: str = "", pool: str = "small", seed: int = 0) -> Record:
    return Record(
        id=f"r{index}", time=10.0 * index, key=key or f"k{index % 6}", pool=pool, reason="confident", pools=POOLS,
        status=200, asked=asked(index, seed), seq=index + 1,
    )  # fmt: skip


def shadowed(indices: Sequence[int], flip: bool = False) -> list[Labelled]:
    """Records with a judge's labels of both pools."""
    found = []
    for index in indices:
        right = [truth(pool, index, flip) for pool in POOLS]
        labels = [Label(index + 1, POOLS[n], "model", right[n], None, 0.0, 2 * index + n + 1) for n in range(2)]
        found.append(Labelled(record(index), tuple(labels)))
    return found


def rated(indices: Sequence[int], key: str = "", lie: bool = False) -> list[Labelled]:
    """Records of the pool that serves them, half and half, with feedback on it."""
    found = []
    for index in indices:
        pool = POOLS[random.Random(index).randrange(2)]
        score = abs(truth(pool, index) - lie)
        of = replace(record(index, key, pool), reason="explore", propensity=0.5)
        found.append(Labelled(of, (Label(index + 1, pool, FEEDBACK, score, None, 0.0, 2 * index + 1),)))
    return found


def predicted(place: Path, seed: int = 5) -> np.ndarray:
    """Qualities (200, 2) of prompts never seen; every second one is hard."""
    runtime = Runtime.load(checkpoint.resolve(place))
    return np.array([s.quality for s in runtime.score([runtime.prepare(asked(i, seed)) for i in range(200)])])


def cold(encoder: Path, labelled: list[Labelled], out: Path, config: RefreshConfig = CONFIG) -> RefreshResult:
    return refresh(labelled, encoder, out, config, cold=True)


def test_from_nothing_to_a_published_router_and_on(tiny_checkpoint: Path, tmp_path: Path) -> None:
    cache = EmbeddingCache()
    first = refresh(shadowed(range(300)), tiny_checkpoint, tmp_path, CONFIG, cache=cache, cold=True)
    assert first.verdict.reasons == ()
    assert first.published is not None
    assert first.place == checkpoint.resolve(tmp_path)
    gain = np.diff(predicted(tmp_path))[:, 0]
    assert gain[1::2].mean() > gain[::2].mean() + 0.4
    metrics = first.published.metrics
    assert (metrics["labels"], metrics["trained_to"], first.published.pools) == (300, 600, POOLS)
    stands = standing.read_standing(tmp_path)
    assert stands == first.standing
    assert stands is not None
    assert stands.beats_random
    assert stands.version == first.published.version
    assert stands.low > 0
    # without new labels there is nothing better; when labels are reversed, the router follows
    again = refresh(shadowed(range(300)), tiny_checkpoint, tmp_path, CONFIG, cache=cache, cold=True)
    assert again.published is None
    assert checkpoint.resolve(tmp_path) == first.place
    turned = [*shadowed(range(100)), *shadowed(range(300, 800), flip=True)]
    known = len(cache)
    second = refresh(turned, tiny_checkpoint, tmp_path, CONFIG, cache=cache, cold=True)
    assert len(cache) == known + 500
    assert second.published is not None, second.verdict
    assert second.published.parent == first.published.version
    gain = np.diff(predicted(tmp_path))[:, 0]
    assert gain[1::2].mean() < gain[::2].mean()


def test_a_base_that_is_served_is_continued_and_beaten(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The base learned that only the large pool is right on hard prompts; here it is the reverse."""
    result = refresh(shadowed(range(400), flip=True), tiny_checkpoint, tmp_path, CONFIG)
    assert result.published is not None, result.verdict
    assert result.published.parent == checkpoint.load_manifest(tiny_checkpoint).version
    newest = result.verdict.figures["newest"]
    assert newest["area_difference"][1] > 0
    assert newest["rival_apgr"] < 0.5 < newest["apgr"]


def test_feedback_on_the_served_pool_alone_is_enough(tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = cold(tiny_checkpoint, rated(range(600)), tmp_path)
    assert result.published is not None, result.verdict
    assert result.verdict.figures["newest"]["all_labels"] is False
    gain = np.diff(predicted(tmp_path))[:, 0]
    assert gain[1::2].mean() > gain[::2].mean() + 0.3
    assert Runtime.load(checkpoint.resolve(tmp_path)).calibration.threshold("gain", quality=0.9) < 1


def test_a_key_that_always_lies_does_not_move_the_router(tiny_checkpoint: Path, tmp_path: Path) -> None:
    honest, lies = rated(range(1000)), rated(range(1000, 1052), "liar", lie=True)
    clean = cold(tiny_checkpoint, honest, tmp_path / "clean")
    poisoned = cold(tiny_checkpoint, [*honest, *lies], tmp_path / "poisoned")
    assert clean.notes == ()
    (note,) = poisoned.notes
    assert note.startswith(
        "the labels claimed by key 'liar' contradict the predictions fitted on the other labels (z = "
    )
    assert poisoned.labels == 1000
    assert np.abs(predicted(tmp_path / "clean") - predicted(tmp_path / "poisoned")).max() < 1e-6


def test_a_worse_candidate_is_refused_and_goes_on_record(tiny_checkpoint: Path, tmp_path: Path) -> None:
    before = cold(tiny_checkpoint, shadowed(range(300)), tmp_path)
    shuffled = shadowed(range(300, 900))
    labels = [item.labels for item in shuffled]
    random.Random(0).shuffle(labels)
    worse = [
        Labelled(item.record, tuple(replace(label, record=item.record.seq, seq=item.record.seq * 2) for label in given))
        for item, given in zip(shuffled, labels, strict=True)
    ]
    result = refresh(worse, tiny_checkpoint, tmp_path, CONFIG)
    assert result.published is None
    assert any("not shown to route better than random routing" in reason for reason in result.verdict.reasons)
    assert checkpoint.resolve(tmp_path) == before.place
    (line,) = (tmp_path / REFUSALS).read_text().splitlines()
    refusal = json.loads(line)
    assert refusal["reasons"] == list(result.verdict.reasons)
    assert before.published is not None
    assert refusal["champion"] == before.published.version
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [REFUSALS, "current", standing.STANDING, checkpoint.resolve(tmp_path).name]
    )
    stands = standing.read_standing(tmp_path)  # of the champion, on labels that are random now
    assert stands is not None
    assert (stands.version, stands.labels) == (before.published.version, 300)


def test_turns_of_one_conversation_are_no_evidence_for_each_other(tiny_checkpoint: Path, tmp_path: Path) -> None:
    labelled = []
    for index in range(600):  # four turns each; no prompt predicts in which conversation the small pool fails
        number, turn = divmod(index, 4)
        chance = random.Random(number)
        right = (float(chance.random() < 0.5), 1.0)
        turns = [{"role": "user", "content": " ".join(chance.choice(WORDS[4:]) for _ in range(20))}]
        for _ in range(turn):
            turns += [
                {"role": "assistant", "content": "the"},
                {"role": "user", "content": asked(chance.randrange(999))},
            ]
        of = replace(record(index), asked=turns, conversation=f"c{number}")
        labels = [Label(index + 1, POOLS[n], "model", right[n], None, 0.0, 2 * index + n + 1) for n in range(2)]
        labelled.append(Labelled(of, tuple(labels)))
    result = cold(tiny_checkpoint, labelled, tmp_path)
    assert result.published is None
    assert any("not shown to route better than random routing" in reason for reason in result.verdict.reasons)


def test_a_reference_set_is_asked_too(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from depo_gateway.training.outcomes.table import Row

    rows = [
        Row(asked(i, 3), "", {pool: truth(pool, i) for pool in POOLS}, {}, "", "") for i in range(200)
    ]  # fmt: skip
    assert cold(tiny_checkpoint, shadowed(range(300)), tmp_path).published is not None
    result = refresh(shadowed(range(300, 900), flip=True), tiny_checkpoint, tmp_path, CONFIG, rows)
    assert result.published is None
    assert any("reference set worse than the champion" in reason for reason in result.verdict.reasons)


def test_reference_prompts_that_the_champion_was_fitted_on_are_not_compared(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    from depo_gateway.estimator.records.types import Example
    from depo_gateway.training.evaluation import contamination
    from depo_gateway.training.outcomes.table import Row

    rows = [Row(asked(i, 3), "", {pool: truth(pool, i) for pool in POOLS}, {}, "", "") for i in range(300)]
    manifest, files = checkpoint.load_checkpoint(tiny_checkpoint)
    for number, (count, compared, noted) in enumerate(((200, 100, False), (300, 300, True))):
        known = {"fitted_on": contamination.fingerprints([Example(row.question, {}) for row in rows[:count]])}
        base = tmp_path / f"base{number}"
        checkpoint.write_checkpoint(base, files, manifest.base, manifest.pools, manifest.text, known)
        result = refresh(shadowed(range(300)), base, tmp_path / f"out{number}", CONFIG, rows)
        assert result.verdict.figures["reference"]["prompts"] == compared
        assert any("fitted on the reference's prompts" in note for note in result.notes) == noted


def test_targets_are_carried_over_with_new_thresholds(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from depo_gateway.estimator import calibration

    manifest, files = checkpoint.load_checkpoint(tiny_checkpoint)
    targets = {"large-share=0.4": {"gain": 0.123}, "cost=0.5": {"gain": 0.1}}
    files[checkpoint.CALIBRATION] = calibration.dumps(
        replace(calibration.loads(files[checkpoint.CALIBRATION]), targets=targets)
    )
    base = tmp_path / "base"
    checkpoint.write_checkpoint(base, files, manifest.base, manifest.pools, manifest.text, {})
    result = refresh(shadowed(range(400), flip=True), base, tmp_path / "out", CONFIG)
    assert result.place is not None
    written = Runtime.load(result.place).calibration
    assert set(written.targets) == {"large-share=0.4"}
    threshold = written.targets["large-share=0.4"]["gain"]
    assert written.large_share("gain", threshold) == pytest.approx(0.4, abs=0.1)
    assert any(note.startswith("the target cost=0.5 is not carried over") for note in result.notes)


def test_mistakes_are_one_sentence(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"sqlite:///{tmp_path / 'records.db'}"
    words = ["refresh", "--records", url, "--base", str(tiny_checkpoint), "--out", str(tmp_path / "out")]
    store = Store(url)
    store.create()
    assert main(words) == 2
    assert "there are no records yet" in capsys.readouterr().err
    store.append([replace(record(1), seq=0, asked=None)])
    assert main(words) == 2
    assert "set records.prompts: full in gateway.yaml" in capsys.readouterr().err
    store.append([replace(record(2), seq=0)])
    assert store.feedback([Feedback("r2", "k2", 1.0, "", 1.0)]) == [True]
    assert main(words) == 1
    assert "refused, 1 labelled prompts are fewer than min_labels, 100;" in capsys.readouterr().err
    store.append([replace(record(3, pool="huge"), seq=0)])
    assert store.feedback([Feedback("r3", "k3", 1.0, "", 1.0)]) == [True]
    assert main(words) == 2
    assert "the records name the pool 'huge', but the checkpoint scores small, large" in capsys.readouterr().err
    store.close()


def test_the_command_learns_from_a_database(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path / 'records.db'}"
    store = Store(url)
    store.create()
    items = shadowed(range(400), flip=True)
    store.append([replace(item.record, seq=0) for item in items])
    stored = {item.record.id: item.record.seq for item in store.logged(1000)}
    store.add_labels(
        [replace(label, record=stored[item.record.id], time=1.0, seq=0) for item in items for label in item.labels]
    )
    store.close()
    out = tmp_path / "out"
    words = ["refresh", "--records", url, "--base", str(tiny_checkpoint), "--out", str(out)]
    assert main([*words, "--no-publish"]) == 0
    assert not (out / "current").exists()
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "400 labelled prompts" in printed
    assert f"{checkpoint.resolve(out)}: checkpoint" in printed
