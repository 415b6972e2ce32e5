"""What pools are sent, and how their queues are read. test_shadowing.py has the client against servers."""

from typing import Any

import pytest

from depo_gateway.training.judging.pool_client import pool_request, waiting_in


def test_waiting_requests_are_summed_over_engines_and_absent_ones_are_none() -> None:
    text = (
        "# TYPE vllm:num_requests_waiting gauge\n"
        'vllm:num_requests_waiting{engine="0",model_name="m"} 3.0\nvllm:num_requests_waiting{engine="1"} 2e0\n'
        'vllm:num_requests_waiting_by_reason{reason="x"} 9.0\nvllm:num_requests_running 7.0\n'
    )
    assert waiting_in(text) == 5.0
    assert waiting_in("llamacpp:requests_deferred 4\n") == 0.0


@pytest.mark.parametrize(
    ("parameters", "wanted"),
    [
        ({}, {"max_tokens": 100}),
        ({"max_tokens": 7}, {"max_tokens": 7}),
        ({"max_completion_tokens": 700}, {"max_completion_tokens": 100}),
        ({"max_completion_tokens": 70, "max_tokens": 5000}, {"max_completion_tokens": 70}),
        ({"max_completion_tokens": None, "max_tokens": 80}, {"max_tokens": 80}),
    ],
)
def test_the_client_s_limit_is_bounded_by_ours(parameters: dict[str, Any], wanted: dict[str, int]) -> None:
    body = pool_request("x", parameters, "m", None, 100)
    assert {name: body[name] for name in body if name.startswith("max_")} == wanted
    assert "priority" not in body
