"""What a request may write as `model`: a pool's name, its model's id, `auto`, or `auto-0.85`."""

import re
from collections.abc import Iterable, Mapping

from depo_gateway.gateway.config import PoolConfig
from depo_gateway.gateway.openai.errors import ApiError

AUTO = "auto"


def served_names(pools: Mapping[str, PoolConfig]) -> dict[str, str]:
    """The pool that each name refers to: a pool's name, or its model's id."""
    return {name: name for name in pools} | {pool.model: name for name, pool in pools.items()}


def requested_threshold(model: str, pools: Iterable[str]) -> float | None:
    """The threshold in `auto-0.85`; None for `auto`.

    Raises:
        ApiError: 404 for any other name, and for `auto-` without a number between 0 and 1.
    """
    if model == AUTO:
        return None
    prefix, number = model[: len(AUTO) + 1], model[len(AUTO) + 1 :]
    if prefix != AUTO + "-":
        known = ", ".join((AUTO, *pools))
        raise unknown_model(f"The model {model!r} does not exist; this gateway has {known} (GET /v1/models).")
    if not re.fullmatch(r"[01]|[01]?\.[0-9]+", number) or float(number) > 1:
        remedy = "a threshold is a number between 0 and 1, as in auto-0.85"
        raise unknown_model(f"The model {model!r} does not exist: {remedy}.")
    return float(number)


def unknown_model(message: str) -> ApiError:
    return ApiError(404, message, "model_not_found", "model")
