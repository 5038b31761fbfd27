"""Rows in, records out: the JSON lines of a batch job, without the engine that answers them."""

import json
import math
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, ValidationError

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.request import RequestControl, TextOrIds
from vllm_proxy.config.validation import validation_error

PROMPT_FIELDS = ("prompt", "messages", "prompt_token_ids")
_MOST_DEPTH = 200
"""How deep the lists and objects of a row may be nested: pydantic's parser takes no more."""
CHAT_FIELDS = ("chat_template_kwargs", "continue_final_message", "add_generation_prompt")
"""Fields that only rows with `messages` have."""


def _checked_message(message: dict[str, Any]) -> dict[str, Any]:
    # vLLM would fetch an image before it finds that the model reads none.
    if not isinstance(message.get("role"), str):
        raise ValueError('a message needs a role: {"role": "user", "content": …}')
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    if not isinstance(content, str | list | None) or not all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in parts
    ):
        raise ValueError('content is a string, or a list of {"type": "text", "text": …}')
    return message


def is_json(value: Any) -> bool:
    """Return whether JSON, which has no NaN and no Infinity, can say a value that Python parsed.

    What is nested deeper than a row may be is refused as well: Python's own encoder and decoder end
    somewhere, depending on who calls them.
    """
    level = [value]
    for _ in range(_MOST_DEPTH + 1):
        if not all(math.isfinite(each) for each in level if isinstance(each, float)):
            return False
        level = [child for each in level for child in _children(each)]
        if not level:
            return True
    return False


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _repeatable(id_: Any) -> Any:
    if not is_json(id_):
        raise ValueError("JSON has no NaN and no Infinity; give text, a finite number or null")
    return id_


class PromptRow(RequestControl):
    """One line of the input: exactly one of the prompts, which is not empty.

    What it does not say of strength, filters and members' prompts is as in the configuration.

    Attributes:
        prompt: text, tokenized by the base's tokenizer.
        messages: a conversation, as `LLM.chat` takes it.
        prompt_token_ids: a prompt that is tokenized already.
        chat_template_kwargs: variables of chat templates, for `messages`.
        continue_final_message: whether the last of `messages` is continued instead of answered.
        add_generation_prompt: whether chat templates begin an answer; by default, unless the last
            message is continued.
        id: any JSON; repeated in the row's record.
        sampling: fields of `vllm.SamplingParams` for this row alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: str | None = None
    messages: list[Annotated[dict[str, Any], AfterValidator(_checked_message)]] | None = None
    prompt_token_ids: list[int] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    id: Annotated[Any, AfterValidator(_repeatable)] = None
    sampling: dict[str, Any] | None = None

    @property
    def kind(self) -> str:
        """The name of the prompt field that the row has."""
        return next(name for name in PROMPT_FIELDS if getattr(self, name) is not None)

    @property
    def chat_options(self) -> dict[str, Any]:
        """The arguments of `LLM.chat` that the row gives for its `messages`."""
        options = {name: getattr(self, name) for name in CHAT_FIELDS}
        options = {name: value for name, value in options.items() if value is not None}
        if self.continue_final_message:
            options.setdefault("add_generation_prompt", False)
        return options


class InspectedRow(PromptRow):
    """One line of the input of `inspect`.

    Attributes:
        completion: an answer to inspect instead of a generated one: text or token ids.
    """

    completion: TextOrIds | None = None


def parse_row(
    line: bytes, *, text: bool = False, row_type: type[PromptRow] = PromptRow
) -> PromptRow:
    """Read one line of the input: a JSON object or, with *text*, the prompt itself.

    Raises:
        ProxyConfigError: what is wrong with the row, in one line.
    """
    line = line.rstrip(b"\r\n")
    if not line.strip():
        raise ProxyConfigError("the row is empty; write a prompt, or remove the line")
    if text:
        try:
            return row_type(prompt=line.decode())
        except UnicodeDecodeError as error:
            raise ProxyConfigError(f"the row is not UTF-8 text: {error.reason}") from None
    try:
        row = row_type.model_validate_json(line)
    except ValidationError as error:
        raise ProxyConfigError(_one_line(error, row_type)) from None
    given = [name for name in PROMPT_FIELDS if getattr(row, name) is not None]
    if len(given) != 1:
        has = " and ".join(f"`{name}`" for name in given) or "no prompt"
        raise ProxyConfigError(
            f"the row has {has}; give exactly one of `prompt`, `messages`, `prompt_token_ids`"
        )
    for name in CHAT_FIELDS if given[0] != "messages" else ():
        if getattr(row, name) is not None:
            raise ProxyConfigError(f"`{name}`: only rows with `messages` have it; remove it")
    if not getattr(row, given[0]):
        raise ProxyConfigError(f"`{given[0]}` is empty; give at least one token")
    return row


def row_id(line: bytes, key: str = "id") -> Any:
    """Return the id, under *key*, of a line that is no valid row; None if no record can have it."""
    try:
        found = json.loads(line).get(key)
    except (ValueError, AttributeError, RecursionError):
        return None
    return found if is_json(found) else None


def _one_line(error: ValidationError, row_type: type[PromptRow]) -> str:
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid" and "recursion limit" in first["msg"]:
        return f"the row is nested more than {_MOST_DEPTH} deep; give what is nested as text"
    if not first["loc"] and first["type"] != "value_error":
        return f'the row is not a JSON object ({first["msg"]}); write {{"prompt": …}}'
    return str(validation_error(row_type, error))
