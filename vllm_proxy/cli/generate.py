"""`vllm-proxy generate`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from vllm_proxy.cli.options import (
    Alpha,
    Config,
    given_sampling,
    load_config,
    require,
    require_counts,
    say,
)
from vllm_proxy.cli.run import run_job

if TYPE_CHECKING:
    from vllm_proxy.jobs.ray_job import Replicas


class GenerateCommand(TyperCommand):
    """Lets `--ray` stand without its value, which Typer cannot."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give the option an empty value where none follows."""
        words: list[str] = []
        for word, after in zip(args, [*args[1:], "-"], strict=True):
            words += [word, ""] if word == "--ray" and after.startswith("-") else [word]
        return super().parse_args(ctx, words)


def generate(
    config: Config,
    input: Annotated[
        list[str],
        typer.Option(
            metavar="FILE",
            help='JSON lines {"prompt" | "messages" | "prompt_token_ids": …, "id", "sampling", '
            '"alpha", …}; an OpenAI batch file; a .parquet with such columns; a .txt with a prompt '
            "a line; .gz of any; a pattern; or - for lines from standard input. May be repeated.",
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="JSON lines, each written when its row finishes; a .parquet, written at the end; "
            "- for standard output.",
        ),
    ],
    alpha: Alpha = None,
    max_tokens: Annotated[int | None, typer.Option(metavar="N", help="vLLM's default: 16.")] = None,
    temperature: Annotated[float | None, typer.Option(metavar="T", help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(metavar="P")] = None,
    top_k: Annotated[int | None, typer.Option(metavar="K")] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Of each row: rows repeat alone, too.")
    ] = None,
    logprobs: Annotated[
        int | None, typer.Option(metavar="K", help="Add each token's and the K best.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Only the first N rows; raise it to go on.")
    ] = None,
    ordered: Annotated[
        bool, typer.Option("--ordered", help="Put the records in the rows' order, at the end.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output of another job.")
    ] = False,
    restarts: Annotated[
        int, typer.Option(metavar="N", help="How often an engine that died is started again.")
    ] = 3,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]",
            help="Spread the rows over engines on this Ray cluster; without ADDRESS on "
            "RAY_ADDRESS's, on one that runs on this machine, or on a new one.",
        ),
    ] = None,
    replicas: Annotated[
        str | None,
        typer.Option(metavar="N[:MOST]", help="How many engines; more, up to MOST, as rows wait."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar, no summary.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="vLLM's log and tracebacks.")] = False,
) -> None:
    """Answer every row of one or many files.

    A row's own "sampling" goes before the options, and these before the configuration's. A row
    that cannot be answered gets a record with an "error" and the exit code is 1. Killed or
    interrupted, the same command continues where it was.
    """
    from vllm_proxy.jobs.open import open_job

    require("--top-k", top_k, top_k is None or top_k >= -1, "give a count, or 0 for all")
    require("--logprobs", logprobs, logprobs is None or logprobs >= -1, "give a count, -1 for all")
    sampling = given_sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        logprobs=logprobs,
    )
    require_counts(limit, restarts)
    settings = load_config(config, alpha, sampling)
    where = {"limit": limit, "ordered": ordered, "overwrite": overwrite}
    with open_job(settings, input, output, replicas=_replicas(ray, replicas), **where) as job:
        if job.finished:
            job.output.finish()
            say(f"{output}: finished already: {job.done} rows ({job.output.failed} errors)")
        else:
            run_job(job, restarts, quiet=quiet, verbose=verbose)
        raise typer.Exit(1 if job.output.failed else 0)


def _replicas(address: str | None, bounds: str | None) -> "Replicas | None":
    """Read `--ray` and `--replicas`; one implies the other."""
    if address is None and bounds is None:
        return None
    from vllm_proxy.jobs.ray_job import Replicas

    least, _, most = (bounds or "1").partition(":")
    counts = [int(count) if count.isdecimal() else 0 for count in (least, most or least)]
    require("--replicas", bounds, 0 < counts[0] <= counts[1], "give a count, or two as in 2:8")
    return Replicas(*counts, address or None)
