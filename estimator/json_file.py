"""Small JSON files that one process replaces while others read them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def replace_json(place: Path, value: Any) -> None:
    """Replaces the file atomically, and waits until the disk has it."""
    temporary = place.with_name(f".{place.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, place)


def read_json(place: Path) -> Any:
    """The file's content. Raises FileNotFoundError, or ValueError: one sentence on why it can't be read."""
    try:
        return json.loads(place.read_bytes())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"can't read {place}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {error}") from None
