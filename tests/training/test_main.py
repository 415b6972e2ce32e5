"""depo-train as a process of its own: without the training extra, and without a hub to ask."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] in {modules!r} else find_spec(name, *rest)
{RUN}
"""


@pytest.mark.parametrize("more", [(), ("--help",), ("--outcomes", "nowhere.jsonl", "--pools", "s=s", "--out", "x")])
def test_fit_without_the_training_extra_says_what_to_install(more: tuple[str, ...]) -> None:
    done = depo_train(without("torch", "onnx"), "fit", *more)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "depo-train fit: needs torch, onnx; install it: pip install 'depo-gateway[training]'\n"


def test_evaluate_misses_matplotlib_before_it_reads_anything() -> None:
    done = depo_train(without("torch", "matplotlib"), "evaluate", "--checkpoint", "x", "--outcomes", "y", "--out", "z")
    assert done.returncode == 2
    assert done.stderr == "depo-train evaluate: needs matplotlib; install it: pip install 'depo-gateway[training]'\n"


@pytest.mark.parametrize(
    ("command", "hidden"),
    [
        ("", ("torch", "transformers", "onnx", "onnxscript", "matplotlib")),
        ("collect", ("torch", "transformers", "onnx", "onnxscript", "matplotlib")),
        ("calibrate", ("torch", "transformers", "onnx", "onnxscript", "matplotlib")),
        ("evaluate", ("torch", "transformers", "onnx", "onnxscript")),
    ],
)
def test_the_other_commands_need_no_torch(command: str, hidden: tuple[str, ...]) -> None:
    done = depo_train(without(*hidden), *([command] if command else []), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: depo-train" in done.stdout


@pytest.mark.slow
def test_an_encoder_on_a_hub_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    table.write_text('{"question": "x", "correct": {"s": 1}}\n')
    words = ("--outcomes", str(table), "--pools", "s=s", "--out", str(tmp_path / "out"), "--encoder", "nobody/nothing")
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
    done = depo_train("import sys\n" + RUN, "fit", *words, **hub)
    assert done.returncode == 2
    assert done.stderr.startswith("depo-train fit: encoder 'nobody/nothing' can't be loaded; ")
    assert done.stderr.count("\n") == 1
