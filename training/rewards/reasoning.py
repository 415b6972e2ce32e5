"""Removes a completion's reasoning, which no verifier grades."""

import re

_NAMES = r"(?:seed:)?(?:think|thinking|thoughts?|reason|reasoning|analysis|reflection|scratchpad)"
_OPENING = re.compile(rf"<{_NAMES}>|◁think▷|<\|begin_of_thought\|>|\[THINK\]", re.IGNORECASE)
_CLOSING = re.compile(rf"</{_NAMES}>|◁/think▷|<\|end_of_thought\|>|\[/THINK\]", re.IGNORECASE)
# gpt-oss: the answer is the message of the channel `final`, whose marks a server may have removed.
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)(?:(?!<\|message\|>).){0,99}<\|message\|>")
_BARE_CHANNEL = re.compile(r"analysis(?=[A-Z\d\"'])")
_BARE_FINAL = re.compile(r"assistant\s?final(?=\W|[A-Z\d])")
_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|endoftext|>",
    "<|end|>",
    "<|return|>",
    "<|end_of_text|>",
    "</s>",
    "<end_of_turn>",
)


def final_text(completion: str) -> str | None:
    """What follows the reasoning, stripped; None if the reasoning is not finished: there is no answer.

    Reasoning ends at the last closing tag, whether or not an opening one is there: chat templates often write that.
    """
    text = completion.strip()
    while text.endswith(_ENDS):
        text = text[: text.rindex("<")].rstrip()
    channels = list(_CHANNEL.finditer(text)) if "<|channel|>" in text else []
    if channels:
        last = channels[-1]
        return text[last.end() :].strip() if last[1] == "final" else None
    if _BARE_CHANNEL.match(text):
        finals = list(_BARE_FINAL.finditer(text))
        return text[finals[-1].end() :].strip() if finals else None
    if not any(sign in text for sign in "<◁["):
        return text
    closings = list(_CLOSING.finditer(text))
    rest = text[closings[-1].end() :] if closings else text
    return None if _OPENING.search(rest) else rest.strip()
