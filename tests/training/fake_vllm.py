"""A real HTTP server on loopback that plays vLLM, or a webhook, as a test says; and records to shadow."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from depo_gateway.estimator.records.types import Record

Reply = Callable[[dict[str, Any]], tuple[int, Any]]  # body -> status, JSON; status 0: hang up


@dataclass
class Served:
    """A running server, what it was asked, and what its /metrics say; tests change `reply` and `waiting`."""

    url: str
    reply: Reply
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    waiting: float | None = None  # vllm:num_requests_waiting; None: /metrics is 404
    most_at_once: int = 0


def chat(text: str | None, logprob: float | None = -0.5, finish: str = "stop", **message: Any) -> dict[str, Any]:
    logprobs = None if logprob is None else {"content": [{"token": "x", "logprob": logprob}] * 3}
    choice = {"message": {"content": text, **message}, "logprobs": logprobs, "finish_reason": finish}
    return {"choices": [choice], "usage": {"prompt_tokens": 60, "completion_tokens": 40}}


def says(text: str) -> Reply:
    return lambda body: (200, chat(text))


@contextmanager
def vllm(reply: Reply) -> Iterator[Served]:
    lock, now = threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def send(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            if self.path == "/health":
                return self.send(200, b"")
            count = served.waiting
            if self.path != "/metrics" or count is None:
                return self.send(404, b"")
            text = f'# HELP x y\nvllm:num_requests_running 9.0\nvllm:num_requests_waiting{{engine="0"}} {count}\n'
            return self.send(200, text.encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                now[0] += 1
                served.most_at_once = max(served.most_at_once, now[0])
                served.bodies.append(body)
                served.paths.append(self.path)
                served.keys.append(self.headers["Authorization"])
            status, payload = served.reply(body)
            with lock:
                now[0] -= 1
            if status == 0:
                self.close_connection = True
            else:
                self.send(status, payload if isinstance(payload, bytes) else json.dumps(payload).encode())

        def log_message(self, *_: object) -> None: ...

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None: ...  # a client that went away is part of the play

    listening = Quiet(("127.0.0.1", 0), Handler)
    served = Served(f"http://127.0.0.1:{listening.server_port}", reply)
    threading.Thread(target=listening.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield served
    finally:
        listening.shutdown()
        listening.server_close()


def record(number: int, time: float, **fields: Any) -> Record:
    """A request that the small pool answered."""
    usual: dict[str, Any] = {
        "key": "team-a",
        "pool": "small",
        "reason": "confident",
        "pools": ("small", "large"),
        "status": 200,
        "finish_reason": "stop",
        "asked": [{"role": "user", "content": f"what is {number}+0"}],
        "answer": str(number),
    }
    return Record(f"id-{number}", time, **usual | fields)
