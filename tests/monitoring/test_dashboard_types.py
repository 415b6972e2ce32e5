"""Grafana's own TypeScript types take every dashboard, panel options and field settings included."""

import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from dashboards.__main__ import PLACE
from tests import node

TYPES = Path(__file__).parent / "types"
WRONG = {
    '"graphTooltip": 1': '"graphTooltip": 7',
    '"legendFormat": "{{pool}}"': '"legend": "{{pool}}"',
    '"colorMode": "value"': '"colourMode": "value"',
    '"drawStyle": "line"': '"drawStyle": "lines"',
    '"type": "stat"': '"type": "number"',
}
Check = Callable[[Mapping[str, str]], set[str]]


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Check:
    """Says what TypeScript has against dashboards' JSON, given by name."""
    place = tmp_path_factory.mktemp("types")
    node.furnish(place, TYPES, ("board.ts", "tsconfig.json"))

    def said(boards: Mapping[str, str]) -> set[str]:
        for name, board in boards.items():
            made = f"import type {{ Board }} from './board';\nexport const board: Board = {board};\n"
            (place / f"{name}.ts").write_text(made)
        command = ["node", "node_modules/typescript/bin/tsc", "--project", "."]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True)
        assert (done.returncode != 0) == bool(done.stdout), done.stderr
        for name in boards:
            (place / f"{name}.ts").unlink()
        return {line for line in done.stdout.splitlines() if not line.startswith(" ")}

    return said


def test_grafanas_types_take_every_board(check: Check) -> None:
    assert check({path.stem: path.read_text() for path in PLACE.glob("*.json")}) == set()


def test_they_refuse_what_is_wrong(check: Check) -> None:
    right = (PLACE / "routing.json").read_text()
    wrong = {}
    for index, (key, other) in enumerate(WRONG.items()):
        assert key in right
        wrong[f"wrong{index}"] = right.replace(key, other, 1)
    found = {line.split(".ts(")[0] for line in check(wrong)}
    assert found == set(wrong)
