"""The path of the champion: the checkpoint that a refresh has to beat."""

from pathlib import Path

from depo_gateway.estimator import checkpoint


def champion_path(base: Path, out: Path) -> Path:
    """The checkpoint that `out/current` names, else the base."""
    return checkpoint.resolve(out) if (out / "current").exists() else base
