"""Embeddings go to the pool named."""

from depo_gateway.gateway.openai.embeddings import EMBEDDINGS
from depo_gateway.gateway.openai.query import query_of


def test_nothing_of_them_is_scored() -> None:
    assert query_of(EMBEDDINGS, {"model": "auto", "input": "text"}, b"").prompt is None
    error = EMBEDDINGS.unroutable(("small", "large"))
    assert (error.status, error.code, error.param) == (400, "model_not_routable", "model")
    assert "small, large" in error.message
