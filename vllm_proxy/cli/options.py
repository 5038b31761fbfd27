"""Options that several commands have, and what they make of them."""

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_proxy.config.errors import ProxyConfigError

if TYPE_CHECKING:
    from vllm_proxy.config.schema import ProxyConfig


Config = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file: the three models.")]

Alpha = Annotated[
    str | None,
    typer.Option(metavar="A", help="A number, or adaptive, instead of the configuration's."),
]


def say(line: str) -> None:
    """Print a line for the user on standard error."""
    typer.echo(line, err=True)


def load_config(
    path: str, alpha: str | None, sampling: dict[str, Any] | None = None
) -> "ProxyConfig":
    """Read the configuration and lay the options over it. Raises `ProxyConfigError`."""
    from vllm_proxy.config.schema import ProxyConfig

    config = ProxyConfig.from_yaml(path)
    if alpha is not None:
        config = config.model_copy(update={"alpha": parse_strength(alpha)})
    return config.model_copy(update={"sampling": {**config.sampling, **(sampling or {})}})


def parse_strength(text: str) -> float | str:
    """Read the value of `--alpha`. Raises `ProxyConfigError`."""
    from vllm_proxy.config.strength import ADAPTIVE, MOST_STRENGTH, is_weight

    if text == ADAPTIVE:
        return text
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    most = f"give a finite number, at most {MOST_STRENGTH:g} either way, or {ADAPTIVE}"
    require("--alpha", text, is_weight(alpha), most)
    return alpha


def require(option: str, value: object, holds: bool, remedy: str) -> None:
    """Raise a `ProxyConfigError` that names the option and its value, unless it *holds*."""
    if not holds:
        raise ProxyConfigError(f"{option} is {value!r}; {remedy}")


def given_sampling(**options: Any) -> dict[str, Any]:
    """Return the options that are given, once those of all commands are checked."""
    given = {key: value for key, value in options.items() if value is not None}
    temperature, top_p = given.get("temperature", 0), given.get("top_p", 1)
    finite = math.isfinite(temperature) and temperature >= 0
    require("--temperature", temperature, finite, "give a number >= 0")
    require("--top-p", top_p, 0 < top_p <= 1, "give a number in (0, 1]")
    max_tokens = given.get("max_tokens", 1)
    require("--max-tokens", max_tokens, max_tokens > 0, "give at least 1")
    return given


def require_counts(limit: int | None, restarts: int) -> None:
    """Check `--limit` and `--restarts`. Raises `ProxyConfigError`."""
    require("--limit", limit, limit is None or limit > 0, "give at least 1")
    require("--restarts", restarts, restarts >= 0, "give a count, or 0 for none")
