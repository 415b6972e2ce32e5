"""The depo-train command. Heavy imports wait until a command runs, so that --help and usage errors are fast."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

# command -> (module with add_arguments(parser) and run(args) -> exit code, what it does)
COMMANDS = {
    "collect": ("depo_gateway.training.commands.collect", "sample and grade outcomes from your own servers"),
    "fit": ("depo_gateway.training.commands.fit", "fit an estimator to outcome tables"),
    "refresh": (
        "depo_gateway.training.commands.refresh",
        "learn from served traffic and publish a better checkpoint; --follow repeats",
    ),
    "accept": (
        "depo_gateway.training.commands.accept",
        "publish the checkpoint that refresh holds back because it raises the cost",
    ),
    "calibrate": (
        "depo_gateway.training.commands.calibrate",
        "fit probabilities and thresholds for targets, as a new checkpoint",
    ),
    "rl": ("depo_gateway.training.commands.rl", "train a policy by GRPO, DAPO or DEPO, and an estimator that routes"),
    "evaluate": (
        "depo_gateway.training.commands.evaluate",
        "compare a checkpoint's routing with random routing and prompt length",
    ),
}
# command -> what it imports beyond the base install
NEEDS = {
    "collect": ("aiohttp",),
    "fit": ("torch", "transformers", "onnx", "onnxscript"),
    "refresh": ("torch", "transformers", "onnx", "onnxscript", "aiohttp"),
    "calibrate": ("aiohttp",),
    "rl": ("torch", "transformers", "trl", "accelerate", "datasets", "onnx", "onnxscript"),
    "evaluate": ("aiohttp", "matplotlib"),
}
INSTALL = "pip install 'depo-gateway[training]' (from a checkout: pip install '.[training]')"
RAW = ("rl",)  # commands that parse their own arguments: run(args) gets them in args.rest


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command: 0 done, 1 failed or interrupted, 2 the user's mistake, with one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(prog="depo-train", description="Fits the estimators that the gateway routes by.")
    parser.add_argument("--version", action="version", version=f"depo-train {version('depo-gateway')}")
    requested = next((argument for argument in arguments if not argument.startswith("-")), "")
    missing = [module for module in NEEDS.get(requested, ()) if importlib.util.find_spec(module) is None]
    if missing and not {"-h", "--help"} & set(arguments):
        print(f"depo-train {requested}: needs {', '.join(missing)}; install it: {INSTALL}", file=sys.stderr)
        return 2
    _quiet_libraries()
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        description = summary[0].upper() + summary[1:] + "."
        if missing and name == requested:
            description += f" Its options are listed where {', '.join(missing)} can be imported; install it: {INSTALL}"
        command = commands.add_parser(name, help=summary, description=description)
        if name == requested and name not in RAW and not missing:  # importing the others would only take time
            importlib.import_module(module).add_arguments(command)
    raw = arguments[:1] == [requested] and requested in RAW and not missing
    args = argparse.Namespace(command=requested, rest=arguments[1:]) if raw else parser.parse_args(arguments)
    try:
        code: int = importlib.import_module(COMMANDS[args.command][0]).run(args)
    except (ValueError, OSError) as error:
        print(f"depo-train {args.command}: {_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"depo-train {args.command}: interrupted", file=sys.stderr)
        return 1
    return code


def _quiet_libraries() -> None:
    """Silences the libraries that load encoders, except for errors; in logs also their progress bars.

    TRL would report each run to Hugging Face. Variables that are set already take precedence. It must be called before
    the libraries are imported.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for name in ("HF_HUB_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _sentence(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
