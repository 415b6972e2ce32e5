"""POST /v1/completions: https://platform.openai.com/docs/api-reference/completions."""

from collections.abc import Sequence

from depo_gateway.gateway.openai.api import Api, Fields
from depo_gateway.gateway.openai.choices import first_choice
from depo_gateway.gateway.openai.errors import ApiError


def prompt_text(fields: Fields) -> str | None:
    """The text of `prompt`: a string, or strings. Prompts of token ids have none: the ids are one model's own."""
    prompt = fields.get("prompt")
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt and all(isinstance(item, str) for item in prompt):
        return "\n".join(prompt)
    return None


def no_prompt_text(_: Sequence[str]) -> ApiError:
    message = "Only a 'prompt' of text can be routed; for token ids name a pool as 'model'."
    return ApiError(400, message, "prompt_not_routable", "prompt")


COMPLETIONS = Api(
    "completions",
    "/v1/completions",
    prompt=prompt_text,
    prompt_field="prompt",
    unroutable=no_prompt_text,
    usage_on_request=True,
    answer_piece=first_choice,
)
