"""POST /v1/chat/completions: https://platform.openai.com/docs/api-reference/chat."""

from depo_gateway.gateway.openai.api import Api, Fields, Messages
from depo_gateway.gateway.openai.choices import first_choice
from depo_gateway.gateway.openai.errors import ApiError
from depo_gateway.gateway.openai.media import media_of_content


def messages_field(fields: Fields) -> Messages:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(item, dict) for item in messages):
        raise ApiError(400, "'messages' must be a non-empty list of objects.", "invalid_messages", "messages")
    return messages


def chat_modalities(fields: Fields) -> frozenset[str]:
    """Tools, and the media in the messages' parts."""
    found = {"tools"} if fields.get("tools") or fields.get("functions") else set()
    for message in fields["messages"]:  # a list of objects, or messages_field would have refused it
        found |= media_of_content(message.get("content"))
    return frozenset(found)


CHAT = Api(
    "chat",
    "/v1/chat/completions",
    prompt=messages_field,
    prompt_field="messages",
    modalities=chat_modalities,
    usage_on_request=True,
    answer_piece=first_choice,
)
