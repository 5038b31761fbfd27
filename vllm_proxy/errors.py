"""The one exception that stands for a user's mistake."""

from collections.abc import Iterable
from difflib import get_close_matches


class ProxyConfigError(ValueError):
    """A user's mistake, in one line that names the field, its value and the remedy.

    The command line prints it and exits with code 2; Python callers catch it as a `ValueError`.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean `x`?" for the nearest of *known*, or the sorted list of them all."""
    known = sorted(known)
    near = get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean `{near[0]}`?"
    return f"; known: {', '.join(known)}" if len(known) <= 12 else ""
