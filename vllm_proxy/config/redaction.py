"""Values that are neither written nor shown: tokens, keys, passwords."""

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
    """Return whether a key or an option of this name has a secret as its value."""
    return bool(_SECRET.search(name.replace("-", "_")))


def without_secrets(value: Any) -> Any:
    """Return *value* without the entries of its mappings, however deep, that are secrets.

    What is only on or off is none: `hf_token: true` asks for the token that the machine has.
    """
    if isinstance(value, dict):
        return {
            key: without_secrets(inner)
            for key, inner in value.items()
            if not is_secret(str(key)) or isinstance(inner, bool | None)
        }
    return list(map(without_secrets, value)) if isinstance(value, list | tuple) else value


def shown_argument(name: str, value: Any) -> str:
    """Return how a message shows the value of the key *name*."""
    if is_secret(name) and not isinstance(value, bool | None):
        return HIDDEN
    return repr(without_secrets(value))


def shown_words(words: Sequence[str]) -> list[str]:
    """Return the words of a command with `***` for the values of options that are secrets."""
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
