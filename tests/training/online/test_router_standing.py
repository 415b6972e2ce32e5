"""The standing of the served router on recent labels."""

import numpy as np

from depo_gateway.training.online.router_standing import standing_of


def prompts(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(true qualities (N, 2), labels drawn from them): half the prompts are hard for the small pool."""
    generator = np.random.default_rng(seed)
    small = generator.uniform(0.05, 0.95, count)
    truth = np.stack([small, 0.5 + 0.45 * generator.uniform(size=count)], 1)
    return truth, (generator.uniform(size=truth.shape) < truth).astype(float)


def test_a_standing_needs_evidence_to_say_no() -> None:
    truth, observed = prompts(400)
    good = standing_of("v", 1.0, truth, observed, None, 0.3)
    assert good is not None
    assert good.beats_random
    assert (good.version, good.labels, good.large_share) == ("v", 300, 0.3)
    assert good.low < good.advantage < good.high
    backwards = truth[:, ::-1]
    bad = standing_of("v", 1.0, backwards, observed, None, 0.3)
    assert bad is not None
    assert not bad.beats_random
    few = standing_of("v", 1.0, backwards[:60], observed[:60], None, 0.3)
    assert few is not None
    assert few.beats_random  # 60 labels prove nothing
    assert standing_of("v", 1.0, truth, np.full(truth.shape, np.nan), None, 0.3) is None
