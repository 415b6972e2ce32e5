"""The depo-gateway command: serve, demo, check, keys, seed."""

import argparse
import logging
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from depo_gateway import __version__
from depo_gateway.gateway import config


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 (failed) or 2 (the user's mistake, told in one line on stderr)."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        return int(options.run(options))
    except ValueError as error:
        print(f"depo-gateway: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `depo-gateway check gateway.yaml | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush complains
        return 1
    except OSError as error:
        print(f"depo-gateway: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 1


class _Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one line, without the usage before it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.add_argument("--version", action="version", version=f"depo-gateway {__version__}")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="depo-gateway",
        description="An OpenAI-compatible gateway that sends each query to the cheapest pool of models that will do.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    serve = commands.add_parser(
        "serve", help="run the gateway", description="Runs the gateway until SIGTERM or Ctrl-C."
    )
    serve.add_argument("--config", type=Path, required=True, metavar="FILE", help="the gateway.yaml")
    serve.set_defaults(run=_serve)
    demo = commands.add_parser(
        "demo",
        help="watch queries being routed between two small real language models",
        description="Starts two small language models and the gateway, sends sample queries and shows where each went.",
    )
    demo.add_argument("--once", action="store_true", help="exit after the queries instead of staying up")
    demo.add_argument(
        "--backends", nargs="+", metavar="POOL=URL", help="two OpenAI-compatible servers of your own instead"
    )
    demo.add_argument("--queries", type=int, metavar="N", help="how many queries to send (default: all there are)")
    demo.add_argument("--port", type=int, default=8000, help="the gateway's port (default 8000)")
    demo.add_argument("--admin-port", type=int, default=9000, help="the port of /metrics (default 9000)")
    demo.set_defaults(run=_demo)
    check = commands.add_parser(
        "check", help="validate a config", description="Validates a config and prints it resolved, without secrets."
    )
    check.add_argument("config", type=Path, metavar="gateway.yaml")
    check.set_defaults(run=_check)
    keys = commands.add_parser("keys", help="make API keys", description="Makes API keys.")
    actions = keys.add_subparsers(metavar="ACTION", required=True)
    new = actions.add_parser(
        "new",
        help="print a fresh key once",
        description="Prints a fresh API key once, and the line that goes into the config.",
    )
    new.add_argument("name", metavar="NAME", help="whom the key is for")
    new.set_defaults(run=_new_key)
    seed = commands.add_parser(
        "seed",
        help="put the shipped estimator into a directory of checkpoints",
        description="Writes the shipped estimator into DIR/builtin, under the names of your pools, and lets "
        "DIR/current name it. Where DIR/current is there already, nothing is written.",
    )
    seed.add_argument("directory", type=Path, metavar="DIR", help="what estimator.path names")
    seed.add_argument("--pools", nargs="+", required=True, metavar="POOL", help="as in the config, cheapest first")
    seed.set_defaults(run=_seed)
    return parser


def _serve(options: argparse.Namespace) -> int:
    import uvloop

    from depo_gateway.gateway import server

    settings = config.load_config(options.config)

    def ready(public: str, admin: str) -> None:
        addresses = f"metrics at {admin}/metrics, status page at {admin}/admin/"
        print(f"serving {public}/v1, {addresses}", file=sys.stderr, flush=True)

    uvloop.run(server.serve(settings, options.config, ready))
    return 0


def _demo(options: argparse.Namespace) -> int:
    try:
        from depo_gateway.gateway.demo import run as demo
    except ModuleNotFoundError as error:
        raise ValueError(f"the demo needs {error.name}: pip install 'depo-gateway[demo]'") from None

    logging.getLogger().setLevel(logging.WARNING)  # its own lines tell what happens
    return demo.run(options)


def _check(options: argparse.Namespace) -> int:
    from depo_gateway.estimator.records.store import Store
    from depo_gateway.gateway import control, scoring

    settings = config.load_config(options.config)
    pools, rule = tuple(settings.pools), settings.routing.rule
    runtime, _ = scoring.load_runtime(settings.estimator.path, pools, rule)
    control.calibrated_threshold(settings, runtime)
    if settings.estimator.candidate is not None:
        try:
            runtime, _ = scoring.load_runtime(settings.estimator.candidate, pools, rule)
            control.calibrated_threshold(settings, runtime)
        except ValueError as error:
            raise ValueError(f"estimator.candidate: {error}") from None
    if settings.records is not None:
        Store(config.database_url(settings.records)).close()  # its address and driver; nobody is asked yet
    print(config.resolved_yaml(settings), end="", flush=True)
    return 0


def _new_key(options: argparse.Namespace) -> int:
    key = "sk-depo-" + secrets.token_urlsafe(32)
    name = options.name
    if not name.strip() or not name.isprintable() or '"' in name or "\\" in name:
        raise ValueError(f"the name {name!r} must be plain text without quotes and backslashes")
    print(f"The key, shown this once: {key}")
    print("The line for auth.keys, or for the file that auth.keys_file names:")
    print(f'- {{name: "{name}", sha256: "{config.key_digest(key)}"}}')
    return 0


def _seed(options: argparse.Namespace) -> int:
    from depo_gateway.gateway import seed

    print(seed.seed(options.directory, tuple(options.pools)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
