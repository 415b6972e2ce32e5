"""learner.json: what the last refresh of the daemon read, so that a restart does not repeat it."""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from depo_gateway.training.online import checkpoint_retention

STATE_FILE = "learner.json"


@dataclass(frozen=True, slots=True)
class DaemonState:
    """The last refresh. If the file is lost, one refresh is repeated."""

    seq: int = 0  # the highest label that it read
    time: float = 0.0  # Unix seconds


def read_state(out: Path) -> DaemonState:
    """The state on disk; the default where the file is absent or can't be read."""
    try:
        raw = json.loads((out / STATE_FILE).read_text(encoding="utf-8"))
        return DaemonState(int(raw["seq"]), float(raw["time"]))
    except (OSError, ValueError, KeyError, TypeError):
        return DaemonState()


def write_state(out: Path, state: DaemonState) -> None:
    """Writes a temporary file, then renames it."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=out, prefix=f".{checkpoint_retention.OWN_PREFIX}", delete=False
    ) as file:
        file.write(json.dumps({"seq": state.seq, "time": state.time}) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, out / STATE_FILE)
