"""The two images: their Dockerfiles, what docker/install leaves in a clean directory, and that it runs as in a pod."""

import asyncio
import json
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tomllib
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from depo_gateway import __version__
from depo_gateway.estimator import checkpoint
from tests import container
from tests.container import DOCKERFILES, ROOT, USER, Image
from tests.gateway.backend import FakeVllm

BYTES = 250_000_000  # the serving image's own files at most
CHECKPOINTS, RECORDS = "/var/lib/depo-gateway/checkpoints", "/var/lib/depo-gateway/records"
CONFIG = "/etc/depo-gateway"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("kind", DOCKERFILES)
def test_hadolint_has_nothing_to_say(kind: str) -> None:
    program = Path(sys.executable).parent / "hadolint"
    linted = subprocess.run([program, DOCKERFILES[kind]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (linted.returncode, linted.stdout + linted.stderr) == (0, "")


@pytest.mark.parametrize("kind", DOCKERFILES)
def test_a_dockerfile_says_what_the_rest_of_the_repository_says(kind: str) -> None:
    recipe = container.read(DOCKERFILES[kind])
    (base,) = re.findall(r"^ARG PYTHON_IMAGE=docker\.io/library/python:(\d+\.\d+)\.\d+-slim-\w+$", recipe.text, re.M)
    assert f"Programming Language :: Python :: {base}" in PROJECT["classifiers"]
    assert set(re.findall(r"^FROM (\S+)", recipe.text, re.M)) == {"${PYTHON_IMAGE}"}
    chart = yaml.safe_load((ROOT / "helm/Chart.yaml").read_text())
    assert re.findall(r"^ARG VERSION=(.+)$", recipe.text, re.M) == [__version__] == [chart["appVersion"]]
    assert re.findall(r"^USER (.+)$", recipe.text, re.M) == [f"{USER}:{USER}"]  # by number: runAsNonRoot asks for it
    (entry,) = re.findall(r"^ENTRYPOINT (.+)$", recipe.text, re.M)
    assert json.loads(entry)[0] in PROJECT["scripts"]
    assert recipe.install[1] == kind
    directory, sbom = recipe.install[2:]  # what is installed is what the last stage takes, to the same places
    taken = re.findall(r"^COPY --from=build (\S+) (\S+)$", recipe.text, re.M)
    assert set(taken) == {(directory, directory), (str(Path(sbom).parent), str(Path(sbom).parent))}


@pytest.mark.parametrize("kind", DOCKERFILES)
def test_the_context_holds_what_is_copied_and_no_more(kind: str) -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    let_in = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert let_in == set(container.read(DOCKERFILES[kind]).copied)


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


@pytest.mark.slow
def test_the_serving_image_is_small(serving_image: Image) -> None:
    total = bytes_of(serving_image.directory)
    assert 100e6 < total <= BYTES
    assert not {"torch", "transformers", "aiohttp", "huggingface-hub", "pip", "setuptools"} & set(
        installed(serving_image)
    )
    assert not list(serving_image.directory.rglob("__pycache__"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", DOCKERFILES)
def test_an_image_holds_the_pinned_versions_and_its_bill_lists_them(kind: str, request: pytest.FixtureRequest) -> None:
    image: Image = request.getfixturevalue(f"{kind}_image")
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


@pytest.mark.slow
def test_a_pod_may_write_to_its_volumes_alone(serving_image: Image, tmp_path: Path) -> None:
    """That the tests below would see a program that writes elsewhere."""
    container.needs_root()
    serving_image.volumes, serving_image.configs = {}, {}
    serving_image.volume(tmp_path / "checkpoints", CHECKPOINTS)
    elsewhere = f"/x /usr/x {serving_image.directory}/x"
    script = f"id -u; cd {CHECKPOINTS} && touch here; grep CapBnd /proc/self/status; touch {elsewhere}"
    ran = serving_image.run("sh", "-c", script)
    assert ran.stdout.split() == [str(USER), "CapBnd:", "0" * 16]
    assert ran.stderr.count("Read-only file system") == 3
    assert (tmp_path / "checkpoints" / "here").stat().st_uid == USER


@pytest.mark.slow
async def test_the_images_work_under_a_read_only_root(
    serving_image: Image, training_image: Image, tmp_path: Path
) -> None:
    """As the chart's pods: seed, serve, learn from what was served; what serves and what follows ends at SIGTERM."""
    container.needs_root()
    checkpoints, records = tmp_path / "checkpoints", tmp_path / "records"
    (tmp_path / "config").mkdir()
    for image in (serving_image, training_image):
        image.volumes, image.configs = {checkpoints: CHECKPOINTS, records: RECORDS}, {tmp_path / "config": CONFIG}
    for place, there in list(serving_image.volumes.items()):
        serving_image.volume(place, there)
    seeded = serving_image.run("depo-gateway", "seed", CHECKPOINTS, "--pools", "cheap", "dear")
    assert seeded.returncode == 0, seeded.stderr
    async with FakeVllm("org/small") as small, FakeVllm("org/large") as large:
        (tmp_path / "config/gateway.yaml").write_text(yaml.safe_dump(config(small, large), sort_keys=False))
        gateway = serving_image.start("depo-gateway", "serve", "--config", f"{CONFIG}/gateway.yaml")
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
    (tmp_path / "config/learner.yaml").write_text(yaml.safe_dump(learner | {"listen": {"port": 0}}))
    words = (f"--config={CONFIG}/learner.yaml", "--base=builtin", f"--out={CHECKPOINTS}")
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    once = await asyncio.to_thread(training_image.run, "depo-train", "refresh", *words, **offline)
    assert (once.returncode, "refused, " in once.stderr) in {(0, False), (1, True)}, once.stderr
    following = training_image.start("depo-train", "refresh", "--follow", *words, **offline)
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
    checked = serving_image.run("depo-gateway", "check", f"{CONFIG}/gateway.yaml")
    assert checked.returncode == 0, checked.stderr
