"""The options that several commands share, and how their values are read and checked."""

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_proxy.config.errors import ProxyConfigError

if TYPE_CHECKING:
    from vllm_proxy.config.schema import ProxyConfig
    from vllm_proxy.config.strength import Strength


Config = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG",
        help="YAML file that names the base, the expert and the antiexpert, with the settings "
        "shared by all commands.",
    ),
]

Alpha = Annotated[
    str | None,
    typer.Option(
        metavar="A",
        help='Strength of the steering: a number, or "adaptive". Overrides `alpha` in CONFIG.',
    ),
]

# -- sampling --------------------------------------------------------------------------------------

MaxTokens = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Generate at most N tokens per answer. vLLM's own default is 16."
    ),
]

Temperature = Annotated[
    float | None,
    typer.Option(metavar="T", help="Sampling temperature; 0 always picks the most likely token."),
]

TopP = Annotated[
    float | None,
    typer.Option(
        metavar="P",
        help="Sample from the fewest most likely tokens whose probabilities add up to P.",
    ),
]

Seed = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Seed for every row; a row gives the same answer whichever rows run with it.",
    ),
]

# -- how a command runs ----------------------------------------------------------------------------

Limit = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Use only the first N rows; `evaluate` uses the first N of each task."
    ),
]

Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace output files that exist already.")
]

Restarts = Annotated[
    int,
    typer.Option(metavar="N", help="Start a new engine at most N times after one has died."),
]

Quiet = Annotated[
    bool, typer.Option("--quiet", help="Print no progress and no summary; errors are printed.")
]

Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        help="Print the logs of vLLM and other libraries, and the traceback of an error.",
    ),
]


def say(line: str) -> None:
    """Print a line for the user on standard error."""
    typer.echo(line, err=True)


def load_config(
    path: str, alpha: str | None, sampling: dict[str, Any] | None = None
) -> "ProxyConfig":
    """Read the configuration and override it with the options. Raises `ProxyConfigError`."""
    from vllm_proxy.config.schema import ProxyConfig

    config = ProxyConfig.from_yaml(path)
    if alpha is not None:
        config = config.model_copy(update={"alpha": parse_strength(alpha)})
    return config.model_copy(update={"sampling": {**config.sampling, **(sampling or {})}})


def parse_strength(text: str) -> "Strength":
    """Read the value of `--alpha`. Raises `ProxyConfigError`."""
    from vllm_proxy.config.strength import ADAPTIVE, STRENGTH_RANGE, is_weight

    if text == ADAPTIVE:
        return ADAPTIVE
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    remedy = f"give a finite number {STRENGTH_RANGE}, or {ADAPTIVE}"
    require("--alpha", text, is_weight(alpha), remedy)
    return alpha


def require(option: str, value: object, holds: bool, remedy: str) -> None:
    """Raise a `ProxyConfigError` that names the option and its value, unless *holds*."""
    if not holds:
        raise ProxyConfigError(field=option, value=value, remedy=remedy)


def given_sampling(**options: Any) -> dict[str, Any]:
    """Check the sampling options that all commands share; return the options that are given.

    Raises:
        ProxyConfigError: an option's value is out of range.
    """
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
    require("--restarts", restarts, restarts >= 0, "give a count, or 0 to start no other engine")
