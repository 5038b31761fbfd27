"""Which media a prompt may have: vLLM's `limit_mm_per_prompt`. Imports no vLLM."""

import os
from collections.abc import Mapping
from typing import Any

from vllm_proxy.config.errors import ProxyConfigError, unknown_key

LIMITS = "limit_mm_per_prompt"
_MODALITIES = ("image", "video", "audio")


def limits_problem(limits: Any, section: str = "") -> ProxyConfigError | None:
    """Return the error for limits that ask for more than images, or for nothing that is known.

    vLLM would ignore a modality that it does not know, and read text only.

    Args:
        limits: number of items in a prompt by modality, or a mapping with `count` for it.
        section: what precedes the argument's name where the user wrote it: `engine.`, or nothing.
    """
    field = section + LIMITS
    if limits is None:
        return None
    if not isinstance(limits, Mapping):
        return ProxyConfigError(field=field, value=limits, remedy="give a mapping: {image: 1}")
    for modality, limit in limits.items():
        if modality not in _MODALITIES:
            return unknown_key(f"{field}.{modality}", _MODALITIES)
        count = limit.get("count", 1) if isinstance(limit, Mapping) else limit
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            return ProxyConfigError(
                field=f"{field}.{modality}", value=count, remedy="give a number of items"
            )
        if count and modality != "image":
            return ProxyConfigError(
                "members read images only",
                field=f"{field}.{modality}",
                value=count,
                remedy="remove it",
            )
    return None


def images_problem(arguments: Mapping[str, Any], section: str = "") -> ProxyConfigError | None:
    """Return the error for other arguments with which no image could be read.

    Args:
        arguments: of an engine that allows images.
        section: what precedes their names where the user wrote them: `engine.`, or nothing.
    """
    if arguments.get("language_model_only"):
        field = f"{section}language_model_only"
        return ProxyConfigError(
            f"vLLM then allows none of the images of `{LIMITS}`",
            field=field,
            value=True,
            remedy="remove one of them",
        )
    path = arguments.get("allowed_local_media_path")
    if path and isinstance(path, str) and not os.path.isdir(path):
        field = f"{section}allowed_local_media_path"
        return ProxyConfigError("no such directory", field=field, value=path, remedy="correct it")
    return None


def no_media(field: str) -> ProxyConfigError:
    """Return the error for an image, or sound, in a request to an engine that reads text only."""
    return ProxyConfigError(
        "it has more than text, and this engine reads text only",
        field=field,
        remedy=f"send text, or allow images by `engine: {{{LIMITS}: {{image: 1}}}}`",
    )
