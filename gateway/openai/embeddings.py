"""POST /v1/embeddings: https://platform.openai.com/docs/api-reference/embeddings. Sent to the pool named."""

from collections.abc import Sequence

from depo_gateway.gateway.openai.api import Api, Fields
from depo_gateway.gateway.openai.errors import ApiError


def no_prompt(_: Fields) -> None:
    return None


def embeddings_not_routed(pools: Sequence[str]) -> ApiError:
    message = f"Embeddings are not routed; name a pool as 'model': {', '.join(pools)}."
    return ApiError(400, message, "model_not_routable", "model")


EMBEDDINGS = Api("embeddings", "/v1/embeddings", prompt=no_prompt, unroutable=embeddings_not_routed)
