"""Checks an installation: serving has no torch and all data files, every command has a help text, a gateway serves.

Run by .ci/wheel with the Python that the wheel is installed for, in a directory of packages named as our folders.
"""

import http.server
import importlib.metadata
import json
import re
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import depo_gateway
from depo_gateway import Runtime
from depo_gateway.gateway import status

BIN = Path(sys.executable).parent
UNWANTED = {"torch", "transformers", "scikit-learn", "matplotlib", "onnx", "xllamacpp", "vllm"}


def main() -> None:
    assert BIN.parent in Path(depo_gateway.__file__).parents, depo_gateway.__file__
    installed = {item.metadata["Name"].lower() for item in importlib.metadata.distributions()}
    assert not UNWANTED & (installed | set(sys.modules)), sorted(UNWANTED & (installed | set(sys.modules)))
    assert b"<title>" in status.page()[0]
    runtime = Runtime.load(Path(depo_gateway.__file__).parent / "estimator" / "builtin")
    print("estimator", runtime.version, runtime.score([runtime.prepare("What is 3 + 4?")]))
    for program in ("depo-gateway", "depo-train"):
        assert output(program, "--version") == f"{program} {depo_gateway.__version__}\n"
    commands = helps("depo-gateway")
    assert {"depo-gateway serve", "depo-gateway keys new"} <= set(commands), commands
    print("a help text each:", ", ".join(commands))
    assert "refresh" in output("depo-train", "--help")  # what its commands need is in the extra `training`
    print("served by", serve())


def output(*words: str) -> str:
    done = subprocess.run([BIN / words[0], *words[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


def helps(*words: str) -> list[str]:
    """The command and all below it, each of which printed a help text."""
    found = [" ".join(words)]
    for name in re.findall(r"^    ([a-z]+)(?:  |$)", output(*words, "--help"), re.MULTILINE):
        found += helps(*words, name)
    return found


class Backend(http.server.BaseHTTPRequestHandler):
    """Replies 7 to every prompt."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.reply({"object": "list", "data": []})

    def do_POST(self) -> None:
        model = json.loads(self.rfile.read(int(self.headers["content-length"])))["model"]
        choice = {"index": 0, "message": {"role": "assistant", "content": "7"}}
        self.reply({"id": "1", "object": "chat.completion", "model": model, "choices": [choice]})

    def reply(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def serve() -> str:
    """The pool that `depo-gateway serve` sends a request to."""
    backend = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Backend)
    threading.Thread(target=backend.serve_forever, daemon=True).start()
    pool = {"cost": 1, "backends": [{"url": f"http://127.0.0.1:{backend.server_port}"}]}
    pools = {"small": {**pool, "model": "org/small"}, "large": {**pool, "model": "org/large"}}
    config = {"version": 1, "listen": {"port": 0}, "admin": {"port": 0}, "pools": pools}
    Path("serving.yaml").write_text(json.dumps(config))  # JSON is YAML
    command = [BIN / "depo-gateway", "serve", "--config", "serving.yaml"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as gateway:
        assert gateway.stderr is not None
        url = next(found[1] for line in gateway.stderr if (found := re.search(r"serving (\S+)/v1", line)))
        for path in ("/livez", "/readyz"):
            assert urllib.request.urlopen(url + path, timeout=10).status == 200
        body = json.dumps({"model": "auto", "messages": [{"role": "user", "content": "What is 3 + 4?"}]}).encode()
        request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            pool_name: str = answer.headers["x-depo-pool"]
            assert json.load(answer)["choices"][0]["message"]["content"] == "7"
        gateway.terminate()
        assert gateway.wait(30) == 0
    return pool_name


if __name__ == "__main__":
    main()
