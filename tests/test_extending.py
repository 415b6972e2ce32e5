"""The recipes of docs/extending.md: their code is written to files as shown, and the tests among them pass."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/extending.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(?:# (\S+)\n)?(.*?)^```$", re.MULTILINE | re.DOTALL)
RECIPES = {part.partition("\n")[0]: part for part in PAGE.split("\n## ")[1:]}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_works_as_it_is_shown(name: str, tmp_path: Path) -> None:
    blocks = BLOCK.findall(RECIPES[name])
    files = {file: f"# {file}\n{text}" for _, file, text in blocks}
    assert len(files) == len(blocks), "every block names its file in the first line, each another"
    assert [file for file in files if re.fullmatch(r"test_\w+\.py", file)]
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_table_at_the_head_names_every_recipe() -> None:
    named = re.findall(r"^\| \[(.+?)\]\(", PAGE.split("\n## ")[0], re.MULTILINE)
    assert [name.lower() for name in RECIPES] == named


def test_the_code_shown_is_formatted_and_clean(tmp_path: Path) -> None:
    for _, file, text in BLOCK.findall(PAGE):
        if file.endswith(".py"):
            (tmp_path / file).write_text(f"# {file}\n{text}")
    for command in (["format", "--check"], ["check", "--ignore", "I001"]):
        checked = [sys.executable, "-m", "ruff", *command, "--no-cache", "--config", ROOT / "pyproject.toml", tmp_path]
        done = subprocess.run(checked, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
