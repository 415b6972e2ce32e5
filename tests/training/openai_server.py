"""Real HTTP servers on loopback that play an OpenAI backend, well and badly; the collect command; its table."""

import argparse
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from depo_gateway.training.commands import collect

Reply = Callable[[dict[str, Any], int], tuple[int, dict[str, Any]]]  # (body, calls so far) -> status, JSON


@dataclass
class Played:
    """A running server and what it was asked."""

    url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)


def completion(texts: Sequence[str | None], logprob: float | None = -0.5, **choice: Any) -> dict[str, Any]:
    """A chat's answer; `choice` adds to each choice."""
    logprobs = None if logprob is None else {"content": [{"token": "x", "logprob": logprob}] * 3}
    choices = [
        {"index": i, "message": {"content": text}, "logprobs": logprobs, **choice} for i, text in enumerate(texts)
    ]
    return {"object": "chat.completion", "choices": choices}


def always(text: str) -> Reply:
    return lambda body, calls: (200, completion([text] * body.get("n", 1)))


@contextmanager
def server(reply: Reply, models: tuple[str, ...] = ("model-a",)) -> Iterator[Played]:
    class Handler(BaseHTTPRequestHandler):
        def send(self, status: int, payload: object) -> None:
            content = json.dumps(payload).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self.send(200, {"object": "list", "data": [{"id": name} for name in models]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            played.bodies.append(body)
            played.keys.add(self.headers["Authorization"])
            status, payload = reply(body, len(played.bodies))
            if status == 0:  # hang up
                self.close_connection = True
                return
            self.send(status, payload)

        def log_message(self, *_: object) -> None: ...

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None: ...  # a client that went away is part of the play

    listening = Quiet(("127.0.0.1", 0), Handler)
    played = Played(f"http://127.0.0.1:{listening.server_port}")
    threading.Thread(target=listening.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield played
    finally:
        listening.shutdown()
        listening.server_close()


def command(*words: object) -> int:
    parser = argparse.ArgumentParser()
    collect.add_arguments(parser)
    return collect.run(parser.parse_args([str(word) for word in words]))


def table(path: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["question"] for row in rows}) == len(rows)
    return {row["question"]: row for row in rows}
