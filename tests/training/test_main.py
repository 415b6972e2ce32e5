"""depo-train as a process of its own: without the training extra, and without a hub to ask."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from depo_gateway.training.__main__ import NEEDS

RUN = "from depo_gateway.training.__main__ import main; sys.exit(main())"


def depo_train(program: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", **environment},
    )


def without(*modules: str) -> str:
    """The command where these modules are not installed: who looks for files finds none of theirs."""
    return f"""
import sys
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *rest: None if name.partition(".")[0] in {modules!r} else find_spec(name, *rest)
)
{RUN}
"""


def extra() -> set[str]:
    """The modules that the extra `training` installs."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    required = project["project"]["optional-dependencies"]["training"]
    return {re.split(r"[<>=]", line)[0].replace("-", "_") for line in required}


@pytest.mark.parametrize("command", NEEDS)
def test_a_command_without_the_training_extra_says_what_to_install(command: str) -> None:
    needed = ", ".join(NEEDS[command])
    install = "install it: pip install 'depo-gateway[training]' (from a checkout: pip install '.[training]')"
    for words in ((), ("--outcomes", "nowhere.jsonl", "--pools", "s=s", "--out", "x")):
        done = depo_train(without(*extra()), command, *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"depo-train {command}: needs {needed}; {install}\n"
    done = depo_train(without(*extra()), command, "--help", COLUMNS="500")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: depo-train {command} ")
    assert f"Its options are listed where {needed} can be imported; {install}" in done.stdout


@pytest.mark.parametrize("command", ["", *NEEDS])
def test_a_command_imports_no_more_than_it_says(command: str) -> None:
    hidden = extra() - set(NEEDS.get(command, ()))
    if command == "rl":
        hidden -= {"aiohttp"}  # datasets imports it
    done = depo_train(without(*hidden), *([command] if command else []), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: depo-train" in done.stdout
    assert "options are listed where" not in done.stdout


def test_only_what_is_missing_is_named_before_anything_is_read() -> None:
    done = depo_train(without("torch", "matplotlib"), "evaluate", "--checkpoint", "x", "--outcomes", "y", "--out", "z")
    assert done.returncode == 2
    assert done.stderr.startswith("depo-train evaluate: needs matplotlib; install it: ")


@pytest.mark.parametrize(("variable", "disabled"), [({}, True), ({"HF_HUB_DISABLE_TELEMETRY": "0"}, False)])
def test_no_run_is_reported_unless_the_user_wants_it(
    variable: dict[str, str], disabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    program = f"""
import sys
from depo_gateway.training.__main__ import main
assert main(["calibrate", "--checkpoint", "x", "--outcomes", "y", "--out", "z"]) == 2
from huggingface_hub import constants
sys.exit(int(constants.HF_HUB_DISABLE_TELEMETRY is not {disabled}))
"""
    assert depo_train(program, **variable).returncode == 0


def test_an_encoder_on_a_hub_that_is_not_there_is_one_line_in_seconds(tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    table.write_text('{"question": "x", "correct": {"s": 1}}\n')
    words = ("--outcomes", str(table), "--pools", "s=s", "--out", str(tmp_path / "out"), "--encoder", "nobody/nothing")
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
    done = depo_train("import sys\n" + RUN, "fit", *words, **hub)
    assert done.returncode == 2
    assert done.stderr == (
        "depo-train fit: encoder 'nobody/nothing' can't be loaded: it isn't in the Hugging Face cache, and the hub"
        " http://127.0.0.1:9 can't be reached: Connection refused; without the hub, give a directory, or take"
        " sentence-transformers/all-MiniLM-L6-v2 with 1 to 5 layers\n"
    )
