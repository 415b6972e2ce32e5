"""New versions of a checkpoint: the same with another calibration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from depo_gateway.estimator import calibration, checkpoint
from depo_gateway.estimator.calibration import Calibration, Curve, Platt


def version(
    tiny: Path,
    place: Path,
    offset: float,
    curves: Mapping[str, Curve] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> str:
    """Writes one whose small pool is `offset` (in logits) better than `tiny` says; returns its name."""
    files = {name: (tiny / name).read_bytes() for name in checkpoint.FILES}
    shifted = {"quality": (Platt(1.0, offset), Platt(1.0, 9.0)), "token_confidence": (Platt(), Platt())}
    pools = ("small", "large")
    stages = {"full": shifted, "cheap": shifted}
    files[checkpoint.CALIBRATION] = calibration.dumps(Calibration(pools, stages, curves or {}, {}))
    manifest = checkpoint.load_manifest(tiny)
    return checkpoint.write_checkpoint(place, files, manifest.base, pools, manifest.text, metrics or {}).version
