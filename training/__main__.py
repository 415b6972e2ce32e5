"""The depo-train command. Heavy imports wait until a command runs, so --help and mistakes answer at once."""

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
    "collect": ("depo_gateway.training.commands.collect", "make an outcome table from your own servers"),
    "fit": ("depo_gateway.training.commands.fit", "fit an estimator to outcome tables"),
    "refresh": (
        "depo_gateway.training.commands.refresh",
        "learn from served traffic, publish what is better; --follow stays",
    ),
    "calibrate": (
        "depo_gateway.training.commands.calibrate",
        "set probabilities and thresholds for targets, as a new checkpoint",
    ),
    "rl": ("depo_gateway.training.commands.rl", "train a policy by GRPO, DAPO or DEPO; its estimator routes"),
    "evaluate": (
        "depo_gateway.training.commands.evaluate",
        "measure a checkpoint's routing against random and prompt length",
    ),
}
# command -> what it imports beyond the base install
NEEDS = {
    "fit": ("torch", "transformers", "onnx", "onnxscript"),
    "evaluate": ("matplotlib",),
    "refresh": ("torch", "transformers", "onnx", "onnxscript"),
    "rl": ("torch", "transformers", "trl", "accelerate", "datasets", "onnx", "onnxscript"),
}
RAW = ("rl",)  # commands that read what follows themselves: run(args) finds it in args.rest


class Parser(argparse.ArgumentParser):
    """argparse's, but a mistake is one line: its usage stays with --help. The one way argparse offers is to inherit."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command: 0 done, 1 failed or interrupted, 2 the user's mistake, told in one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog="depo-train", description="Learn to route: outcomes in, estimators out.")
    parser.add_argument("--version", action="version", version=f"depo-train {version('depo-gateway')}")
    meant = next((word for word in arguments if not word.startswith("-")), "")
    missing = [module for module in NEEDS.get(meant, ()) if importlib.util.find_spec(module) is None]
    if missing:
        names = ", ".join(missing)
        print(f"depo-train {meant}: needs {names}; install it: pip install 'depo-gateway[training]'", file=sys.stderr)
        return 2
    _quiet_libraries()
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == meant and name not in RAW:  # the others' imports would only cost time
            importlib.import_module(module).add_arguments(command)
    raw = arguments[:1] == [meant] and meant in RAW
    args = argparse.Namespace(command=meant, rest=arguments[1:]) if raw else parser.parse_args(arguments)
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
    """Only errors of the libraries that load encoders: no retries, load reports or, in a log, progress bars.

    Whoever sets these variables has their way. To be called before the libraries are imported.
    """
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
