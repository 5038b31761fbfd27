"""The one exception for a user's mistake, and how other exceptions become one line."""

import copy
import re
import reprlib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from textwrap import shorten
from typing import Any

_LISTS = re.compile(
    r"\.? Supported architectures:|\. The available parameters| \(parameter=|\. See http"
)
"""Where vLLM's errors begin to list everything that vLLM knows."""

_NOT_GIVEN = object()

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120  # a path is shown whole


class ProxyConfigError(ValueError):
    """A user's mistake, in one line: the field, its value, the problem and the remedy.

    The command line prints it and exits with code 2; a server answers with HTTP 400; Python callers
    catch it as a `ValueError`. The line is "`field` is value: problem; remedy", without the parts
    that are not given.

    Attributes:
        field: what to change, as the user writes it: `alpha`, `engine.dtype`, `--limit`, or a
            member and its model. None if no single field is at fault.
        value: its value as the line shows it; None if the line shows none.
        remedy: what to do; None if *problem* says it.
    """

    def __init__(
        self,
        problem: str = "",
        *,
        field: str | None = None,
        value: object = _NOT_GIVEN,
        remedy: str | None = None,
    ) -> None:
        self.field = field
        self.value = None if value is _NOT_GIVEN else shown(value)
        self.remedy = remedy
        where = ""
        if field is not None:
            is_name = not (field.startswith("-") or " " in field or "`" in field)
            where = f"`{field}`" if is_name else field
            where += "" if self.value is None else f" is {self.value}"
        what = "; ".join(filter(None, (problem, remedy)))
        super().__init__(": ".join(filter(None, (where, what))))

    @classmethod
    def worded(cls, problem: str, *, field: str, remedy: str | None = None) -> "ProxyConfigError":
        """Return an error about *field* whose *problem* names it in its own words."""
        error = cls(problem, remedy=remedy)
        error.field = field
        return error

    def within(self, source: str) -> "ProxyConfigError":
        """Return this error with *source*, where the field was found, in front of its line."""
        error = copy.copy(self)
        error.args = (f"{source}: {self}",)
        return error


class EngineDiedError(RuntimeError):
    """An engine ended in the middle of its work; another engine may continue.

    Attributes:
        remark: what is known of the failure in addition to its cause.
    """

    def __init__(self, message: str, remark: str = "") -> None:
        super().__init__(message)
        self.remark = remark


def unknown_key(field: str, known: Iterable[str], *, remedy: str | None = None) -> ProxyConfigError:
    """Return the error for a key that is not one of *known*.

    Args:
        field: the key as the user wrote it, with the keys around it: `engine.max_modellen`.
        known: the keys that are allowed in its place, without those around it.
        remedy: what to do if none of *known* resembles it and there are too many to list.
    """
    hint = did_you_mean(field.rpartition(".")[2], known)
    return ProxyConfigError.worded(f"unknown key `{field}`", field=field, remedy=hint or remedy)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "did you mean `x`?" for the nearest of *known*, or the list of them all.

    Empty if none resembles *name* and there are too many to list.
    """
    known = sorted(known)
    near = get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean `{near[0]}`?"
    return f"known: {', '.join(known)}" if len(known) <= 12 else ""


def shown(value: object) -> str:
    """Return *value* as Python writes it, shortened; also where Python refuses to write it."""
    try:
        return _REPR.repr(value)
    except ValueError:  # an integer with more digits than Python converts to text
        return "a number of thousands of digits"


def pydantic_detail(error: BaseException) -> Mapping[str, Any] | None:
    """Return the first entry of a pydantic error (`type`, `loc`, `msg`, …); None for other errors.

    Found by its method: importing pydantic would slow every command down.
    """
    errors = getattr(error, "errors", None)
    return errors()[0] if callable(errors) else None


def error_message(error: BaseException) -> str:
    """Return what an exception says; of a pydantic error, only what its first entry says."""
    detail = pydantic_detail(error)
    text = str(error) if detail is None else detail["msg"]
    return text.removeprefix("Value error, ")


def is_proxy_error(error: Exception) -> bool:
    """Whether *error* is a `ProxyConfigError`, or a pydantic error that contains one."""
    detail = pydantic_detail(error)
    inner = error if detail is None else detail.get("ctx", {}).get("error")
    return isinstance(inner, ProxyConfigError)


def one_line(error: Exception) -> str:
    """Return the reason in an exception of any library in one line, without lists of what it knows.

    At most 300 characters.
    """
    detail = pydantic_detail(error)
    if detail is not None and detail["type"] == "unexpected_keyword_argument":
        return f"unknown key `{detail['loc'][-1]}`"
    text = " ".join((error_message(error) or type(error).__name__).split())
    return shorten(_LISTS.split(text, maxsplit=1)[0].rstrip("."), 300, placeholder=" …")
