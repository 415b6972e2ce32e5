"""`choices`, in which OpenAI's chat and completions give their answers."""

from typing import Any

from depo_gateway.estimator.text import text_of_content
from depo_gateway.gateway.openai.api import AnswerPiece


def first_choice(answer: Any, streamed: bool) -> AnswerPiece | None:
    """The choice with index 0: a chat's `message` or `delta`, a completion's `text`. None where there is none."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    for choice in choices if isinstance(choices, list) else ():
        if not isinstance(choice, dict) or choice.get("index", 0) != 0:
            continue
        message, reason = choice.get("delta" if streamed else "message"), choice.get("finish_reason")
        finish_reason = reason if isinstance(reason, str) else ""
        if isinstance(message, dict):
            calls = call_ids(message) if "tool_calls" in message else ""
            return AnswerPiece(text_of_content(message.get("content")), finish_reason, calls)
        text = choice.get("text")
        return AnswerPiece(text if isinstance(text, str) else "", finish_reason)
    return None


def call_ids(message: dict[str, Any]) -> str:
    """The ids of the tool calls in a message, or in a stream's piece of one, which names each id once."""
    calls = message.get("tool_calls")
    ids = [call.get("id") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    return "".join(f"{name}," for name in ids if isinstance(name, str) and name)
