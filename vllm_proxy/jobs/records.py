"""The records of a job, one line of JSON each: how they are made, written and read."""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_proxy.config.strength import Schedule, Strength
from vllm_proxy.jobs.rows import PromptRow

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.logprobs import Logprob

_MOST_DEPTH = 400
"""Nesting deeper than in any record that is written: a row with its id has at most 200 levels."""
_MARKS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)


@dataclass(frozen=True)
class RecordFormat:
    """How a job reads and makes records of one format.

    Attributes:
        index: returns the number of the row that a record answers; raises `KeyError`, `TypeError`,
            `AttributeError` or `ValueError` if the value is not a record.
        is_error: returns whether the row could not be answered; raises the same.
        tokens: returns the numbers of prompt tokens and of generated tokens.
        failure: makes the record of a row that could not be answered from its number, its id and
            the reason.
    """

    index: Callable[[Any], int]
    is_error: Callable[[Any], bool]
    tokens: Callable[[dict[str, Any]], tuple[int, int]]
    failure: Callable[[int, Any, str], dict[str, Any]]


def failure(index: int, row_id: Any, reason: str) -> dict[str, Any]:
    """Return the record, in our own format, of a row that could not be answered."""
    return {"index": index, "id": row_id, "error": reason}


def row_number(index: Any) -> int:
    """Return *index* if it is the number of a row. Raises `ValueError`."""
    if type(index) is not int or index < 0:  # JSON's true and 1.0 are not row numbers
        raise ValueError(index)
    return index


OWN_FORMAT = RecordFormat(
    index=lambda record: row_number(record["index"]),
    is_error=lambda record: "error" in record,
    tokens=lambda record: (record.get("prompt_tokens", 0), record.get("completion_tokens", 0)),
    failure=failure,
)


def encode(record: dict[str, Any], record_format: RecordFormat) -> tuple[dict[str, Any], bytes]:
    """Return a record and its line.

    If a value in the record cannot be encoded as JSON, the row gets a failure record instead, and
    the job goes on. A record concerns one row only, so this hides no error of other rows.
    """
    try:
        return record, _line(record)
    except (ArithmeticError, RecursionError, TypeError, ValueError) as error:
        reason = (
            f"its record cannot be written as JSON ({' '.join(str(error).split())}); change the row"
        )
        failed = record_format.failure(record_format.index(record), None, reason)
        return failed, _line(failed)


def _line(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    # A lone surrogate cannot be encoded as UTF-8; it becomes JSON's own escape.
    return f"{text}\n".encode(errors="backslashreplace")


def decode(line: bytes) -> Any:
    """Return the value of a line, with null where it is nested too deep for Python.

    Raises:
        ValueError: the line is not JSON.
    """
    try:
        return json.loads(line)
    except RecursionError:  # an id that an earlier version has written
        return json.loads(_shallow(line))


def _shallow(line: bytes) -> bytes:
    """Return JSON with null instead of lists and objects at level `_MOST_DEPTH`."""
    parts, depth, kept = [], 0, 0
    for match in _MARKS.finditer(line):
        if match[0] in (b"[", b"{"):
            depth += 1
            if depth == _MOST_DEPTH:
                parts.append(line[kept : match.start()])
        elif match[0] in (b"]", b"}"):
            if depth == _MOST_DEPTH:
                parts.append(b"null")
                kept = match.end()
            depth -= 1
    return b"".join([*parts, line[kept:]])


def answer(
    index: int, row: PromptRow, output: "RequestOutput", params: "SamplingParams", alpha: Strength
) -> dict[str, Any]:
    """Return the record of a finished request.

    Log-probabilities, if *params* requests them, are a list with one entry per token:
    `{"token_id", "logprob", "top": [{"token_id", "logprob", "token"}, …]}`, the most likely
    first. The first token of a prompt has none (null). A `logprob` of minus infinity is null.

    Args:
        index: number of the row.
        row: that was submitted.
        output: of the engine.
        params: of the request.
        alpha: strength of rows that set none.
    """
    completion = output.outputs[0]
    if completion.finish_reason in ("error", "abort"):
        return failure(
            index, row.id, f"vLLM ended the request with `{completion.finish_reason}`; try again"
        )
    prompt_ids = output.prompt_token_ids or []
    record = {
        "index": index,
        "id": row.id,
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "prompt_tokens": len(prompt_ids),
        "completion_tokens": len(completion.token_ids),
        **strength_of(row, alpha),
    }
    if completion.logprobs is not None:
        record["logprobs"] = _logprobs(completion.token_ids, completion.logprobs, params.logprobs)
    if output.prompt_logprobs is not None:
        record["prompt_logprobs"] = _logprobs(
            prompt_ids, output.prompt_logprobs, params.prompt_logprobs
        )
    return record


def strength_of(row: PromptRow, alpha: Strength) -> dict[str, Any]:
    """Return a record's fields for a row's expert and strength.

    Args:
        row: the row.
        alpha: the strength of rows that set none.
    """
    expert = {} if row.expert is None else {"expert": row.expert}
    if row.weights is not None:
        return {**expert, "weights": list(row.weights)}
    strength = alpha if row.alpha is None else row.alpha
    value = strength.model_dump() if isinstance(strength, Schedule) else strength
    return {**expert, "alpha": value}


def _logprobs(
    token_ids: Sequence[int],
    positions: Iterable["Mapping[int, Logprob] | None"],
    top: int | None,
) -> list[dict[str, Any] | None]:
    return [
        {
            "token_id": token_id,
            "logprob": _finite(position[token_id].logprob),
            # vLLM returns the token itself in addition to the `top` most likely ones; for -1 and
            # None it returns all tokens.
            "top": [
                {"token_id": id_, "logprob": _finite(entry.logprob), "token": entry.decoded_token}
                for id_, entry in sorted(position.items(), key=lambda item: -item[1].logprob)
            ][: None if top in (None, -1) else top],
        }
        if position
        else None
        for token_id, position in zip(token_ids, positions, strict=True)
    ]


def _finite(logprob: float) -> float | None:
    return logprob if math.isfinite(logprob) else None
