"""POST /v1/chat/completions: https://platform.openai.com/docs/api-reference/chat."""

from depo_gateway.gateway.openai.api import Api, Fields, Messages
from depo_gateway.gateway.openai.choices import first_choice
from depo_gateway.gateway.openai.errors import ApiError


def messages_field(fields: Fields) -> Messages:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(item, dict) for item in messages):
        raise ApiError(400, "'messages' must be a non-empty list of objects.", "invalid_messages", "messages")
    return messages


def chat_modalities(fields: Fields) -> frozenset[str]:
    """Tools, and the media in the messages' parts."""
    found = {"tools"} if fields.get("tools") or fields.get("functions") else set()
    for message in fields["messages"]:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                found.update(modality for modality in ("image", "audio") if modality in kind)
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
