"""What a request may write as `model`."""

import pytest

from depo_gateway.gateway.model_names import requested_threshold
from depo_gateway.gateway.openai.errors import ApiError

POOLS = ("small", "large")


@pytest.mark.parametrize(
    ("model", "threshold"),
    [("auto", None), ("auto-0.85", 0.85), ("auto-0", 0.0), ("auto-1", 1.0), ("auto-1.0", 1.0), ("auto-.5", 0.5)],
)
def test_a_threshold_for_one_call(model: str, threshold: float | None) -> None:
    assert requested_threshold(model, POOLS) == threshold


@pytest.mark.parametrize(
    "model",
    ["auto-", "auto-x", "auto-1.1", "auto--0.5", "auto-2", "auto-nan", "auto-1e-1", "auto-0.5 ", "auto-.", "auto-01",
     "auto-0.5.5", "auto-٠", "auto-0,5", "auto-+1", "auto-1_0"],
)  # fmt: skip
def test_what_is_no_threshold_is_no_model(model: str) -> None:
    with pytest.raises(ApiError, match="between 0 and 1") as caught:
        requested_threshold(model, POOLS)
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")


@pytest.mark.parametrize("model", ["gpt-7", "AUTO", "auto_0.5", "Small", " auto", "aut"])
def test_other_names_are_unknown(model: str) -> None:
    with pytest.raises(ApiError, match="this gateway has auto, small, large") as caught:
        requested_threshold(model, POOLS)
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")
