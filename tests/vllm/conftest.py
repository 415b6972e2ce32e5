"""Two real vLLM servers on the demo's two checkpoints, once a session, and their logs where a test fails."""

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from depo_gateway import gateway
from tests.vllm.servers import VllmServer

PYTHON = "DEPO_VLLM_PYTHON"
DEMO_DATA = Path(gateway.__file__).parent / "demo" / "data"
CONTEXTS = {"small": 512, "large": 2048}  # tokens
_servers: dict[str, VllmServer] = {}


@pytest.fixture(scope="session")
def _started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, VllmServer]]:
    python = Path(os.environ[PYTHON])
    logs = tmp_path_factory.mktemp("vllm")
    for name, context in CONTEXTS.items():
        _servers[name] = VllmServer(python, DEMO_DATA / name, f"demo/{name}", context, logs / f"{name}.log")
    try:
        for server in _servers.values():
            server.start()
        for server in _servers.values():
            server.ready()
        yield _servers
    finally:
        for server in _servers.values():
            server.kill()


@pytest.fixture
def servers(_started: dict[str, VllmServer]) -> dict[str, VllmServer]:
    """Both servers, up: one that an earlier test killed is started again."""
    for server in _started.values():
        if not server.alive():
            server.start()
            server.ready()
    return _started


@pytest.fixture(scope="session")
def checkpoint(request: pytest.FixtureRequest) -> Path:
    """The demo's estimator, fitted on these two models' own outcomes."""
    place = DEMO_DATA / "estimator"
    return place if place.exists() else request.getfixturevalue("tiny_checkpoint")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        report.sections += [(f"the end of {server.log}", server.tail()) for server in _servers.values()]
    return report
