"""Served traffic to a published checkpoint, or to a refusal: whole refreshes on a two-layer BERT."""

import json
import random
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from depo_gateway.estimator import checkpoint, held_publish, standing
from depo_gateway.estimator.records.store import Feedback, Store
from depo_gateway.estimator.records.types import FEEDBACK, Example, Label, Labelled, Record, RoutingSettings, ServedPool
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.estimator.similarity import usual_centres
from depo_gateway.estimator.text import TextConfig
from depo_gateway.training.__main__ import main
from depo_gateway.training.commands.refresh import published_text
from depo_gateway.training.online import holdout
from depo_gateway.training.online import refresh as refresh_module
from depo_gateway.training.online.champion import starting_point
from depo_gateway.training.online.cross_fit import learner_config
from depo_gateway.training.online.embedding_cache import EmbeddingCache
from depo_gateway.training.online.publication import OwnerTerms, RefreshResult
from depo_gateway.training.online.refresh import refresh
from depo_gateway.training.online.refresh_config import REFUSALS, GateConfig, OwnerGate, RefreshConfig
from depo_gateway.training.online.refresh_data import RefreshData
from depo_gateway.training.online.training_set import expanded_initialisation
from depo_gateway.training.outcomes.traffic_examples import examples_of_traffic
from tests.conftest import WORDS

CONFIG = RefreshConfig(min_labels=50, learning_rate=0.4, wide_learning_rate=0.4, gate=GateConfig(resamples=200))
POOLS = ("small", "large")
UNKNOWN = (
    "the change in large share and cost is unknown and not gated: no recent record was routed by a threshold, so the"
    " one in force is unknown"
)


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
    assert clean.notes == (UNKNOWN,)
    note, unknown = poisoned.notes
    assert unknown == UNKNOWN
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


FIXED = RoutingSettings("gain", 0.6, {}, {"small": ServedPool("s", 1.0), "large": ServedPool("l", 5.0)})


def live(settings: RoutingSettings, hard: float = 0.03, count: int = 300) -> list[Record]:
    """Routed traffic of which a small part is hard, so goes to the large pool as the served checkpoint sees it."""
    chance = random.Random(9)
    found = []
    for number in range(count):
        difficult = chance.random() < hard
        of = record(2 * number + difficult, pool="large" if difficult else "small", seed=9)
        reason = "unsure" if difficult else "confident"
        found.append(
            replace(of, id=f"live{number}", time=1e6 + number, reason=reason, threshold=0.6, settings=settings)
        )
    return found


def test_a_publish_that_would_raise_the_cost_is_held_until_its_owner_accepts_it(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labels say that the large pool is better on what most of the traffic asks: from 3% the share would jump."""
    labelled, terms = shadowed(range(400), flip=True), OwnerTerms(live(FIXED))
    result = refresh(labelled, tiny_checkpoint, tmp_path, CONFIG, terms=terms)
    assert result.published is None
    assert result.change is not None
    assert result.change.before.large_share < 0.06
    assert result.change.after.large_share > 0.7
    assert result.held is not None
    assert not (tmp_path / "current").exists()
    sentence = result.held.sentence
    assert re.fullmatch(
        r"refresh-\S+ is held back: at threshold 0\.6 \(rule gain\) the large share goes from [0-9.]+% to [0-9.]+% and"
        r" the cost from [0-9.]+% to [0-9.]+% of all-large's, on 300 live prompts; the cost would rise by [0-9.]+"
        r" points, and gate\.max_cost_increase allows 10; publish it with `depo-train accept --out \S+`, or raise"
        r" gate\.max_cost_increase",
        sentence,
    )
    assert result.verdict.reasons == (sentence,)
    (line,) = (tmp_path / REFUSALS).read_text().splitlines()
    assert json.loads(line)["figures"]["change"]["share_change"] == pytest.approx(result.change.share_change)
    assert held_publish.read_held(tmp_path) == result.held
    stands = standing.read_standing(tmp_path)  # of the checkpoint that is served still
    assert stands is not None
    assert stands.version == checkpoint.load_manifest(tiny_checkpoint).version
    # a second one takes its place; then the owner accepts
    again = refresh(labelled, tiny_checkpoint, tmp_path, CONFIG, terms=terms)
    assert again.held is not None
    assert held_publish.read_held(tmp_path) == again.held
    assert main(["accept", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == (
        f"published {again.held.version}: {tmp_path / 'current'} now names {again.held.checkpoint}\n"
    )
    manifest = checkpoint.load_manifest(checkpoint.resolve(tmp_path))
    assert manifest.version == again.held.version
    assert manifest.metrics["publish_change"]["cost_change"] == pytest.approx(again.held.cost_change)
    assert held_publish.read_held(tmp_path) is None
    stands = standing.read_standing(tmp_path)
    assert stands is not None
    assert stands.version == again.held.version
    assert main(["accept", "--out", str(tmp_path)]) == 2
    assert "no checkpoint is held back in" in capsys.readouterr().err


def test_with_the_gate_raised_it_is_published_and_the_change_goes_on_record(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    terms = OwnerTerms(live(FIXED), gate=OwnerGate(1.0))
    result = refresh(shadowed(range(400), flip=True), tiny_checkpoint, tmp_path, CONFIG, terms=terms)
    assert result.published is not None
    assert result.change is not None
    recorded = held_publish.published_change(result.published)
    assert recorded is not None
    assert recorded.share == pytest.approx(result.change.share_change)
    assert recorded.share > 0.6
    assert "the large share goes from" in published_text(result)


def test_under_a_target_the_share_hardly_moves_and_it_is_published(tiny_checkpoint: Path, tmp_path: Path) -> None:
    target = replace(FIXED, threshold=None, target={"large_share": 0.3})
    result = refresh(
        shadowed(range(400), flip=True), tiny_checkpoint, tmp_path, CONFIG, terms=OwnerTerms(live(target, hard=0.5))
    )
    assert result.published is not None
    assert result.change is not None
    assert result.change.target == "large_share=0.3"
    assert abs(result.change.share_change) < 0.05


def test_an_unknown_change_is_said_and_published(tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = refresh(shadowed(range(400), flip=True), tiny_checkpoint, tmp_path, CONFIG)
    assert result.published is not None
    assert result.change is None
    assert result.notes == (UNKNOWN,)
    assert held_publish.published_change(result.published) is None


def test_a_held_checkpoint_is_not_accepted_over_another_than_it_was_compared_with(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = refresh(shadowed(range(400), flip=True), tiny_checkpoint, tmp_path, CONFIG, terms=OwnerTerms(live(FIXED)))
    assert held.held is not None
    other = cold(tiny_checkpoint, shadowed(range(300)), tmp_path / "other")
    assert other.place is not None
    shutil.copytree(other.place, tmp_path / "mine")
    checkpoint.publish(tmp_path / "mine")
    assert main(["accept", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # before it, bars of progress of the refreshes
    assert error.startswith(f"depo-train accept: {held.held.checkpoint} was compared with ")
    assert checkpoint.resolve(tmp_path) == tmp_path / "mine"


def test_training_that_diverged_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(data: RefreshData) -> RefreshData:
        assert data.candidate is not None
        with torch.no_grad():
            for weight in (*data.candidate.learner.average, *data.candidate.learner.heads):
                weight.view(-1)[0] = float("inf")
        return holdout.judge_candidate(data)

    monkeypatch.setattr(refresh_module, "judge_candidate", poison)
    result = refresh(shadowed(range(400), flip=True), tiny_checkpoint, tmp_path, CONFIG)
    assert result.published is None
    assert result.verdict.reasons[0].startswith("training diverged: model.safetensors: ")
    assert not (tmp_path / "current").exists()


def named(labelled: list[Labelled], group: str) -> list[Labelled]:
    return [replace(item, record=replace(item.record, group=group)) for item in labelled]


def of_task(index: int) -> Labelled:
    """Prompts of two applications take turns; the small pool fails in one of them, whatever the prompt."""
    group = ("poems", "proofs")[index // 2 % 2]
    quality = {"small": float(group == "poems"), "large": 1.0}
    labels = [
        Label(index + 1, pool, "model", quality[pool], None, 0.0, 2 * index + n + 1) for n, pool in enumerate(POOLS)
    ]
    return Labelled(replace(record(index), group=group), tuple(labels))


def test_a_refresh_learns_the_tasks_of_its_records_and_what_is_unlike_them(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    fresh = refresh([of_task(index) for index in range(600)], tiny_checkpoint, tmp_path, CONFIG, cold=True)
    assert fresh.published is not None, fresh.verdict.reasons
    assert (fresh.published.base.groups, fresh.published.schema) == (("poems", "proofs"), 2)
    runtime = Runtime.load(checkpoint.resolve(tmp_path))
    centres, familiarity = fresh.published.base.centres, runtime.calibration.familiarity
    assert centres == 200
    assert familiarity is not None
    seen = runtime.score([runtime.prepare(asked(index, 5)) for index in range(100)])
    assert sum(one.unfamiliar for one in seen) <= 20
    poems, proofs = (
        np.mean(
            [one.quality[0] for one in runtime.score([runtime.prepare(asked(i, 5), group=name) for i in range(50)])]
        )
        for name in ("poems", "proofs")
    )
    assert poems > proofs + 0.3


def test_weights_of_a_served_checkpoint_are_continued_with_room_for_the_traffic(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Its groups stay known; new prompts are familiar afterwards, and the old ones still are."""
    before = named(shadowed(range(0, 300)), "poems")
    place = refresh(before, tiny_checkpoint, tmp_path, CONFIG, cold=True)
    assert place.published is not None
    traffic = named(shadowed(range(300, 400)), "recipes")
    start = starting_point(tmp_path, tmp_path, False, traffic)
    known = start.champion or start.base
    grown = expanded_initialisation(
        known, examples_of_traffic(traffic, POOLS, TextConfig(), CONFIG.traffic), usual_centres(100)
    )
    assert grown.model.config.groups == ("poems", "recipes")
    assert grown.model.config.centres == known.estimator.config.centres + 33
    learner = grown.learner(learner_config(CONFIG))
    items = learner.items([Example(asked(index), {"small": 1.0}, task="recipes") for index in range(300, 400)])
    empty = learner.distances(items)
    filled = grown.fitted_to(items, learner_config(CONFIG)).distances(items)
    assert empty is not None
    assert filled is not None
    assert np.median(filled) < np.median(empty)
    own = known.initialisation.learner(learner_config(CONFIG)).distances(items)
    np.testing.assert_allclose(empty, own, atol=1e-5)
