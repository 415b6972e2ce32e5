"""The small checkpoints that the tests serve from load as the gateway loads them."""

from pathlib import Path

from depo_gateway.gateway import scoring


def test_the_small_checkpoints_load(
    tiny_encoder: Path, tiny_checkpoint: Path, tiny_policy_checkpoint: Path, slow_checkpoint: Path
) -> None:
    assert (tiny_encoder / "model.safetensors").exists()
    for place in (tiny_checkpoint, slow_checkpoint):
        assert scoring.load_runtime(str(place), ("small", "large"), "gain")[1] == {"small": 0, "large": 1}
    assert scoring.load_runtime(str(tiny_policy_checkpoint), ("small", "large"), "difficulty")[1] == {"small": 0}
