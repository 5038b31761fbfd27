"""Secrets (tokens, keys, passwords), which are neither written to files nor shown."""

import json
import re
from collections.abc import Sequence
from typing import Any

HIDDEN = "***"
_SECRET = re.compile(
    r"(hf|hub|auth|access|bearer|session)_?token|api_?key|access_?key|password|passphrase|secret|"
    r"credential",
    re.IGNORECASE,
)


def is_secret(name: str) -> bool:
    """Whether the value of a key or an option with this name is a secret."""
    return bool(_SECRET.search(name.replace("-", "_")))


def without_secrets(value: Any) -> Any:
    """Return *value* without the secrets in its mappings, at any depth.

    A boolean is not a secret: `hf_token: true` means the token stored on the machine.
    """
    if isinstance(value, dict):
        return {
            key: without_secrets(inner)
            for key, inner in value.items()
            if not is_secret(str(key)) or isinstance(inner, bool | None)
        }
    return list(map(without_secrets, value)) if isinstance(value, list | tuple) else value


def shown_argument(name: str, value: Any) -> str:
    """Return the value of the key *name* as a message shows it."""
    if is_secret(name) and not isinstance(value, bool | None):
        return HIDDEN
    return repr(without_secrets(value))


def shown_words(words: Sequence[str]) -> list[str]:
    """Return the words of a command with `***` instead of secret values of options."""
    result, hide = [], False
    for word in words:
        if word.startswith("-"):
            name, _, value = word.partition("=")
            hide = is_secret(name)
            result.append(f"{name}={HIDDEN}" if hide and value else word)
        else:
            result.append(HIDDEN if hide else _shown_json(word))
    return result


def _shown_json(word: str) -> str:
    if not is_secret(word):
        return word
    try:
        value = json.loads(word)
    except (ValueError, RecursionError):
        return word
    return json.dumps(without_secrets(value)) if isinstance(value, dict | list) else word
