"""`python -m dashboards` writes helm/dashboards/*.json; with `--check` it names outdated files and exits with 1."""

import argparse
import json
import sys
from pathlib import Path

from dashboards import backends, learning, routing, serving, training_run

PLACE = Path(__file__).parent.parent / "helm/dashboards"
BOARDS = {
    "routing": routing.BOARD,
    "serving": serving.BOARD,
    "learning": learning.BOARD,
    "backends": backends.BOARD,
    "training-run": training_run.BOARD,
}


def main(words: list[str] | None = None) -> int:
    """Exit code 0: written, or all up to date."""
    parser = argparse.ArgumentParser(prog="python -m dashboards", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is outdated")
    check = parser.parse_args(words).check
    stale = []
    for name, board in BOARDS.items():
        path, text = PLACE / f"{name}.json", json.dumps(board, indent=1, ensure_ascii=False) + "\n"
        if check and not (path.exists() and path.read_text(encoding="utf-8") == text):
            stale.append(path)
        elif not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    for path in stale:
        print(f"{path} is outdated: run python -m dashboards")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
