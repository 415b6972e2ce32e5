"""Pass rates of all prompts that a rule is given from outside."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from depo_gateway.estimator.arrays import Array
from depo_gateway.training.rewards.import_path import import_callable

# the rates by row; a function that returns them; or the import path of such a function, for YAML
PassRates = Sequence[float] | Callable[[], Sequence[float]] | str


def pass_rates_from(source: PassRates, size: int) -> Array:
    """The pass rates (P,) of a data set of `size` rows. Raises ValueError unless there is one in [0, 1] for each."""
    given = import_callable(source) if isinstance(source, str) else source
    rates_P = np.asarray(given() if callable(given) else given, dtype=np.float64)
    if rates_P.shape != (size,) or not ((rates_P >= 0) & (rates_P <= 1)).all():
        raise ValueError(f"pass_rates must be {size} numbers between 0 and 1, one a prompt of the data set")
    return rates_P
