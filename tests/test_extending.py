"""The recipes of docs/extending.md: each is followed to the letter in a copy of the repository.

A block's first line names its file. A `diff` changes a file of ours; any other block is a new file. Then the commands
of the recipes' `sh` blocks are run.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/extending.md").read_text()
RECIPES = {part.partition("\n")[0]: part for part in re.split(r"^## (?=A )", PAGE, flags=re.MULTILINE)[1:]}
BLOCK = re.compile(r"^(`{3,4})(\w+)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"(?:# |<!-- )([\w./]+)(?: -->)?\n")
COPIED = ("gateway", "estimator", "training", "depo_gateway", "dashboards", "helm", "docs", "examples", "tests")
LINKED = ("benchmarks", "docker", "LICENSE", "pyproject.toml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md")
LARGE_BYTES = 200_000  # from here on a link will do: weights, pictures


def blocks(page: str) -> list[tuple[str, str, str]]:
    """The language, file and text of each block; `sh` blocks have no file."""
    found = []
    for _, kind, block in BLOCK.findall(page):
        named = FILE.match(block)
        assert (named is None) == (kind == "sh"), f"a block names its file in the first line: {block}"
        found.append((kind, "", block) if named is None else (kind, named[1], block[named.end() :].lstrip("\n")))
    return found


def link_or_copy(source: str, target: str) -> None:
    if os.path.getsize(source) > LARGE_BYTES:
        os.symlink(source, target)
    else:
        shutil.copy2(source, target)


def apply_diff(path: Path, diff: str) -> None:
    """Change the places that the diff shows, each of which must occur once; `@@` separates them."""
    text = path.read_text()
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        assert {line[0] for line in lines} <= {" ", "+", "-"}, hunk
        before, after = ("".join(line[1:] for line in lines if line[0] != sign) for sign in "+-")
        assert text.count(before) == 1, f"{path} has this {text.count(before)} times:\n{before}"
        text = text.replace(before, after)
    path.write_text(text)


def follow(recipe: str, repository: Path) -> list[str]:
    """Write and change the files of a recipe; its commands."""
    commands: list[str] = []
    for kind, file, text in blocks(recipe):
        path = repository / file
        if kind == "sh":
            commands += text.splitlines()
        elif kind == "diff":
            apply_diff(path, text)
        else:
            assert not path.exists(), file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return commands


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    """A copy of the repository in which every recipe was followed, and the arguments of their commands of Python."""
    repository = tmp_path_factory.mktemp("repository")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in COPIED:
        copied = repository / name
        shutil.copytree(ROOT / name, copied, symlinks=True, ignore=ignored, copy_function=link_or_copy)
    for name in LINKED:
        (repository / name).symlink_to(ROOT / name)
    commands = [shlex.split(command) for recipe in RECIPES.values() for command in follow(recipe, repository)]
    return repository, [arguments for program, *arguments in commands if program == "python"]  # not a whole depo-train


def run(repository: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository), "PYTEST_ADDOPTS": f"--basetemp={repository}.pytest"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_recipes_work_to_the_letter(extended: tuple[Path, list[list[str]]]) -> None:
    repository, commands = extended
    tests = ["-m", "pytest"]
    for command in commands:
        if command[:2] != tests:
            run(repository, *command)
    files = dict.fromkeys(file for command in commands if command[:2] == tests for file in command[2:])
    run(repository, *tests, *files)  # one process for all: its start takes longer than the tests


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_test_of_its_own_and_a_command_that_runs_it(name: str) -> None:
    shown = blocks(RECIPES[name])
    commands = [word for kind, _, text in shown if kind == "sh" for word in text.split()]
    assert [file for _, file, _ in shown if re.fullmatch(r"\w+/.*test_\w+\.py", file) and file in commands]


def test_the_table_at_the_head_names_every_recipe() -> None:
    named = re.findall(r"^\| \[(.+?)\]\(", PAGE[: PAGE.index("\n## ")], re.MULTILINE)
    assert [name.lower() for name in RECIPES] == named


@pytest.mark.parametrize("command", ["format --check", "check"])
def test_the_code_shown_is_formatted_and_clean(extended: tuple[Path, list[list[str]]], command: str) -> None:
    files = sorted({file for _, file, _ in blocks(PAGE) if file.endswith(".py")})
    run(extended[0], "-m", "ruff", *command.split(), *files)
