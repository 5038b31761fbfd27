"""`vllm-proxy inspect`."""

import os
from typing import TYPE_CHECKING, Annotated

import typer

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
from vllm_proxy.config.errors import ProxyConfigError

if TYPE_CHECKING:
    from vllm_proxy.jobs.inspect.job import InspectJob


def inspect(
    config: Config,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="A prompt. May be repeated.")
    ] = None,
    input: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help='As of generate. A row may have a "completion", text or token ids, to inspect '
            "instead of an answer that is generated. May be repeated.",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="JSON lines, each written when its row finishes."),
    ] = None,
    html: Annotated[
        str | None, typer.Option(metavar="PAGE", help="A page for people, in one file.")
    ] = None,
    top_k: Annotated[
        int, typer.Option(metavar="K", help="How many of the likeliest tokens to keep of each.")
    ] = 5,
    alpha: Alpha = None,
    max_tokens: Annotated[int | None, typer.Option(metavar="N", help="vLLM's default: 16.")] = None,
    temperature: Annotated[float | None, typer.Option(metavar="T", help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(metavar="P")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of each row.")] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Only the first N rows.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output of another job, or a file.")
    ] = False,
    restarts: Annotated[
        int, typer.Option(metavar="N", help="How often an engine that died is started again.")
    ] = 3,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar, no tables.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="vLLM's log and tracebacks.")] = False,
) -> None:
    """Answer, and say what base, expert, antiexpert and proxy each said of every token.

    Prints where the likeliest token changed; --output has it all for machines, --html for people.
    A row that cannot be answered gets a record with an "error" and the exit code is 1. Killed or
    interrupted, the same command with --output continues where it was.
    """
    from tempfile import TemporaryDirectory

    from vllm_proxy.config.request import MOST_TOP_K
    from vllm_proxy.jobs.inputs import Input, Prompts
    from vllm_proxy.jobs.inspect.job import InspectJob, require_free

    if bool(prompt) == bool(input):
        raise ProxyConfigError(f"{'both ' if prompt else 'no '}--prompt and --input; give one")
    for text in prompt or ():
        require("--prompt", text, text != "", "give at least one token")
    kept = 1 <= top_k <= MOST_TOP_K
    require("--top-k", top_k, kept, f"give a count from 1 to {MOST_TOP_K}")
    is_lines = output is None or not (output == "-" or output.endswith(".parquet"))
    require("--output", output, is_lines, "give a file of JSON lines, for it is read again")
    sampling = given_sampling(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    require_counts(limit, restarts)
    settings = load_config(config, alpha, sampling)
    rows = Prompts(prompt[:limit]) if prompt else Input(input, limit)
    if html is not None:
        others = {os.path.abspath(path) for path in (output, *rows.paths) if path}
        require("--html", html, os.path.abspath(html) not in others, "give another path")
        require_free(html, overwrite=overwrite)
    with TemporaryDirectory(prefix="vllm-proxy-") as nowhere:
        target = output or f"{nowhere}/records.jsonl"
        with InspectJob(
            settings, rows, target, top_k=top_k, keep=output is not None, overwrite=overwrite
        ) as job:
            if job.finished:
                job.output.finish()
                say(f"{output}: finished already: {job.done} rows ({job.output.failed} errors)")
            else:
                run_job(job, restarts, quiet=quiet, verbose=verbose, kept=output is not None)
            _show(job, html, quiet=quiet, kept=output is not None)
            raise typer.Exit(1 if job.output.failed else 0)


def _show(job: "InspectJob", html: str | None, *, quiet: bool, kept: bool) -> None:
    """Print tables of a job that is done, and write its page; errors, too, if nothing else does."""
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
