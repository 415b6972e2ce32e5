"""What the chart starts is what vLLM takes: arguments, environment, a read-only root, an unknown user, and its end."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helm.chart import Pod, Values, named, of_kind, pod_of, rendered
from tests.vllm.conftest import DEMO_DATA, PYTHON
from tests.vllm.servers import READY_SECONDS, free_port

pytestmark = pytest.mark.vllm
KEY = "sk-of-the-backend"
MODEL = "demo/large"
CHART = Values(
    {
        "backends": {"large": {"model": str(DEMO_DATA / "large"), "apiKey": {"existingSecret": "backend-key"}}},
        "config": {"pools": {"large": {"model": MODEL}}},
        "huggingFace": {"existingSecret": "hf"},
    },
    presets=("cpu",),
)
SECRETS = {"backend-key": KEY, "hf": "hf_none"}
HERE = {  # of this machine alone: its wheel doesn't say that it is for CPUs, and no hub is in reach
    "VLLM_TARGET_DEVICE": "cpu",
    "HF_HUB_OFFLINE": "1",
}
# A root that nothing may write to but the directories named, and a user whom /etc/passwd doesn't know, as in the pod.
JAIL = """
while [ "$1" != -- ]; do mount --bind "$1" "$1"; shift; done; shift
mount -o remount,ro,bind /
exec unshare --user --map-user=10001 --map-group=10001 "$@"
"""
PARSE = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser

for words in json.load(sys.stdin):
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    validate_parsed_serve_args(args)
    assert args.tool_call_parser is None or args.tool_call_parser in ToolParserManager.list_registered(), words
    print(json.dumps([args.model_tag, args.shutdown_timeout, args.scheduling_policy]))
"""


def in_jail(writable: list[Path], *command: str) -> list[str]:
    alone = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *alone, "--mount", "sh", "-ec", JAIL, "sh", *map(str, writable), "--", *command]


@dataclass
class Served:
    """The pod's container as a process; paths of its mounts are directories of `work`."""

    pod: Pod
    work: Path
    port: int
    process: subprocess.Popen[bytes]

    def connection(self, seconds: float = 60) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)

    def status(self, path: str, key: str | None = None, body: dict[str, Any] | None = None) -> int:
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        with contextlib.closing(self.connection()) as connection:
            connection.request("POST" if body else "GET", path, json.dumps(body) if body else None, headers)
            return connection.getresponse().status

    def stream(self, tokens: int, events: list[bytes], begun: threading.Event) -> None:
        """Asks for a long answer and puts down its events as they come."""
        body = {"model": MODEL, "prompt": "1+1=", "max_tokens": tokens, "ignore_eos": True, "stream": True}
        cut_off = (OSError, http.client.HTTPException)
        with contextlib.suppress(*cut_off), contextlib.closing(self.connection()) as connection:
            headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            answer = connection.getresponse()
            while line := answer.readline():
                events.append(line.strip())
                begun.set()


def _environment(pod: Pod, work: Path) -> dict[str, str]:
    values = {}
    for item in pod.main["env"]:
        value = item["value"] if "value" in item else SECRETS[item["valueFrom"]["secretKeyRef"]["name"]]
        for mount in pod.main["volumeMounts"]:
            if value == mount["mountPath"] or value.startswith(mount["mountPath"] + "/"):
                value = f"{work}/{mount['name']}{value.removeprefix(mount['mountPath'])}"
                break
        values[item["name"]] = value
    path = f"{Path(os.environ[PYTHON]).parent}:/usr/local/bin:/usr/bin:/bin"
    return {"PATH": path, "TMPDIR": f"{work}/tmp", **HERE, **values}  # TMPDIR: /tmp is the jail's, read-only


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """`vllm serve` as the chart's CPU preset starts it, once /health answers."""
    pod = pod_of(rendered(CHART), "backend", "large")
    with tempfile.TemporaryDirectory() as name:  # short: sockets are made in it
        work = Path(name)
        for mount in pod.main["volumeMounts"]:
            (work / mount["name"]).mkdir()
        probe = subprocess.run(in_jail([work], "touch", str(work / "written")), capture_output=True, text=True)
        if probe.returncode:
            pytest.skip(f"no mount namespaces here: {probe.stderr.strip()}")
        port = free_port()
        command = [*pod.main["command"], *pod.main["args"], "--host=127.0.0.1", f"--port={port}"]  # the last one counts
        with (work / "log").open("wb") as file:
            process = subprocess.Popen(
                in_jail([work], *command),
                cwd=work,
                env=_environment(pod, work),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        one = Served(pod, work, port, process)
        try:
            _wait_for(one, pod.main["startupProbe"]["httpGet"]["path"])
            yield one
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


def _wait_for(served: Served, path: str) -> None:
    until = time.monotonic() + READY_SECONDS
    while True:
        log = (served.work / "log").read_text(errors="replace")[-8000:]
        assert served.process.poll() is None, f"vLLM ended with {served.process.returncode}\n{log}"
        assert time.monotonic() < until, f"not ready within {READY_SECONDS:g} s\n{log}"
        with contextlib.suppress(OSError):
            if served.status(path) == 200:
                return
        time.sleep(0.5)


def test_vllm_takes_every_presets_arguments() -> None:
    asked = []
    for values in (Values(), Values(presets=("cpu",)), Values(presets=("production",))):
        pods = [pod_of(rendered(values), "backend", pool) for pool in ("small", "large")]
        assert all(pod.main["command"] == ["vllm", "serve"] for pod in pods)
        asked += [(pod.main["args"], pod) for pod in pods]
    done = subprocess.run(
        [os.environ[PYTHON], "-P", "-c", PARSE],
        input=json.dumps([words for words, _ in asked]),
        env={**os.environ, **HERE},
        capture_output=True,
        text=True,
        timeout=READY_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    understood = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    for (model, drain, policy), (words, pod) in zip(understood, asked, strict=True):
        assert model == words[0]
        assert policy == "priority"
        assert 0 < drain < pod.spec["terminationGracePeriodSeconds"]


def test_the_probes_need_no_key_and_the_api_does(served: Served) -> None:
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert served.status(served.pod.main[probe]["httpGet"]["path"]) == 200
    body = {"model": MODEL, "prompt": "1+1=", "max_tokens": 2}
    assert served.status("/v1/completions", body=body) == 401
    assert served.status("/v1/completions", key=KEY, body=body) == 200


def test_what_vllm_compiles_and_learns_outlives_the_pod(served: Served) -> None:
    assert any(path.is_file() for path in (served.work / "weights" / "cache").rglob("*"))


def test_metrics_that_scale_pools_are_vllms(served: Served) -> None:
    values = CHART.over({"backendDefaults": {"keda": {"enabled": True}, "weights": {"enabled": False}}})
    (scaler,) = [
        item
        for item in of_kind(rendered(values), "ScaledObject")
        if item["metadata"]["labels"]["depo-gateway/pool"] == "large"
    ]
    (asked,) = re.findall(r"vllm:\w+", scaler["spec"]["triggers"][0]["metadata"]["query"])
    monitor = named(rendered(values), "PodMonitor", "depo-depo-gateway-backends")
    with contextlib.closing(served.connection()) as connection:
        connection.request("GET", monitor["spec"]["podMetricsEndpoints"][0]["path"])
        metrics = connection.getresponse().read().decode()
    assert re.search(rf"^{asked}\{{.*\}} 0\.0$", metrics, re.MULTILINE)


def test_an_answer_that_has_begun_is_finished_on_sigterm(served: Served) -> None:
    """The last test here: it ends the server."""
    events: list[bytes] = []
    begun = threading.Event()
    asking = threading.Thread(target=served.stream, args=(1900, events, begun))
    asking.start()
    assert begun.wait(60)
    at = len(events)
    os.kill(served.process.pid, signal.SIGTERM)
    asking.join(120)
    data = [line for line in events if line]
    assert data[-1] == b"data: [DONE]", "cut off"
    assert at < len(events) / 2, "the answer had nearly ended before the signal"
    assert json.loads(data[-2].removeprefix(b"data: "))["choices"][0]["finish_reason"] == "length"
    grace = served.pod.spec["terminationGracePeriodSeconds"]
    assert served.process.wait(grace) == 0
