"""Files that version 0.1 wrote still work: checkpoints, records, settings, outcome tables, runs, the learner's state.

tests/fixtures/version_0_1/README.md says what made each file. Expected numbers are those of version 0.1.
"""

import asyncio
import contextlib
import dataclasses
import gzip
import json
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import yaml

from depo_gateway.estimator import checkpoint, standing, text
from depo_gateway.estimator.configuration.shared import database_url
from depo_gateway.estimator.records.store import Store
from depo_gateway.estimator.records.types import Labelled
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.gateway import config, server
from depo_gateway.gateway.__main__ import main as gateway_main
from depo_gateway.training.__main__ import main as training_main
from depo_gateway.training.online import settings as learner_settings
from depo_gateway.training.online.daemon_state import read_state
from depo_gateway.training.online.reference_set import reference_rows
from depo_gateway.training.outcomes.traffic_config import TrafficConfig
from depo_gateway.training.outcomes.traffic_examples import examples_of_traffic

FIXTURES = Path(__file__).parent / "fixtures/version_0_1"
FIRST, REFRESHED = "20261130-045607-74527695", "20261130-045641-c5d0f457"  # versions of the two checkpoints
POOLS = ("small", "large")
KEY = {"authorization": "Bearer key-a"}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files, unpacked, as the working directory; and the environment that the settings name."""
    for path in sorted(FIXTURES.rglob("*")):
        copy = tmp_path / path.relative_to(FIXTURES)
        if path.is_dir():
            copy.mkdir()
        elif path.suffix == ".gz":
            copy.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        else:
            copy.write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    for name in ("DEPO_HASH_KEY", "SMALL_KEY", "JUDGE_KEY"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("DEPO_RECORDS", "sqlite:///records.db")
    for library in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{library}.HF_HUB_OFFLINE", True)
    return tmp_path


@contextlib.contextmanager
def opened() -> Iterator[Store]:
    """The records database."""
    store = Store("sqlite:///records.db")
    store.create()
    try:
        yield store
    finally:
        store.close()


def logged() -> list[Labelled]:
    """All records, with their labels."""
    with opened() as store:
        return store.logged(1000)


# --- checkpoints ---


def test_checkpoints_are_found_and_their_manifests_read() -> None:
    first = checkpoint.load_manifest(Path("checkpoints/first"))
    current = checkpoint.load_manifest(checkpoint.resolve("checkpoints"))
    assert (first.version, first.parent, first.pools) == (FIRST, None, POOLS)
    assert (current.version, current.parent, current.pools) == (REFRESHED, FIRST, POOLS)
    assert first.metrics["models"] == {"small": ["org/small"], "large": ["org/large"]}
    assert (current.metrics["labels"], current.metrics["trained_to"]) == (92, 189)
    base = first.base
    assert (base.encoder, base.wide, base.trunk, first.text.max_tokens) == ("encoder", True, False, 64)
    policy = checkpoint.load_manifest(checkpoint.resolve("run/estimator"))
    assert (policy.pools, policy.base.wide, policy.text.max_tokens) == (("policy",), False, 48)


def test_a_checkpoint_gives_the_scores_that_version_0_1_recorded() -> None:
    runtime = Runtime.load(checkpoint.resolve("checkpoints/first"))
    records = [item.record for item in logged() if item.record.stage == "full" and item.record.asked is not None]
    assert len(records) == 100
    for record in records:
        assert record.asked is not None
        assert record.estimator in (FIRST, "")
        scores = runtime.score([runtime.prepare(*text.extract_text(runtime.manifest.text, record.asked))])[0]
        assert dict(zip(POOLS, scores.quality, strict=True)) == pytest.approx(dict(record.quality), abs=1e-4)
    cheap = runtime.cheap([runtime.prepare("hard prove theorem")])[0]
    assert cheap.quality == pytest.approx((0.15707, 0.93664), abs=1e-4)


def test_an_estimator_of_rl_scores_its_policy() -> None:
    runtime = Runtime.load(checkpoint.resolve("run/estimator"))
    asked = [{"role": "user", "content": "m: what 002+10="}]
    scores = runtime.score([runtime.prepare(*text.extract_text(runtime.manifest.text, asked))])[0]
    assert not runtime.has_cheap
    assert scores.quality == pytest.approx((0.03803,), abs=1e-4)


def test_evaluate_reports_what_it_reported() -> None:
    words = ["--checkpoint", "checkpoints/first", "--outcomes", "outcomes.jsonl", "--out", "report"]
    assert training_main(["evaluate", *words, "--include-fitted"]) == 0
    report = json.loads(Path("report/report.json").read_text())
    assert (report["checkpoint"], report["fitted_share"], report["all"]["prompts"]) == (FIRST, 1.0, 160)
    assert report["all"]["apgr"]["gain (full)"]["apgr"] == pytest.approx(0.7772, abs=2e-3)
    assert report["all"]["apgr"]["gain (full)"]["difference"] == pytest.approx(0.2918, abs=2e-3)


def test_calibrate_makes_a_new_version_of_it() -> None:
    words = ["--checkpoint", "checkpoints/first", "--outcomes", "outcomes.jsonl", "--target", "large-share=0.3"]
    assert training_main(["calibrate", *words, "--include-fitted", "--out", "calibrated"]) == 0
    runtime = Runtime.load(Path("calibrated"))
    assert runtime.manifest.parent == FIRST
    assert runtime.calibration.targets["large-share=0.3"] == pytest.approx(
        {"gain": 0.2814, "difficulty": 0.2018}, abs=1e-3
    )


# --- the gateway ---


def holds(tree: Any, raw: Any) -> None:
    """Asserts that a tree of settings has every value that a YAML file gives."""
    if isinstance(raw, Mapping):
        for name, value in raw.items():
            holds(tree[name] if isinstance(tree, Mapping) else getattr(tree, name), value)
    elif isinstance(raw, list):
        assert len(tree) == len(raw)
        for one, value in zip(tree, raw, strict=True):
            holds(one, value)
    else:
        assert tree == raw


def test_every_setting_of_gateway_yaml_is_taken(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = yaml.safe_load(Path("gateway.yaml").read_text())
    settings = config.load_config(Path("gateway.yaml"))
    assert settings.auth is not None
    assert [key.name for key in settings.auth.keys] == ["team-c", "team-a", "team-b"]
    assert settings.records is not None
    assert Path(str(settings.records.url).removeprefix("sqlite:///")).samefile("records.db")
    assert Path(settings.estimator.path).samefile("checkpoints/first")
    del raw["auth"], raw["records"]["url"], raw["estimator"]["path"], raw["estimator"]["candidate"]
    holds(settings, raw)
    assert gateway_main(["check", "gateway.yaml"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["pools"]["small"]["backends"][0]["api_key_env"] == "SMALL_KEY"
    assert shown["auth"]["keys"][0] == {
        "name": "team-c", "sha256": "49043acf…", "requests_per_minute": 1000.0, "large_share": 0.25
    }  # fmt: skip


def test_a_target_and_a_policys_estimator_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert gateway_main(["check", "target.yaml"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["routing"]["target"]["large_share"] == 0.3
    assert (shown["routing"]["rule"], shown["auth"], shown["records"]["prompts"]) == ("difficulty", "none", "hash")


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[str]:
    """The address of a gateway that runs in this process with gateway.yaml, on free ports."""
    settings = config.load_config(Path("gateway.yaml"))
    settings = dataclasses.replace(
        settings,
        listen=dataclasses.replace(settings.listen, port=0),
        admin=dataclasses.replace(settings.admin, port=0),
    )
    addresses: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    task = asyncio.create_task(server.serve(settings, None, lambda url, _: addresses.set_result(url), stop))
    await asyncio.wait((task, addresses), return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    try:
        yield await addresses
    finally:
        stop.set()
        await task


async def test_the_gateway_decides_as_version_0_1_did_and_goes_on_with_its_database() -> None:
    decided = [item.record for item in logged() if item.record.reason in ("confident", "unsure") and item.record.asked]
    assert Counter(record.reason for record in decided) == {"confident": 26, "unsure": 22}
    async with serving() as url, aiohttp.ClientSession(headers=KEY) as session:
        for record in decided:
            name = "prompt" if isinstance(record.asked, str) else "messages"
            async with session.post(f"{url}/v1/route", json={"model": "auto", name: record.asked}) as answer:
                assert answer.status == 200, await answer.text()
                told = await answer.json()
            assert (told["pool"], told["reason"], told["estimator"]) == (record.pool, record.reason, FIRST)
            assert told["confidence"] == pytest.approx(record.confidence, abs=1e-4)
            assert told["threshold"] == record.threshold == 0.8
        feedback = {"request_id": "exact-2", "score": 0.25, "comment": "from a later version"}
        async with session.post(f"{url}/v1/feedback", json=feedback) as answer:
            assert answer.status == 200, await answer.text()
    after = {item.record.id: item for item in logged()}
    assert len(after) == 104
    assert [(label.source, label.quality) for label in after["exact-2"].labels][-1] == ("feedback", 0.25)


# --- records ---


def test_records_and_labels_of_every_kind_are_read() -> None:
    items = logged()
    assert Counter(item.record.reason for item in items) == {
        "explore": 46, "confident": 27, "unsure": 22, "pinned": 2, "sticky": 1, "context": 1, "accepts": 1,
        "budget": 1, "fallback": 1, "overload": 1, "": 1,
    }  # fmt: skip
    assert Counter(item.record.status for item in items) == {200: 102, 429: 1, 503: 1}
    assert Counter(label.source for item in items for label in item.labels) == {
        "exact": 44, "math": 44, "model": 44, "webhook": 44, "none": 8, "feedback": 5
    }  # fmt: skip
    by_id = {item.record.id: item for item in items}
    sticky = by_id["sticky"].record
    assert (sticky.key, sticky.pool, sticky.pools, sticky.propensity) == ("team-a", "large", POOLS, 1.0)
    assert sticky.conversation == by_id["first"].record.conversation
    assert sticky.asked == [
        {"role": "user", "content": "hard prove why two and three"},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": "thanks again"},
    ]
    assert sticky.confidence == pytest.approx(0.7313826680183411)
    assert (by_id["pinned"].record.parameters, by_id["pinned"].record.answer) == ({"temperature": 0, "seed": 3}, "5")
    hashed = by_id["hashed"].record
    assert (hashed.asked, hashed.answer, hashed.prompt_hash[:8]) == (None, None, "dc243bba")
    assert {(x.source, x.pool): x.quality for x in by_id["none-0"].labels}["none", "small"] is None
    with opened() as store:
        assert (store.count_records(), store.count_labels()) == ((104, 103), (92, 189))
        assert [record.id for record in store.unshadowed(1000)] == [
            "pinned", "first", "sticky", "context", "accepts", "budget-0", "text", "fallback", "overload"
        ]  # fmt: skip


def test_records_become_the_examples_that_they_became() -> None:
    text_config = checkpoint.load_manifest(Path("checkpoints/first")).text
    with opened() as store:
        traffic = examples_of_traffic(store.labelled(1000), POOLS, text_config, TrafficConfig())
    assert (len(traffic.examples), traffic.trained_to, len(traffic.claims)) == (92, 189, 92)
    assert sum(example.weight for example in traffic.examples) == pytest.approx(91.6667, abs=1e-4)
    first, last = traffic.examples[0], traffic.examples[-1]
    assert (first.prompt, first.quality) == ("easy please number question three sum how", {"small": 0.0, "large": 1.0})
    assert first.token_confidence == pytest.approx({"small": 0.36788, "large": 0.90484}, abs=1e-4)
    assert (last.prompt, last.context) == ("thanks again", "hard prove why two and three\n7")
    assert last.quality == {"large": 0.0}


def test_evaluate_reads_the_records() -> None:
    words = ["--checkpoint", "checkpoints", "--records", "sqlite:///records.db", "--out", "report"]
    assert training_main(["evaluate", *words, "--include-fitted"]) == 0
    report = json.loads(Path("report/report.json").read_text())
    assert (report["checkpoint"], report["logs"]["read"]) == (REFRESHED, 104)
    assert (report["logs"]["complete"], report["logs"]["weighted"]) == (88, 90)
    estimates = {method: rows[0]["quality"]["value"] for method, rows in report["logs"]["rules"]["gain"].items()}
    assert estimates == pytest.approx({"doubly_robust": 0.5297, "snips": 0.5312, "direct": 0.5170}, abs=2e-3)


# --- the learner ---


@pytest.mark.parametrize("name", ["learner.yaml", "judge_model.yaml"])
def test_every_setting_of_learner_yaml_is_taken(name: str) -> None:
    raw = yaml.safe_load(Path(name).read_text())
    settings = learner_settings.load_settings(Path(name))
    assert Path(database_url(settings.records).removeprefix("sqlite:///")).samefile("records.db")
    if name == "learner.yaml":
        assert settings.reference is not None
        assert Path(settings.reference).samefile("outcomes.jsonl")
        assert len(reference_rows(settings, Path("checkpoints"), Path("checkpoints"))) == 160
        del raw["reference"]
    del raw["records"]
    holds(settings, raw)


def test_the_learners_state_is_read() -> None:
    state = read_state(Path("checkpoints"))
    assert (state.seq, state.time) == (189, 1796014601.7874713)
    stands = standing.read_standing(Path("checkpoints"))
    assert stands is not None
    assert (stands.version, stands.labels, stands.beats_random) == (REFRESHED, 56, True)
    assert stands.advantage == pytest.approx(0.0723453443877551)


def test_a_refresh_publishes_from_the_records() -> None:
    words = ["--base", "checkpoints/first", "--out", "again", "--config", "judge_model.yaml"]
    assert training_main(["refresh", *words]) == 0
    runtime = Runtime.load(checkpoint.resolve("again"))
    metrics = runtime.manifest.metrics
    assert (runtime.manifest.parent, metrics["labels"], metrics["trained_to"]) == (FIRST, 92, 189)
    assert metrics["verdict"]["newest"]["apgr"] == pytest.approx(0.812, abs=0.02)
    prompts = ["hard prove theorem", "easy prove theorem"]
    quality = np.array([scores.quality for scores in runtime.score([runtime.prepare(prompt) for prompt in prompts])])
    assert quality[0, 0] - quality[0, 1] > quality[1, 0] - quality[1, 1] + 0.3  # the small pool's are the hard ones


def test_a_refresh_goes_on_in_the_directory_of_version_0_1() -> None:
    before = Path("checkpoints/refusals.jsonl").read_text()
    words = ["--base", "checkpoints/first", "--out", "checkpoints", "--config", "learner.yaml"]
    assert training_main(["refresh", *words]) == 1
    after = Path("checkpoints/refusals.jsonl").read_text()
    assert after.startswith(before)
    line = json.loads(after.removeprefix(before))
    assert (line["champion"], line["labels"], len(line["reasons"])) == (REFRESHED, 92, 2)
    assert line["figures"]["reference"]["prompts"] == 160
    assert checkpoint.load_manifest(checkpoint.resolve("checkpoints")).version == REFRESHED
    stands = standing.read_standing(Path("checkpoints"))
    assert stands is not None
    assert stands.version == REFRESHED


# --- outcome tables ---


@contextlib.contextmanager
def model_server(model: str) -> Iterator[str]:
    """The address of an OpenAI server on loopback whose answer is always 7."""

    class Handler(BaseHTTPRequestHandler):
        def send(self, payload: object) -> None:
            content = json.dumps(payload).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self.send({"object": "list", "data": [{"id": model}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            logprobs = {"content": [{"token": "7", "logprob": -0.5}]}
            choices = [{"index": n, "message": {"content": "7"}, "logprobs": logprobs} for n in range(body.get("n", 1))]
            self.send({"object": "chat.completion", "choices": choices})

        def log_message(self, *_: object) -> None: ...

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}"
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()


def test_collect_goes_on_with_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    table, settings = Path("outcomes.jsonl"), Path("outcomes.jsonl.settings.json")
    whole, before = table.read_text().splitlines(), settings.read_text()
    table.write_text("".join(f"{line}\n" for line in whole[:150]) + whole[150][:-20])  # as a crash leaves it
    with model_server("org/small") as small, model_server("org/large") as large:
        words = ["collect", "--prompts", "prompts.jsonl", "--backends", f"small={small}", f"large={large}"]
        words += ["--out", "outcomes.jsonl", "--max-tokens", "8"]
        assert training_main([*words, "--k", "8"]) == 2
        assert "was collected with k 4, not 8" in capsys.readouterr().err
        assert training_main([*words, "--k", "4"]) == 0
    lines = table.read_text().splitlines()
    assert (lines[:150], settings.read_text()) == (whole[:150], before)
    added, lost = ([json.loads(line) for line in some[150:]] for some in (lines, whole))
    assert sorted(str(row.get("question")) for row in added) == sorted(str(row.get("question")) for row in lost)
    assert all(row["correct"] == {"org/small": 1.0, "org/large": 1.0} for row in added)


# --- reinforcement learning ---


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_run_is_resumed_and_chooses_what_version_0_1_would_have_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
    before = json.loads(Path("run/checkpoint-2/trainer_state.json").read_text())["log_history"]
    assert training_main(["rl", "--config", "run.yaml", "--resume"]) == 0
    after = json.loads(Path("run/checkpoint-4/trainer_state.json").read_text())["log_history"]
    assert after[:2] == before
    third, fourth = after[2:4]
    assert [row["depo/completions"] for row in after[:4]] == [8, 16, 24, 32]
    assert [row["depo/pass_rate"] for row in after[:4]] == [0.0, 0.125, 0.0, 0.5]
    assert third["depo/loss_advantage"] == pytest.approx(0.53158, abs=1e-3)
    assert fourth["depo/loss_advantage"] == pytest.approx(1.03160, abs=1e-3)
    selector = json.loads(Path("run/checkpoint-4/depo/selector.json").read_text())["selector"]
    assert (selector["steps"], selector["stream"], selector["rejected"]) == (4, [0, 26], 15)
    assert [row for row, *_ in selector["replay"]] == [10, 37, 44, 22, 19, 43, 45, 13]
    policy = checkpoint.load_manifest(checkpoint.resolve("run/estimator"))
    assert (policy.metrics["trained_by"], policy.metrics["steps"]) == ("depo-train rl", 4)
