"""`vllm-proxy generate`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from vllm_proxy.cli.options import (
    Alpha,
    Config,
    Limit,
    MaxTokens,
    Overwrite,
    Quiet,
    Restarts,
    Seed,
    Temperature,
    TopP,
    Verbose,
    given_sampling,
    load_config,
    require,
    require_counts,
)
from vllm_proxy.cli.run import run_job
from vllm_proxy.jobs import RESTARTS

if TYPE_CHECKING:
    from vllm_proxy.jobs.ray_job import Replicas


class GenerateCommand(TyperCommand):
    """Allows `--ray` without a value, which Typer cannot express."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert an empty value after `--ray` where another option, or nothing, follows."""
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
            help="Rows to answer. Give JSON lines with one of prompt, messages or "
            "prompt_token_ids, and optionally id, sampling, alpha and others; an OpenAI batch "
            "file; a .parquet file with these columns; a .txt file with one prompt per line; any "
            "text file as .gz; a pattern such as 'part-*.jsonl'; or - for lines from standard "
            "input. Can be repeated.",
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Where the records go. JSON lines are written as each row finishes, a .parquet "
            "file at the end; - is standard output.",
        ),
    ],
    alpha: Alpha = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: Annotated[
        int | None,
        typer.Option(metavar="K", help="Sample from the K most likely tokens; 0 means all tokens."),
    ] = None,
    seed: Seed = None,
    logprobs: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            help="Also write each token's log-probability and the K most likely alternatives.",
        ),
    ] = None,
    limit: Limit = None,
    ordered: Annotated[
        bool, typer.Option("--ordered", help="Sort the records by row once all rows are answered.")
    ] = False,
    overwrite: Overwrite = False,
    restarts: Restarts = RESTARTS,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]",
            help="Spread the rows over several engines with Ray. Without ADDRESS, use the cluster "
            "in RAY_ADDRESS, or one that runs on this machine, or start one.",
        ),
    ] = None,
    replicas: Annotated[
        str | None,
        typer.Option(
            metavar="N[:MOST]",
            help="Number of engines to start; with N:MOST, scale up to MOST while rows are "
            "waiting. Implies --ray.",
        ),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Answer every row of one or more files.

    A row's own "sampling" takes precedence over the options, and the
    options over the configuration. A row that cannot be answered gets a
    record with an "error", and the exit code is 1. If the command is killed
    or interrupted, run it again: it continues where it stopped. It also
    continues with a larger --limit.
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
    with open_job(
        settings,
        input,
        output,
        limit=limit,
        replicas=_replicas(ray, replicas),
        ordered=ordered,
        overwrite=overwrite,
    ) as job:
        run_job(job, restarts, quiet=quiet, verbose=verbose)
        raise typer.Exit(1 if job.output.failed else 0)


def _replicas(address: str | None, bounds: str | None) -> "Replicas | None":
    """Read `--ray` and `--replicas`; each implies the other."""
    if address is None and bounds is None:
        return None
    from vllm_proxy.jobs.ray_job import Replicas

    least, _, most = (bounds or "1").partition(":")
    start, end = (int(count) if count.isdecimal() else 0 for count in (least, most or least))
    require("--replicas", bounds, 0 < start <= end, "give a count, or two as in 2:8")
    return Replicas(start, end, address or None)
