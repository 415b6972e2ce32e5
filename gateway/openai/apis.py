"""The table of endpoints that serve models."""

from collections.abc import Mapping

from depo_gateway.gateway.openai.api import Api, Fields
from depo_gateway.gateway.openai.chat import CHAT
from depo_gateway.gateway.openai.completions import COMPLETIONS
from depo_gateway.gateway.openai.embeddings import EMBEDDINGS

Apis = Mapping[str, Api]  # by path


def by_path(*apis: Api) -> dict[str, Api]:
    return {api.path: api for api in apis}


APIS: Apis = by_path(
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
)


def api_of_body(apis: Apis, fields: Fields) -> Api:
    """The endpoint of a body that comes without a path: the first whose `prompt_field` is in it, else completions."""
    return next((api for api in apis.values() if api.prompt_field in fields), COMPLETIONS)
