"""The records of a job, one a line of JSON: how they are written, read, and told apart."""

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

_MOST_DEPTH = 400
"""Deeper than any record that is written: a row is at most 200 deep, with its id in a record."""
_MARKS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)


class RecordFormat(NamedTuple):
    """What a job must know of the records that it writes.

    Attributes:
        index: the number of the row that a record answers; raises `KeyError`, `TypeError`,
            `AttributeError` or `ValueError` if it is no record.
        is_error: whether it says that the row could not be answered; raises the same.
        tokens: numbers of prompt tokens and of generated ones.
        failure: makes the record of a row that could not be answered, of its number, its id and
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
    if type(index) is not int or index < 0:  # JSON's true and 1.0 are no numbers of rows
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

    Whatever a row, or what the engine made of it, put into its record: if JSON cannot say it, the
    row has the record of a failure instead, and the job goes on. A record is the row's alone, so
    this can hide nothing that other rows depend on.
    """
    try:
        return record, _line(record)
    except (ArithmeticError, RecursionError, TypeError, ValueError) as error:
        reason = f"its record is no JSON ({' '.join(str(error).split())}); change the row"
        failed = record_format.failure(record_format.index(record), None, reason)
        return failed, _line(failed)


def _line(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    # A lone surrogate, which UTF-8 cannot say, comes out as JSON's own escape.
    return f"{text}\n".encode(errors="backslashreplace")


def decode(line: bytes) -> Any:
    """Return what a line says; null where it is nested deeper than Python can follow.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(line)
    except RecursionError:  # an id, written by an earlier version
        return json.loads(_shallow(line))


def _shallow(line: bytes) -> bytes:
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
