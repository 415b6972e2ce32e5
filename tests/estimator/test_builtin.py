"""The shipped checkpoint: small enough, whole, sensible, and a start for training."""

import pytest

from depo_gateway.estimator import checkpoint, model
from depo_gateway.estimator.runtime import Runtime


@pytest.fixture(scope="module")
def builtin() -> Runtime:
    return Runtime.load(checkpoint.resolve("builtin"))


def test_it_fits_in_25_megabytes() -> None:
    assert sum(path.stat().st_size for path in checkpoint.BUILTIN.iterdir()) <= 25_000_000


def test_it_routes_between_two_pools_by_either_rule(builtin: Runtime) -> None:
    assert builtin.pools == ("small", "large")
    for rule in ("gain", "difficulty"):
        low, high = (builtin.calibration.threshold(rule, large_share=share) for share in (0.2, 0.6))
        assert 0.0 < low < high <= 1.0
        assert builtin.calibration.large_share(rule, low) == pytest.approx(0.2, abs=0.03)


def test_a_competition_problem_is_harder_than_a_sum(builtin: Runtime) -> None:
    easy = "Tom has 3 apples and buys 4 more. How many apples does he have?"
    hard = (
        "Let $P(x)$ be a monic polynomial of degree 7 whose roots are the vertices of a regular heptagon in the complex"
        " plane. Compute the number of ordered triples $(a, b, c)$ with $0 \\le a < b < c \\le 100$ such that $P(a)$"
        " divides $\\binom{b}{c}$."
    )
    for stage in (builtin.score, builtin.cheap):
        sure, unsure = stage([builtin.prepare(easy), builtin.prepare(hard)])
        assert sure.quality[0] > unsure.quality[0]
        assert unsure.quality[1] > unsure.quality[0]


def test_its_card_says_what_its_manifest_says(builtin: Runtime) -> None:
    card = (checkpoint.BUILTIN / "README.md").read_text()
    assert builtin.version in card
    for report in builtin.manifest.metrics["held_out"].values():
        assert f"{report['apgr']['gain (full)']['apgr']:.3f}" in card
    for models in builtin.manifest.metrics["models"].values():
        assert all(name in card for name in models)


def test_it_can_be_trained_further(builtin: Runtime) -> None:
    loaded, _, manifest = model.load_model(checkpoint.resolve("builtin"))
    assert manifest.version == builtin.version
    assert loaded.deep_weight.abs().sum() > 0
