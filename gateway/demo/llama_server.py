"""One llama.cpp server on one GGUF file, `python -m depo_gateway.gateway.demo.llama_server --model FILE --port N`.

It is llama.cpp's OpenAI server from the xllamacpp wheel, in its own process so that it can be killed like a real
backend. It ends when its parent ends. Port 0 takes a free one; the line it prints when ready names the address.
"""

import argparse
import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def start(model: Path, port: int, alias: str, slots: int, threads: int, context: int) -> Any:
    """The running server, on its own threads. Keep the reference: dropping it stops the server."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.model_alias = {alias}
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_parallel = slots
    params.n_ctx = slots * context
    params.cont_batching = True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_threads_http = slots + 4  # a stream holds one of them
    params.verbosity = 0
    params.ui = False
    params.cache_ram_mib = 0
    # The defaults of OpenAI and vLLM, instead of llama.cpp's top-k 40 and min-p.
    sampling = params.sampling
    sampling.temp, sampling.top_k, sampling.top_p, sampling.min_p = 1.0, 0, 1.0, 0.0
    return xllamacpp.Server(params)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m depo_gateway.gateway.demo.llama_server",
        description="One llama.cpp server on one GGUF file. It ends when the process that started it ends.",
    )
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file")
    parser.add_argument("--port", type=int, required=True, help="0: any free port")
    parser.add_argument("--alias", help="the model's name in the API (default: the name of the file's folder)")
    parser.add_argument("--slots", type=int, default=8, help="requests decoded at once (default 8)")
    parser.add_argument("--threads", type=int, default=1, help="threads that decode (default 1)")
    parser.add_argument("--context", type=int, default=2048, help="longest request, in tokens (default 2048)")
    options = parser.parse_args(argv)
    if not options.model.is_file():
        print(f"no such model file: {options.model}", file=sys.stderr)
        return 2
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # like SIGTERM: it ends at once, whatever llama.cpp's threads do
    alias = options.alias or options.model.resolve().parent.name
    try:
        server = start(options.model, options.port, alias, options.slots, options.threads, options.context)
    except ModuleNotFoundError:
        print("the demo's backends need llama.cpp: pip install 'depo-gateway[demo]'", file=sys.stderr)
        return 2
    except RuntimeError as error:  # llama.cpp gives no more detail
        print(f"llama.cpp cannot serve {options.model} on port {options.port}: {error}", file=sys.stderr)
        return 1
    print(f"{alias} at {server.listening_address}", flush=True)
    while True:
        signal.pause()


def _die_with_parent() -> None:
    """On Linux, this process gets SIGTERM when its parent ends, however it ends."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG
        if os.getppid() != parent:  # the parent ended before prctl
            sys.exit(0)


if __name__ == "__main__":
    sys.exit(main())
