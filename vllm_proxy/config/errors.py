"""The one exception that stands for a user's mistake, and how others become its one line."""

import re
import reprlib
from collections.abc import Iterable
from copy import copy
from difflib import get_close_matches
from textwrap import shorten

_KNOWN = re.compile(
    r"\.? Supported architectures:|\. The available parameters| \(parameter=|\. See http"
)
"""Begins what vLLM's errors list of what it knows."""


_NOT_GIVEN = object()


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

    def within(self, place: str) -> "ProxyConfigError":
        """Return the same error, its line beginning with where it is: a file, say, or a row."""
        error = copy(self)
        error.args = (f"{place}: {self}",)
        return error


class EngineDiedError(RuntimeError):
    """An engine ended in the middle of its work; another one may go on.

    Attributes:
        remark: what else is known of the death, beside its cause.
    """

    def __init__(self, message: str, remark: str = "") -> None:
        super().__init__(message)
        self.remark = remark


def is_proxy_error(error: Exception) -> bool:
    """Whether *error* is a `ProxyConfigError`, or pydantic's around one."""
    errors = getattr(error, "errors", None)
    inner = errors()[0].get("ctx", {}).get("error") if callable(errors) else error
    return isinstance(inner, ProxyConfigError)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean `x`?" for the nearest of *known*, or the list of them all.

    Empty if none is near and they are too many to list.
    """
    known = sorted(known)
    near = get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean `{near[0]}`?"
    return f"; known: {', '.join(known)}" if len(known) <= 12 else ""


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120  # room for a path


def shown(value: object) -> str:
    """Return *value* as Python writes it, shortened; also where Python refuses to write it."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # an integer of more digits than Python turns into text
        return "a number of thousands of digits"


def one_line(error: Exception) -> str:
    """Return the reason in vLLM's, pydantic's or another error, without lists of what it knows."""
    errors = getattr(error, "errors", None)  # pydantic's
    text = str(error) or type(error).__name__
    if callable(errors):
        first = errors()[0]
        text = first["msg"]
        if first["type"] == "unexpected_keyword_argument":
            text = f"unknown key `{first['loc'][-1]}`"
    text = " ".join(text.removeprefix("Value error, ").split())
    text = re.split(
        r"\.? Supported architectures:|\. The available parameters| \(parameter=", text
    )[0].rstrip(".")
    return shorten(text, 300, placeholder=" …")
