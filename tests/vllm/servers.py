"""Real vLLM servers, each a process group of its own: started, asked, killed."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

READY_SECONDS = 300.0  # 45 on a quiet machine of two cores, several times that on a busy one
FLAGS = (
    "--scheduling-policy",
    "priority",
    "--enforce-eager",
    "--dtype",
    "bfloat16",
    "--max-num-seqs",
    "8",
    "--max-logprobs",
    "5",
)
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two servers share the cores: bound to the same one, both would crawl
    # --enforce-eager leaves one torch.compile, for log-probabilities: 18 s at the first request, and a C++ compiler.
    "TORCH_COMPILE_DISABLE": "1",
}
CACHES = ("VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT")  # else under the home directory


@dataclass(slots=True)
class VllmServer:
    """One `vllm serve`; `url` is without /v1. Its log is a file."""

    python: Path  # of a venv that has vllm
    checkpoint: Path
    model: str  # the served name
    context: int  # tokens
    log: Path
    port: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts it without waiting; `ready` waits."""
        self.port = self.port or free_port()
        words = ("--model", self.checkpoint, "--served-model-name", self.model, "--max-model-len", str(self.context))
        place = ("--host", "127.0.0.1", "--port", str(self.port))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    self.python,
                    "-P",
                    "-m",
                    "vllm.entrypoints.openai.api_server",
                    *words,
                    *place,
                    *FLAGS,
                ],  # -P: nothing of ours
                cwd=self.log.parent,
                env={**os.environ, **SETTINGS, **{name: str(self.log.parent) for name in CACHES}},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def ready(self) -> None:
        """Waits for /health, then sends the first request of each kind, which are slow (seconds)."""
        assert self.process is not None
        until = time.monotonic() + READY_SECONDS
        while True:
            if self.process.poll() is not None:
                raise AssertionError(f"{self.model} ended with {self.process.returncode}\n{self.tail()}")
            if time.monotonic() > until:
                raise AssertionError(f"{self.model} was not ready within {READY_SECONDS:g} s\n{self.tail()}")
            try:
                self.ask("/health")
                break
            except OSError:
                time.sleep(0.5)
        message = {"role": "user", "content": "1+1="}
        self.ask("/v1/completions", {"model": self.model, "max_tokens": 4, "prompt": "1+1="})
        self.ask("/v1/chat/completions", {"model": self.model, "max_tokens": 4, "messages": [message]})

    def ask(self, path: str, body: Mapping[str, object] | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        with urllib.request.urlopen(asked, timeout=READY_SECONDS) as answer:
            text: str = answer.read().decode()
            return text

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def freeze(self) -> None:
        """`kill -STOP`: connections stay open and are still accepted by the kernel, and nobody answers."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGSTOP)

    def kill(self) -> None:
        """`kill -9` to the server and its children: open connections break, new ones are refused."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
            self.process = None

    def tail(self, lines: int = 40) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def metrics(self) -> dict[str, float]:
        """vLLM's own /metrics, every name with the sum over its labels."""
        sums: dict[str, float] = {}
        for name, value in re.findall(r"^(vllm:\w+)(?:\{.*\})? (\S+)$", self.ask("/metrics"), re.MULTILINE):
            sums[name] = sums.get(name, 0.0) + float(value)
        return sums


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        port: int = made.getsockname()[1]
        return port
