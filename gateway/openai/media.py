"""The media in a message's content: images and audio, which some pools do not accept."""

from typing import Any

MEDIA = frozenset(("image", "audio"))


def media_of_content(content: Any) -> frozenset[str]:
    """The media that the types of content parts name (`image_url`, `input_audio`); none where content is text."""
    found: set[str] = set()
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            found.update(medium for medium in MEDIA if medium in kind)
    return frozenset(found)
