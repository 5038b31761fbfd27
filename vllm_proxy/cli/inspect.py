"""`vllm-proxy inspect`."""

import os
from typing import TYPE_CHECKING, Annotated

import typer

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
    say,
)
from vllm_proxy.cli.run import run_job
from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.jobs import RESTARTS

if TYPE_CHECKING:
    from vllm_proxy.jobs.inputs import Input
    from vllm_proxy.jobs.inspect.job import InspectJob


def inspect(
    config: Config,
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="A prompt to answer and inspect. Can be repeated."),
    ] = None,
    input: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help='Rows, as for `generate`. A row can have a "completion", text or token ids, which '
            "is inspected instead of a generated answer. Can be repeated.",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Write the records here, as JSON lines. With it, an interrupted run resumes.",
        ),
    ] = None,
    html: Annotated[
        str | None,
        typer.Option(metavar="PAGE", help="Write a page to read in a browser, in one file."),
    ] = None,
    top_k: Annotated[
        int,
        typer.Option(metavar="K", help="Keep the K most likely tokens of each distribution."),
    ] = 5,
    alpha: Alpha = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    limit: Limit = None,
    overwrite: Overwrite = False,
    restarts: Restarts = RESTARTS,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Answer, and show what each member and the proxy predicted for every token.

    Prints where the most likely token changed. --output writes everything as
    JSON, --html writes a page to read. A row that cannot be answered gets a
    record with an "error", and the exit code is 1. If the command is killed
    or interrupted, run it again with the same --output: it continues where it
    stopped.
    """
    from tempfile import TemporaryDirectory

    from vllm_proxy.jobs.inspect.job import InspectJob

    _require_options(prompt, input, output, top_k)
    sampling = given_sampling(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    require_counts(limit, restarts)
    settings = load_config(config, alpha, sampling)
    rows = _rows(prompt, input, limit)
    if html is not None:
        _require_page(html, [output, *rows.paths], overwrite=overwrite)
    kept = output is not None
    with TemporaryDirectory(prefix="vllm-proxy-") as directory:
        target = output or f"{directory}/records.jsonl"
        with InspectJob(settings, rows, target, top_k=top_k, keep=kept, overwrite=overwrite) as job:
            run_job(job, restarts, quiet=quiet, verbose=verbose, kept=kept)
            _show(job, html, quiet=quiet, kept=kept)
            raise typer.Exit(1 if job.output.failed else 0)


def _require_options(
    prompt: list[str] | None, input: list[str] | None, output: str | None, top_k: int
) -> None:
    """Check the options that only this command has. Raises `ProxyConfigError`."""
    from vllm_proxy.config.request import MOST_TOP_K

    if bool(prompt) == bool(input):
        given = "both are given" if prompt else "neither is given"
        raise ProxyConfigError(given, field="--prompt and --input", remedy="give one of them")
    for text in prompt or ():
        require("--prompt", text, text != "", "give at least one token")
    in_range = 1 <= top_k <= MOST_TOP_K
    require("--top-k", top_k, in_range, f"give a count from 1 to {MOST_TOP_K}")
    if output == "-" or (output or "").endswith(".parquet"):
        raise ProxyConfigError(
            "the command reads its records again",
            field=f"--output {output!r}",
            remedy="give a file of JSON lines",
        )


def _rows(prompt: list[str] | None, input: list[str] | None, limit: int | None) -> "Input":
    from vllm_proxy.jobs.inputs import Input, Prompts

    return Prompts(prompt[:limit]) if prompt else Input(input or (), limit)


def _require_page(html: str, others: list[str | None], *, overwrite: bool) -> None:
    """Reject a page that cannot be written, or that another file of the job would share."""
    from vllm_proxy.jobs.inspect.job import require_free_page

    if os.path.abspath(html) in {os.path.abspath(path) for path in others if path}:
        raise ProxyConfigError(
            "it is an input or the output", field=f"--html {html!r}", remedy="give another path"
        )
    require_free_page(html, overwrite=overwrite)


def _show(job: "InspectJob", html: str | None, *, quiet: bool, kept: bool) -> None:
    """Print the tables of a finished job and write its page.

    Errors of rows are printed if the records are not *kept*: nothing else would show them.
    """
    from rich.console import Console

    from vllm_proxy.jobs.inspect.summary import render

    summary = job.summary_of_shift()
    if not kept:
        for record in filter(lambda record: "error" in record, job.records()):
            say(f"row {record['index'] + 1}: {record['error']}")
    if not quiet:
        Console().print(render(summary))
    if html is not None:
        shown = job.write_page(html, summary)
        part = f"the first {shown}" if shown < summary.records else "all"
        say(f"{html}: {part} of {summary.records} rows")
