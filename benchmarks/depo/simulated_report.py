"""The simulated benchmark's tables, plot and reading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def report(results: Mapping[str, Sequence[Row]], titles: Mapping[str, str], path: Path) -> None:
    """Write the Markdown file `path`, and a plot of the same name beside it."""
