"""The threshold that a config asks for under a checkpoint. Pure."""

from depo_gateway.estimator.calibration import Curve
from depo_gateway.estimator.runtime import Runtime
from depo_gateway.gateway.config import Config, last_pool
from depo_gateway.gateway.threshold_controller import ThresholdController


def curve_of(runtime: Runtime, config: Config) -> Curve | None:
    """The calibration's curve for the config's rule; None where it has none or was measured with other pools."""
    pools, known = tuple(config.pools), runtime.pools
    by_order = len(known) == len(pools) and not set(known) >= set(pools)
    fits = len(known) == 1 or known == pools or by_order
    return runtime.calibration.curves.get(config.routing.rule) if fits else None


def fixed_threshold(config: Config, runtime: Runtime) -> float:
    """The constant threshold under this checkpoint; under a target of share or cost, the initial one.

    Raises:
        ValueError: one sentence: the checkpoint's calibration has no threshold for the quality target.
    """
    routing = config.routing
    if routing.target is None:
        return routing.threshold
    if routing.target.quality is None:
        return calibrated_threshold(config, runtime) or routing.threshold
    refusal = f"routing.target.quality can't be kept with the estimator {runtime.version}: "
    if curve_of(runtime, config) is None:
        known = ", ".join(runtime.pools)
        raise ValueError(
            f"{refusal}its calibration has no curve for the rule {routing.rule} and the pools "
            f"{', '.join(config.pools)} (it has {', '.join(runtime.calibration.curves) or 'none'} for {known}); "
            "make one with depo-train calibrate"
        )
    try:
        return runtime.calibration.threshold(routing.rule, quality=routing.target.quality)
    except ValueError as error:
        raise ValueError(f"{refusal}{error}") from None


def calibrated_threshold(config: Config, runtime: Runtime) -> float | None:
    """The target's threshold by this checkpoint's own calibration; None without a target, or without a curve.

    Raises:
        ValueError: see `fixed_threshold`.
    """
    target = config.routing.target
    if target is None:
        return None
    if target.quality is not None:
        return fixed_threshold(config, runtime)
    if curve_of(runtime, config) is None:
        return None
    return runtime.calibration.threshold(config.routing.rule, large_share=_initial_share(config))


def controller_of(config: Config, curve: Curve | None) -> ThresholdController | None:
    """A new controller for a target of share or cost; None where the threshold is constant."""
    target = config.routing.target
    if target is None or target.quality is not None:
        return None
    wanted = target.cost if target.cost is not None else target.large_share
    assert wanted is not None
    return ThresholdController(wanted, _initial_share(config), curve)


def spent_in(config: Config, pool: str) -> float:
    """With a cost target the pool's price relative to the last pool's; otherwise 1 for the last pool, 0 for others."""
    pools, target, last = config.pools, config.routing.target, last_pool(config.pools)
    if target is not None and target.cost is not None and pool in pools:  # a reload may have removed it
        return pools[pool].cost / pools[last].cost
    return float(pool == last)


def _initial_share(config: Config) -> float:
    """The last pool's share that meets the target if everything else goes to the cheapest."""
    target = config.routing.target
    assert target is not None
    if target.cost is None:
        return target.large_share or 0.0
    prices = [pool.cost for pool in config.pools.values()]
    least = prices[0] / prices[-1]
    return 1.0 if least >= 1.0 else (target.cost - least) / (1.0 - least)
