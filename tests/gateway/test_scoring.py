"""Prompts -> scores with a deadline, on a real checkpoint."""

import asyncio
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, helper

from depo_gateway import __version__, gateway
from depo_gateway.estimator import checkpoint
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.estimator.text import extract_text
from depo_gateway.gateway import scoring
from depo_gateway.gateway.metrics import Metrics
from depo_gateway.gateway.scoring import Scorer
from tests.gateway.backend import FakeVllm
from tests.gateway.checkpoints import version
from tests.gateway.conftest import StartGateway
from tests.gateway.knowing import PROOFS, knowing

COLUMNS = {"small": 0, "large": 1}
LONG = "prove the hard theorem " * 400


@dataclass
class Broken:
    """An ONNX session, or weights, of a checkpoint that has gone bad."""

    gate: threading.Event | None = None  # hangs until it is set, instead of failing

    def run(self, *_: Any) -> Any:
        if self.gate is None:
            raise RuntimeError("the encoder is broken")
        self.gate.wait(10)
        raise RuntimeError("the encoder was slow and is broken")


@pytest.fixture(scope="module")
def runtime(tiny_checkpoint: Path) -> Runtime:
    return Runtime.load(tiny_checkpoint)


Make = Callable[..., Scorer]


@pytest.fixture
async def make(runtime: Runtime) -> Any:
    made: list[Scorer] = []

    def begin(
        deadline_s: float = 10.0, of: Runtime = runtime, workers: int | None = 1, columns: dict[str, int] = COLUMNS
    ) -> Scorer:
        made.append(Scorer(of, columns, deadline_s, Metrics(__version__), workers))
        return made[-1]

    yield begin
    for scorer in made:
        scorer.close()
    await asyncio.sleep(0.01)


def outcomes(scorer: Scorer) -> dict[str, float]:
    samples = [sample for family in scorer._metrics.estimator_outcomes.collect() for sample in family.samples]
    return {sample.labels["outcome"]: sample.value for sample in samples if sample.name.endswith("_total")}


def turns(text: str, context: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": context}, {"role": "user", "content": text}]


async def test_the_full_stage_scores_as_the_runtime_does(make: Make, runtime: Runtime) -> None:
    scorer = make()
    scored = await scorer.score(turns("prove the hard theorem", "what is the easy sum"))
    assert scored is not None
    expected = runtime.score([runtime.prepare("prove the hard theorem", "what is the easy sum")])[0]
    assert (scored.quality["small"], scored.quality["large"]) == pytest.approx(expected.quality, abs=1e-5)
    assert (scored.stage, scored.version) == ("full", runtime.version)


async def test_the_same_prompt_is_scored_once(make: Make) -> None:
    scorer = make()
    first = await scorer.score("easy sum")
    again = await scorer.score("easy sum")
    other = await scorer.score(turns("easy sum", "hard hard hard"))
    assert first is not None
    assert again is not None
    assert other is not None
    assert (again.quality, again.stage, other.stage) == (first.quality, "cached", "full")
    assert outcomes(scorer) == {"full": 2, "cached": 1}
    moved = await scorer.score(turns("easy sumhard", " hard hard"))
    assert moved != other  # the seam between turn and context counts


async def test_a_prompt_of_another_task_is_scored_anew(make: Make, runtime: Runtime, gate: threading.Event) -> None:
    knows = knowing(replace(runtime, session=Gated(runtime.session, gate)))  # type: ignore[arg-type]
    scorer = make(of=knows)
    asked = [("easy", ""), ("easy", PROOFS), ("easyproof", "s"), ("easy", PROOFS)]
    tasks = [asyncio.create_task(scorer.score(text, group)) for text, group in asked]
    await asyncio.sleep(0.05)  # all are under way, none is cached
    gate.set()
    unknown, proofs, _, again = await asyncio.gather(*tasks)
    assert unknown is not None
    assert proofs is not None
    assert again is not None
    assert proofs.quality == again.quality == {"small": 0.0, "large": 1.0} != unknown.quality
    assert knows.session.runs <= 3
    cached = [await scorer.score(text, group) for text, group in (*asked, ("easy", "sums"))]
    assert [item.stage for item in cached if item is not None] == [*["cached"] * 4, "full"]
    other = await scorer.score("easy", "a task that the checkpoint does not know")
    assert other == replace(unknown, stage="cached")
    # the seam between context and task counts
    turn = await scorer.score(turns("easy", "so"), "ms")
    assert turn is not None
    assert (await scorer.score(turns("easy", "som"), "s")) != replace(turn, stage="cached")


async def test_the_cache_is_bounded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "CACHE_ENTRIES", 2)
    scorer = make()
    for text in ("one", "two", "three", "three", "one"):
        await scorer.score(text)
    assert outcomes(scorer) == {"full": 4, "cached": 1}


async def test_same_prompts_that_come_together_share_one_run(make: Make, runtime: Runtime) -> None:
    gate = threading.Event()
    slow = replace(runtime, session=Gated(runtime.session, gate))  # type: ignore[arg-type]
    scorer = make(of=slow)
    tasks = [asyncio.create_task(scorer.score("easy")) for _ in range(5)]
    await asyncio.sleep(0.05)
    gate.set()
    scored = await asyncio.gather(*tasks)
    assert len({str(item.quality) for item in scored if item}) == 1
    assert slow.session.runs == 1  # type: ignore[attr-defined]
    assert outcomes(scorer) == {"full": 5}


@dataclass
class Gated:
    """A real session that waits for a gate before it runs: an encoder on a busy machine."""

    session: Any
    gate: threading.Event
    runs: int = 0

    def run(self, *arguments: Any) -> Any:
        self.runs += 1
        self.gate.wait(10)
        return self.session.run(*arguments)


@dataclass
class Slow:
    """A real session that takes its time."""

    session: Any
    seconds: float

    def run(self, *arguments: Any) -> Any:
        time.sleep(self.seconds)
        return self.session.run(*arguments)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    made = threading.Event()
    yield made
    made.set()


async def test_at_the_deadline_the_cheap_stage_answers_and_the_late_score_is_kept(
    make: Make, runtime: Runtime, gate: threading.Event
) -> None:
    scorer = make(0.05, replace(runtime, session=Gated(runtime.session, gate)))
    began = time.perf_counter()
    scored = await scorer.score("prove the hard theorem")
    assert time.perf_counter() - began < 1.0
    assert scored is not None
    cheap = runtime.cheap([runtime.prepare("prove the hard theorem")])[0]
    assert (scored.stage, tuple(scored.quality.values())) == ("cheap", pytest.approx(cheap.quality))
    assert outcomes(scorer) == {"deadline": 1}
    gate.set()
    for _ in range(200):
        late = await scorer.score("prove the hard theorem")
        if late is not None and late.stage == "cached":
            break
        await asyncio.sleep(0.01)
    assert late is not None
    assert late.stage == "cached"


async def test_a_deadline_of_zero_means_the_cheap_stage(make: Make) -> None:
    scorer = make(0.0)
    scored = await scorer.score(LONG)
    assert scored is not None
    assert scored.stage == "cheap"
    assert not scorer._running


async def test_a_queue_longer_than_the_deadline_is_not_joined(make: Make, runtime: Runtime) -> None:
    """A real encoder, more prompts at once than it can score in time."""
    scorer = make(10.0, replace(runtime, session=Slow(runtime.session, 0.05)))
    await scorer.score("warm")
    assert scorer._seconds_per_prompt > 0.04  # known after one batch, not after dozens
    gate = threading.Event()
    slow = make(0.2, replace(runtime, session=Gated(runtime.session, gate)))
    slow._seconds_per_prompt = 0.1  # three in line are more than the deadline
    waiting = [asyncio.create_task(slow.score(f"easy {index}")) for index in range(20)]
    began = time.perf_counter()
    await asyncio.sleep(0.02)
    assert sum(task.done() for task in waiting) >= 10  # at once, not at the deadline
    assert time.perf_counter() - began < 0.2
    await asyncio.gather(*waiting)
    assert outcomes(slow)["queue"] >= 10
    gate.set()


async def test_a_flood_is_answered_at_the_deadline(make: Make, runtime: Runtime) -> None:
    scorer = make(0.05, replace(runtime, session=Slow(runtime.session, 0.1)))
    await scorer.score("warm")
    began = time.perf_counter()
    scored = await asyncio.gather(*(scorer.score(f"easy {index}") for index in range(300)))
    assert time.perf_counter() - began < 2.0  # the encoder would need four
    assert sum(item.stage == "cheap" for item in scored if item) > 200
    assert all(item is not None for item in scored)


async def test_a_failing_encoder_leaves_the_cheap_stage(make: Make, runtime: Runtime) -> None:
    scorer = make(of=replace(runtime, session=Broken()))
    for _ in range(3):  # and a failure is not cached
        scored = await scorer.score("easy")
        assert scored is not None
        assert scored.stage == "cheap"
    assert outcomes(scorer) == {"error": 3}


async def test_nothing_is_left_when_both_stages_fail(make: Make, runtime: Runtime) -> None:
    scorer = make(of=replace(runtime, session=Broken(), wide=Broken()))
    assert await scorer.score("easy") is None
    assert outcomes(scorer) == {"error": 1}


class NotFinite:
    """An ONNX session whose logits are not finite for prompts with more tokens than `length`."""

    def __init__(self, session: Any, value: float, length: int) -> None:
        self._session, self._value, self._length = session, value, length

    def run(self, names: Any, inputs: Any) -> Any:
        (logits,) = self._session.run(names, inputs)
        logits[inputs["attention_mask"].sum(1) > self._length] = self._value
        return [logits]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
async def test_scores_that_are_not_finite_leave_the_cheap_stage_to_their_prompt_alone(
    make: Make, runtime: Runtime, value: float
) -> None:
    scorer = make(of=replace(runtime, session=NotFinite(runtime.session, value, 8)))
    long, short = "prove the hard theorem " * 4, "what is the easy sum"
    bad, good = await asyncio.gather(scorer.score(turns(long, "")), scorer.score(turns(short, "")))
    assert bad is not None
    assert good is not None
    assert (bad.stage, good.stage) == ("cheap", "full")
    again = await scorer.score(turns(long, ""))
    assert again is not None
    assert again.stage == "cheap"  # it was not cached
    assert outcomes(scorer) == {"error": 2, "full": 1}


async def test_neither_stage_is_believed_if_its_scores_are_not_finite(make: Make, runtime: Runtime) -> None:
    assert runtime.wide is not None
    bias = runtime.wide.bias * float("nan")
    scorer = make(of=replace(runtime, wide=replace(runtime.wide, bias=bias)))
    assert await scorer.score("prove the hard theorem") is None
    assert outcomes(scorer) == {"error": 1}


async def test_a_tokenizer_that_fails_leaves_nothing_too(make: Make, runtime: Runtime) -> None:
    scorer = make(of=replace(runtime, tokenizer=Broken()))
    assert await scorer.score("easy") is None
    assert outcomes(scorer) == {"error": 1}


async def test_a_checkpoint_without_a_wide_part_answers_in_time_or_not_at_all(
    make: Make, tiny_policy_checkpoint: Path, gate: threading.Event
) -> None:
    policy = Runtime.load(tiny_policy_checkpoint)
    gated = replace(policy, session=Gated(policy.session, gate))  # type: ignore[arg-type]
    scorer = make(0.05, gated, columns={"small": 0})
    chat = [{"role": "system", "content": "be hard"}, {"role": "user", "content": "sum"}]
    assert await scorer.score(chat) is None
    scorer._seconds_per_prompt = 1.0
    assert await scorer.score("sum") is None
    assert outcomes(scorer) == {"deadline": 1, "queue": 1}
    broken = make(of=replace(policy, session=Broken()), columns={"small": 0})
    assert await broken.score("sum") is None
    assert outcomes(broken) == {"error": 1}
    gate.set()
    for _ in range(200):  # the late score is kept
        late = await scorer.score(chat)
        if late is not None and late.stage == "cached":
            break
        await asyncio.sleep(0.01)
    assert late is not None
    expected = policy.score([policy.prepare(*extract_text(policy.manifest.text, chat))])[0]
    assert (late.stage, late.quality) == ("cached", {"small": pytest.approx(expected.quality[0], abs=1e-5)})


async def test_a_conversation_is_scored_as_the_policys_chat_template_writes_it(
    make: Make, tiny_policy_checkpoint: Path
) -> None:
    scorer = make(of=Runtime.load(tiny_policy_checkpoint), columns={"small": 0})
    user = {"role": "user", "content": "what is the sum"}

    async def quality(asked: Any) -> tuple[float, str]:
        scored = await scorer.score(asked)
        assert scored is not None
        return scored.quality["small"], scored.stage

    easy, hard = ([{"role": "system", "content": f"be {word}"}, user] for word in ("easy", "hard"))
    assert (await quality(easy))[0] > 0.6 > 0.4 > (await quality(hard))[0]
    written = "<s>system be hard</s>user what is the sum</s>assistant "
    assert await quality(written) == ((await quality(hard))[0], "cached")  # a completion's prompt is taken as it is
    bare = await quality([*hard, {"role": "tool", "content": "5"}])  # which the template refuses
    assert bare == ((await quality("be hard\nwhat is the sum\n5"))[0], "full")


async def test_long_prompts_are_cut_and_counted(make: Make) -> None:
    scorer = make()
    await scorer.score(LONG)
    await scorer.score("easy")
    assert scorer._metrics.estimator_truncated._value.get() == 1


@pytest.mark.parametrize(
    ("files", "granted"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "6400000 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu.max": "what is this"}, 8),
    ],
)
def test_a_containers_limit_bounds_the_cores(tmp_path: Path, files: dict[str, str], granted: int) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert scoring.cores_granted(8, tmp_path) == granted


async def test_workers_of_a_limited_container_are_as_many_as_it_allows_and_free(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("one core can't be limited further")
    (tmp_path / "cpu.max").write_text(f"{100000 * (len(cores) - 1)} 100000")
    monkeypatch.setattr(scoring, "CGROUP", tmp_path)
    scorer = make(workers=None)
    await scorer.score("easy")
    assert len(scorer._threads) == max(1, len(cores) - 2)
    assert all(os.sched_getaffinity(thread.native_id or 0) == cores for thread in scorer._threads)


async def test_each_worker_stays_on_a_core_of_its_own(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "CGROUP", tmp_path)  # as where nothing limits the cores
    cores = os.sched_getaffinity(0)
    scorer = make(workers=min(2, len(cores)))
    await scorer.score("easy")
    await asyncio.sleep(0.05)
    pinned = [os.sched_getaffinity(thread.native_id or 0) for thread in scorer._threads]
    assert all(len(core) == 1 for core in pinned)
    assert len(set.union(*pinned)) == len(pinned)
    assert os.sched_getaffinity(0) == cores  # the loop's thread is free


async def test_a_closed_scorers_threads_end(make: Make) -> None:
    scorer = make(workers=2)
    scorer.close()
    for thread in scorer._threads:
        await asyncio.to_thread(thread.join, 5)
        assert not thread.is_alive()


# Loading.


def test_a_checkpoint_scores_pools_by_name(tiny_checkpoint: Path) -> None:
    assert scoring.load_runtime(str(tiny_checkpoint), ("small", "large"), "gain")[1] == {"small": 0, "large": 1}


def test_a_checkpoint_of_other_pools_is_refused(tiny_checkpoint: Path) -> None:
    for pools in (("tiny", "large"), ("small", "large", "huge")):
        with pytest.raises(ValueError, match="scores the pools small, large, the config has") as caught:
            scoring.load_runtime(str(tiny_checkpoint), pools, "gain")
        assert ", ".join(pools) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_policys_checkpoint_routes_by_difficulty_only(tiny_policy_checkpoint: Path) -> None:
    runtime, columns = scoring.load_runtime(str(tiny_policy_checkpoint), ("small", "large"), "difficulty")
    assert columns == {"small": 0}
    assert not runtime.has_cheap
    with pytest.raises(ValueError, match=r"scores one pool \(policy\) and can't route by gain; set routing.rule"):
        scoring.load_runtime(str(tiny_policy_checkpoint), ("small", "large"), "gain")


def test_damage_is_one_sentence(tiny_checkpoint: Path, tmp_path: Path) -> None:
    place = tmp_path / "bad"
    shutil.copytree(tiny_checkpoint, place)
    (place / checkpoint.ENCODER).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"model\.onnx does not match"):
        scoring.load_runtime(str(place), ("small", "large"), "gain")


# Swapping.


def test_an_encoder_that_loads_and_cannot_run_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    files = {name: (tiny_checkpoint / name).read_bytes() for name in checkpoint.FILES}
    manifest = checkpoint.load_manifest(tiny_checkpoint)
    ids, mask = (
        helper.make_tensor_value_info(name, TensorProto.INT64, ["b", "t"]) for name in ("input_ids", "attention_mask")
    )
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [7, 4])
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [7, 4])
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["numbers", "shape"], ["out"]),
    ]
    graph = helper.make_graph(nodes, "broken", [ids, mask], [out], [shape])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    files[checkpoint.ENCODER] = model.SerializeToString()
    checkpoint.write_checkpoint(tmp_path / "broken", files, manifest.base, manifest.pools, manifest.text, {})
    with pytest.raises(ValueError, match=r"broken can't be used: .*reshape"):
        scoring.load_runtime(str(tmp_path / "broken"), ("small", "large"), "gain")


async def test_a_new_checkpoint_is_taken_while_requests_run_and_a_bad_one_is_not(
    start: StartGateway, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from depo_gateway.gateway import checkpoint_watcher

    monkeypatch.setattr(checkpoint_watcher, "WATCH_SECONDS", 0.05)
    home = tmp_path / "checkpoints"
    first = version(tiny_checkpoint, home / "1", 9.0)  # the small pool can do everything
    checkpoint.publish(home / "1")
    sections = {"estimator": {"path": str(home), "deadline_ms": 5000}}
    async with FakeVllm() as small, FakeVllm() as large, start([small], [large], **sections) as gateway:
        seen: list[tuple[int, str, str]] = []
        stop = asyncio.Event()

        async def traffic(number: int) -> None:
            while not stop.is_set():
                answer = await gateway.chat(f"hard {number} {len(seen)}", stream=bool(number % 2))
                await answer.read()
                seen.append((answer.status, answer.headers["x-depo-estimator"], answer.headers["x-depo-pool"]))

        async def until(estimator: str) -> None:
            async with asyncio.timeout(15):
                while not seen or seen[-1][1] != estimator:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)

        tasks = [asyncio.create_task(traffic(number)) for number in range(4)]
        await until(first)
        second = version(tiny_checkpoint, home / "2", -9.0)  # and now nothing
        checkpoint.publish(home / "2")
        await until(second)
        shutil.copytree(home / "2", home / "3")
        manifest = (home / "3" / checkpoint.MANIFEST).read_text().replace(second, "the-third")
        (home / "3" / checkpoint.MANIFEST).write_text(manifest)
        (home / "3" / checkpoint.WEIGHTS).write_bytes(b"damaged")
        checkpoint.publish(home / "3")
        assert await gateway.settles("gateway_estimator_loads_total", 1, 15, result="refused")
        await asyncio.sleep(0.3)
        stop.set()
        await asyncio.gather(*tasks)
        assert {status for status, _, _ in seen} == {200}
        assert {(estimator, pool) for _, estimator, pool in seen} == {(first, "small"), (second, "large")}
        assert seen[-1][1] == second
        assert await gateway.metric("gateway_estimator_loads_total", result="applied") == 1
        assert await gateway.metric("gateway_estimator_loads_total", result="refused") == 1  # told once
        assert await gateway.metric("gateway_estimator_info", version=second) == 1
        assert await gateway.metric("gateway_estimator_info") == 1


# Without scores.


async def test_on_overload_decides_when_no_stage_answers(start: StartGateway, tiny_checkpoint: Path) -> None:
    from depo_gateway.gateway import checkpoint_watcher

    for setting, expected in (("large", {"large"}), ("share", {"small", "large"})):
        loaded = Runtime.load(tiny_checkpoint)
        broken = replace(loaded, session=Broken(), wide=Broken())
        original = checkpoint_watcher.open_scorer

        async def scorer(_: Any, metrics: Metrics, of: Runtime = broken) -> Scorer:
            return Scorer(of, COLUMNS, 1.0, metrics, 1)

        checkpoint_watcher.open_scorer = scorer
        try:
            async with (
                FakeVllm() as small,
                FakeVllm() as large,
                start([small], [large], routing={"on_overload": setting}) as gateway,
            ):
                answers = [await gateway.chat(f"easy {index}") for index in range(24)]
        finally:
            checkpoint_watcher.open_scorer = original
        assert {answer.status for answer in answers} == {200}
        assert {answer.headers["x-depo-reason"] for answer in answers} == {"overload"}
        assert {answer.headers["x-depo-pool"] for answer in answers} == expected
        assert all("x-depo-confidence" not in answer.headers for answer in answers)


def test_random_routing_on_overload_starts_at_the_calibrations_share() -> None:
    runtime = Runtime.load(Path(gateway.__file__).parent / "demo" / "data" / "estimator")
    low = scoring.usual_shares(runtime, ("a", "b"), "gain", 0.3)
    high = scoring.usual_shares(runtime, ("a", "b"), "gain", 0.95)
    assert 0 < low["b"] < high["b"] < 1
    assert low["a"] + low["b"] == pytest.approx(1)
    assert scoring.usual_shares(runtime, ("a", "b", "c"), "gain", 0.5) == {}


def test_random_routing_by_a_policy_starts_at_its_unsure_share(tiny_policy_checkpoint: Path) -> None:
    runtime = Runtime.load(tiny_policy_checkpoint)
    assert scoring.usual_shares(runtime, ("a", "b"), "difficulty", 0.5) == pytest.approx({"a": 0.5, "b": 0.5}, abs=0.1)
    assert scoring.usual_shares(runtime, ("a", "b"), "difficulty", 0.0) == {"a": 1.0, "b": 0.0}
    assert scoring.usual_shares(runtime, ("a", "b", "c"), "difficulty", 1.0) == {"a": 0.0, "b": 0.0, "c": 1.0}
    assert scoring.usual_shares(runtime, ("a",), "difficulty", 0.5) == {}
    assert scoring.usual_shares(runtime, ("a", "b"), "gain", 0.5) == {}
