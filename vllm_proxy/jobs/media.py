"""Images in the rows of a job: which parts of a message are allowed, and where files are."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


def is_content(content: Any) -> bool:
    """Whether the content of a message is text, or a list of texts and images."""
    if isinstance(content, list):
        return all(_is_text(part) or _url(part) is not None for part in content)
    return isinstance(content, str | None)


def has_images(messages: Sequence[Any] | None) -> bool:
    """Whether a conversation has an image."""
    return any(_url(part) is not None for message in messages or () for part in _parts(message))


def with_file_urls(messages: Sequence[Any], directory: str) -> list[Any]:
    """Return a conversation whose images that are files have `file:` URLs.

    Args:
        messages: as in a row; what is no message is returned as it is.
        directory: where relative paths begin.
    """
    return [
        {**message, "content": [_located(part, directory) for part in _parts(message)]}
        if _parts(message)
        else message
        for message in messages
    ]


def _parts(message: Any) -> list[Any]:
    content = message.get("content") if isinstance(message, Mapping) else None
    return content if isinstance(content, list) else []


def _is_text(part: Any) -> bool:
    is_text = isinstance(part, Mapping) and part.get("type") == "text"
    return is_text and isinstance(part.get("text"), str)


def _url(part: Any) -> str | None:
    """Return the URL of a part that is an image; None for others."""
    if not isinstance(part, Mapping) or part.get("type") != "image_url":
        return None
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, Mapping) else None
    return url if isinstance(url, str) else None


def _located(part: Any, directory: str) -> Any:
    url = _url(part)
    if url is None or _has_scheme(url):
        return part
    return {**part, "image_url": {**part["image_url"], "url": Path(directory, url).as_uri()}}


def _has_scheme(url: str) -> bool:
    try:
        return bool(urlsplit(url[:1000]).scheme)
    except ValueError:  # vLLM reports it
        return True
