"""Forms that answers can be constrained to, and checks that an answer has its form."""

import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import jsonschema

# No `maxLength`: xgrammar (0.2) then lets raw control characters through, which JSON forbids.
SCHEMA = {
    "type": "object",
    "properties": {
        "place": {"type": "string", "pattern": "^[A-Za-z ]{1,24}$"},
        "kind": {"enum": ["capital", "currency", "continent"]},
        "known": {"type": "boolean"},
        "tags": {"type": "array", "items": {"enum": ["small", "old", "hot"]}, "maxItems": 2},
    },
    "required": ["place", "kind", "known", "tags"],
    "additionalProperties": False,
}
TOOL = {"name": "look_up", "parameters": SCHEMA, "strict": True}
REGEX = r"(19|20)\d\d-(0[1-9]|1[0-2])-([0-2]\d|3[01])"
GRAMMAR = """\
root ::= term sign term
term ::= [0-9] | "(" [0-9] sign [0-9] ")"
sign ::= "+" | "-"
"""
SUM = re.compile(r"(\d|\(\d[+-]\d\))[+-](\d|\(\d[+-]\d\))")
"""What `GRAMMAR` stands for."""
CHOICES = ["Africa", "Asia", "Europe", "North America", "Oceania", "South America"]
OWN: dict[str, dict[str, Any]] = {
    "alpha 1": {},
    "alpha 4": {"proxy_alpha": 4.0},
    "alpha -2": {"proxy_alpha": -2.0},
    "adaptive": {"proxy_alpha": "adaptive"},
    "weights": {"proxy_weights": [0.5, 1.5, -1.0]},
    "top_p": {"proxy_top_p": 0.5},
    "plausibility": {"proxy_plausibility": 0.5},
    "own prompts": {
        "proxy_expert_prompt": "Question: What is the capital of Spain?\nAnswer:",
        "proxy_antiexpert_prompt": "A",
    },
}
"""What is asked of the proxy in addition."""


def is_json(text: str, schema: dict[str, Any] = SCHEMA) -> bool:
    """Whether *text* is JSON of the schema."""
    try:
        jsonschema.validate(json.loads(text), schema)
    except (TypeError, ValueError, jsonschema.ValidationError):
        return False
    return True


def is_call(calls: list[dict[str, Any]]) -> bool:
    """Whether these are calls of `TOOL`."""
    own = [call["function"] for call in calls or ()]
    return bool(own) and all(c["name"] == "look_up" and is_json(c["arguments"]) for c in own)


def constrained(**form: object) -> dict[str, Any]:
    """Return fields of a body."""
    return {"structured_outputs": form}


FORMAT = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}
FORMS: dict[str, tuple[str, dict[str, Any], Callable[[Any], bool]]] = {
    "chat schema": ("chat/completions", {"response_format": FORMAT}, is_json),
    "chat tools": (
        "chat/completions",
        {"tools": [{"type": "function", "function": TOOL}], "tool_choice": "required"},
        is_call,
    ),
    "schema": ("completions", {"response_format": FORMAT}, is_json),
    "json": ("completions", constrained(json=SCHEMA), is_json),
    "regex": (
        "completions",
        constrained(regex=REGEX),
        re.compile(REGEX).fullmatch,
    ),
    "grammar": ("completions", constrained(grammar=GRAMMAR), SUM.fullmatch),
    "choice": ("completions", constrained(choice=CHOICES), CHOICES.__contains__),
}
"""By name: endpoint, fields of the body, and what tells whether an answer is of the form."""


async def outcome(
    http: httpx.AsyncClient, form: str, question: str, settings: dict[str, Any]
) -> str:
    """Return what became of a question: `right`, `wrong`, `cut` (by its length) or an error."""
    path, fields, is_right = FORMS[form]
    is_chat = path.startswith("chat")
    messages = [{"role": "user", "content": question}]
    asked = {"messages": messages} if is_chat else {"prompt": question}
    answer = await http.post(f"/v1/{path}", json=asked | fields | settings)
    if answer.status_code != 200:
        return f"HTTP {answer.status_code}: {answer.text[:200]}"
    (choice,) = answer.json()["choices"]
    if choice["finish_reason"] == "length":
        return "cut"
    if not is_chat:
        given = choice["text"]
    else:
        given = choice["message"]["tool_calls" if "tools" in fields else "content"]
    return "right" if is_right(given) else f"wrong: {given!r}"
