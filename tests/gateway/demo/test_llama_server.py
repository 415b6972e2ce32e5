"""The real llama.cpp server on the shipped small model."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from depo_gateway import gateway

MODEL = Path(gateway.__file__).parent / "demo" / "data" / "small" / "model.gguf"
COMMAND = [sys.executable, "-m", "depo_gateway.gateway.demo.llama_server", "--model", str(MODEL), "--port", "0"]
pytest.importorskip("xllamacpp")


def address_of(running: "subprocess.Popen[str]") -> str:
    assert running.stdout is not None
    line = running.stdout.readline()
    found = re.search(r"http://[\d.:]+", line)
    assert found, line
    return found.group()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, text=True) as running:
        yield address_of(running)
        running.terminate()


def post(url: str, path: str, **body: Any) -> Any:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        content = response.read().decode()
    if not body.get("stream"):
        return json.loads(content)
    events = [line.removeprefix("data: ") for line in content.splitlines() if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_chat_is_answered_and_ends_by_itself(url: str) -> None:
    reply = post(url, "/v1/chat/completions", messages=user("3+4="), temperature=0, logprobs=True, tools=[])
    choice = reply["choices"][0]
    assert choice["message"]["content"] == "3+4=7"
    assert choice["finish_reason"] == "stop"
    assert [token["token"] for token in choice["logprobs"]["content"]][:5] == list("3+4=7")
    assert reply["model"] == "small"
    assert reply["usage"]["prompt_tokens"] == 5


def test_a_completion_sees_the_same_prompt_as_a_chat(url: str) -> None:
    reply = post(url, "/v1/completions", prompt="3+4=", temperature=0)
    assert reply["choices"][0]["text"] == "3+4=7"
    assert reply["usage"]["prompt_tokens"] == 5


def test_a_stream_ends_with_usage_when_asked(url: str) -> None:
    events = post(
        url,
        "/v1/chat/completions",
        messages=user("3+4="),
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    deltas = [event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"]]
    assert "".join(deltas) == "3+4=7"
    assert events[-1]["usage"]["completion_tokens"] == 6


def test_tools_and_json_schema_are_accepted(url: str) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    reply = post(url, "/v1/chat/completions", messages=user("3+4="), temperature=0, tools=[tool])
    assert reply["choices"][0]["message"]["content"] == "3+4=7"
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    shape = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    reply = post(url, "/v1/chat/completions", messages=user("3+4="), response_format=shape, max_tokens=200)
    assert json.loads(reply["choices"][0]["message"]["content"])["a"] in (1, 2)


def test_what_a_request_leaves_out_means_plain_sampling(url: str) -> None:
    """llama.cpp's own defaults (top-k 40, min-p 0.05, temperature 0.8) would make the small model look surer."""
    defaults = post(url, "/completion", prompt="3+4=", n_predict=1)["generation_settings"]
    assert {name: defaults[name] for name in ("temperature", "top_k", "top_p", "min_p")} == {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
    }


def test_a_client_that_hangs_up_frees_its_slot(url: str) -> None:
    def busy() -> int:
        with urllib.request.urlopen(url + "/slots", timeout=30) as response:
            return sum(slot["is_processing"] for slot in json.load(response))

    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "3+4=", "stream": True, "ignore_eos": True, "max_tokens": 2000}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((host, int(port))) as client:
        client.sendall(head + body)
        client.recv(200)
    deadline = time.monotonic() + 1
    while busy() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert busy() == 0


def test_sigterm_ends_it_at_once() -> None:
    with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, text=True) as running:
        address_of(running)
        began = time.monotonic()
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=5) == -signal.SIGTERM
        assert time.monotonic() - began < 2


def test_it_goes_when_its_parent_is_killed() -> None:
    program = f"import subprocess, time; p = subprocess.Popen({COMMAND!r}); print(p.pid, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        address_of(parent)
        parent.kill()
    deadline = time.monotonic() + 5
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(child)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    command = [*COMMAND[:4], str(tmp_path / "none.gguf"), "--port", "0"]
    missing = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (missing.returncode, missing.stderr) == (2, f"no such model file: {tmp_path / 'none.gguf'}\n")
    (tmp_path / "bad.gguf").write_text("not a model")
    bad = subprocess.run(
        [*COMMAND[:4], str(tmp_path / "bad.gguf"), "--port", "0"], capture_output=True, text=True, check=False
    )
    assert bad.returncode == 1
    assert bad.stderr.splitlines()[-1].startswith(f"llama.cpp cannot serve {tmp_path / 'bad.gguf'} on port 0: ")
    main = "from depo_gateway.gateway.demo.llama_server import main; sys.exit(main())"
    program = f"import sys; sys.modules['xllamacpp'] = None; {main}"
    without = subprocess.run([sys.executable, "-c", program, *COMMAND[3:]], capture_output=True, text=True, check=False)
    assert (without.returncode, without.stderr) == (
        2,
        "the demo's backends need llama.cpp: pip install 'depo-gateway[demo]'\n",
    )


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
