"""Real Prometheus and Alertmanager servers of Debian's packages, each in a directory of its own on a free port.

Where they aren't installed the tests that need them are skipped; with DEPO_NEEDS_PROMETHEUS=1, as in .ci/run, they
fail.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

RULES = sorted((Path(__file__).parents[2] / "helm/rules").glob("*.yaml"))
START_SECONDS = 60.0


def program(*names: str) -> str:
    """The path of the first of these programs that is installed; otherwise the test is skipped or, if wanted, fails."""
    for name in names:
        if found := shutil.which(name):
            return found
    reason = f"{names[0]} isn't installed (Debian's packages prometheus and prometheus-alertmanager)"
    pytest.fail(reason) if os.environ.get("DEPO_NEEDS_PROMETHEUS") == "1" else pytest.skip(reason)


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


class Server:
    """A running server; `url` is its address."""

    def __init__(self, url: str, log: Path) -> None:
        self.url, self.log = url, log

    def get(self, path: str, **parameters: str) -> Any:
        """What the server's API answers, as JSON."""
        where = f"{self.url}{path}" + (f"?{urllib.parse.urlencode(parameters)}" if parameters else "")
        try:
            with urllib.request.urlopen(where, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise ValueError(f"{where}: {error.read().decode()}") from None


class Prometheus(Server):
    """A Prometheus that scrapes."""

    def query(self, promql: str) -> list[dict[str, Any]]:
        """An instant query's samples: `{"metric": {label: value}, "value": float}` each.

        Raises:
            ValueError: the query is none.
        """
        found = self.get("/api/v1/query", query=promql)["data"]
        if found["resultType"] == "scalar":
            return [{"metric": {}, "value": float(found["result"][1])}]
        return [{"metric": one["metric"], "value": float(one["value"][1])} for one in found["result"]]

    def value(self, promql: str) -> float | None:
        """The value of a query with one sample; None if it has none."""
        samples = self.query(promql)
        assert len(samples) < 2, f"{promql}: {samples}"
        return samples[0]["value"] if samples else None

    def wait(self, promql: str, seconds: float = 30.0) -> list[dict[str, Any]]:
        """The samples of a query as soon as it has any; none if it has none in time."""
        until = time.monotonic() + seconds
        while not (samples := self.query(promql)) and time.monotonic() < until:
            time.sleep(0.25)
        return samples

    def alerts(self) -> list[dict[str, Any]]:
        """The alerts that are pending or firing."""
        return list(self.get("/api/v1/alerts")["data"]["alerts"])

    def targets(self) -> list[dict[str, Any]]:
        """The scraped targets with their health and last error."""
        return list(self.get("/api/v1/targets")["data"]["activeTargets"])


@contextlib.contextmanager
def prometheus(
    directory: Path,
    targets: Mapping[str, Sequence[str]],
    rules: Sequence[Path] = tuple(RULES),
    alertmanager: str | None = None,
    interval: str = "1s",
    labels: Mapping[str, str] | None = None,
) -> Iterator[Prometheus]:
    """Runs a Prometheus until the block ends.

    Args:
        directory: an empty one for its config, data and log.
        targets: HOST:PORT addresses (or http URLs) by the job they are scraped as.
        alertmanager: the address of one that takes the alerts.
        interval: of scrapes, and of rules whose group says nothing else.
        labels: what every target carries besides, as service discovery gives it in a cluster.
    """
    fixed = dict(labels or {"namespace": "depo"})
    config = {
        "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
        "rule_files": [str(path) for path in rules],
        "alerting": {"alertmanagers": [_static([alertmanager])] if alertmanager else []},
        "scrape_configs": [{"job_name": job, **_static(places, fixed)} for job, places in targets.items()],
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [
        program("prometheus"),
        "--config.file=prometheus.yml",
        "--storage.tsdb.path=data",
        "--storage.tsdb.retention.time=1d",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    with _run(command, directory, port) as log:
        yield Prometheus(f"http://127.0.0.1:{port}", log)


@contextlib.contextmanager
def alertmanager(directory: Path, config: Mapping[str, Any]) -> Iterator[Server]:
    """Runs an Alertmanager with a config until the block ends."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "alertmanager.yml").write_text(yaml.safe_dump(dict(config)))
    port = free_port()
    command = [
        program("prometheus-alertmanager", "alertmanager"),
        "--config.file=alertmanager.yml",
        "--storage.path=data",
        f"--web.listen-address=127.0.0.1:{port}",
        "--cluster.listen-address=",
        "--log.level=warn",
    ]
    with _run(command, directory, port) as log:
        yield Server(f"http://127.0.0.1:{port}", log)


def _static(places: Sequence[str], labels: Mapping[str, str] | None = None) -> dict[str, Any]:
    bare = [place.removeprefix("http://").rstrip("/") for place in places]
    return {"static_configs": [{"targets": bare, **({"labels": dict(labels)} if labels else {})}]}


@contextlib.contextmanager
def _run(command: list[str], directory: Path, port: int) -> Iterator[Path]:
    path = directory / "log"
    with path.open("ab") as log:
        process = subprocess.Popen(command, cwd=directory, stdout=log, stderr=log)
    try:
        until = time.monotonic() + START_SECONDS
        while not _ready(port):
            if process.poll() is not None or time.monotonic() > until:
                pytest.fail(f"{command[0]} doesn't start: {path.read_text()[-2000:]}")
            time.sleep(0.05)
        yield path
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
