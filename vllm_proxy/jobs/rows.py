"""Rows of a batch job: one line of JSON each, checked before an engine sees them."""

import json
import math
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, ValidationError

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.request import RequestControl, TextOrIds
from vllm_proxy.config.validation import validation_error
from vllm_proxy.jobs.media import is_content

PROMPT_FIELDS = ("prompt", "messages", "prompt_token_ids")
_MOST_DEPTH = 200
"""The most levels of lists and objects in a row: the limit of pydantic's parser."""
CHAT_FIELDS = ("chat_template_kwargs", "continue_final_message", "add_generation_prompt")
"""Fields that are allowed only in rows with `messages`."""


def _checked_message(message: dict[str, Any]) -> dict[str, Any]:
    # vLLM would fetch a video before it notices that the model does not read videos.
    if not isinstance(message.get("role"), str):
        raise ValueError('a message needs a role: {"role": "user", "content": …}')
    if not is_content(message.get("content")):
        raise ValueError(
            'content is a string, or a list of {"type": "text", "text": …} and '
            '{"type": "image_url", "image_url": {"url": …}}'
        )
    return message


def is_json(value: Any) -> bool:
    """Return whether a value that Python has parsed is valid JSON: without NaN and Infinity.

    A value with more levels than a row may have is not: the limits of Python's own encoder and
    decoder depend on the depth of the call stack.
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


def _checked_id(id_: Any) -> Any:
    if not is_json(id_):
        raise ValueError("JSON has no NaN and no Infinity; give text, a finite number or null")
    return id_


class PromptRow(RequestControl):
    """One line of the input, with exactly one prompt field, which is not empty.

    The configuration's strength, filters and members' prompts apply unless the row sets them.

    Attributes:
        prompt: text, tokenized by the base's tokenizer.
        messages: a conversation, as for `LLM.chat`: texts, and images by URL or path.
        prompt_token_ids: a prompt that is already tokenized.
        chat_template_kwargs: variables of chat templates, for `messages`.
        continue_final_message: continue the last of `messages` instead of answering it.
        add_generation_prompt: whether chat templates begin an answer; true by default, unless the
            last message is continued.
        id: any JSON value; repeated in the row's record.
        sampling: fields of `vllm.SamplingParams` for this row only.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: str | None = None
    messages: list[Annotated[dict[str, Any], AfterValidator(_checked_message)]] | None = None
    prompt_token_ids: list[int] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    id: Annotated[Any, AfterValidator(_checked_id)] = None
    sampling: dict[str, Any] | None = None

    @property
    def kind(self) -> str:
        """The name of the row's prompt field."""
        return next(name for name in PROMPT_FIELDS if getattr(self, name) is not None)

    @property
    def chat_options(self) -> dict[str, Any]:
        """The row's arguments of `LLM.chat` for its `messages`."""
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
    """Read one line of the input.

    Args:
        line: a JSON object, or a prompt.
        text: the line is a prompt.
        row_type: the model that validates the JSON object.

    Raises:
        ProxyConfigError: the row is invalid.
    """
    line = line.rstrip(b"\r\n")
    if not line.strip():
        raise ProxyConfigError("the row is empty", remedy="write a prompt, or remove the line")
    if text:
        try:
            return row_type(prompt=line.decode())
        except UnicodeDecodeError as error:
            problem = f"the row is not UTF-8 text ({error.reason})"
            raise ProxyConfigError(problem, remedy="save the file as UTF-8") from None
    try:
        row = row_type.model_validate_json(line)
    except ValidationError as error:
        raise _row_error(error, row_type) from None
    given = [name for name in PROMPT_FIELDS if getattr(row, name) is not None]
    if len(given) != 1:
        has = " and ".join(f"`{name}`" for name in given) or "no prompt"
        remedy = "give exactly one of `prompt`, `messages`, `prompt_token_ids`"
        raise ProxyConfigError(f"the row has {has}", remedy=remedy)
    for name in CHAT_FIELDS if given[0] != "messages" else ():
        if getattr(row, name) is not None:
            problem = "it is allowed only in rows with `messages`"
            raise ProxyConfigError(problem, field=name, remedy="remove it")
    if not getattr(row, given[0]):
        raise ProxyConfigError("it is empty", field=given[0], remedy="give at least one token")
    return row


def row_id(line: bytes, key: str = "id") -> Any:
    """Return the id, under *key*, of an invalid row; None if it has none that a record can hold."""
    try:
        found = json.loads(line).get(key)
    except (ValueError, AttributeError, RecursionError):
        return None
    return found if is_json(found) else None


def _row_error(error: ValidationError, row_type: type[PromptRow]) -> ProxyConfigError:
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid" and "recursion limit" in first["msg"]:
        return ProxyConfigError(
            f"the row has more than {_MOST_DEPTH} levels of lists and objects",
            remedy="give nested values as text",
        )
    if not first["loc"] and first["type"] != "value_error":
        return ProxyConfigError(
            f"the row is not a JSON object ({first['msg']})", remedy='write {"prompt": …}'
        )
    return validation_error(row_type, error)
