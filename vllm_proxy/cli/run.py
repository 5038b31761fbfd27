"""Running a job: its progress, Ctrl-C, and what is said at its end."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

import typer

from vllm_proxy.cli.options import say
from vllm_proxy.config.errors import ProxyConfigError

if TYPE_CHECKING:
    from vllm_proxy.jobs.job import Job, Summary


READER_GONE = 128 + signal.SIGPIPE


def run_job(job: "Job", restarts: int, *, quiet: bool, verbose: bool, kept: bool = True) -> None:
    """Complete a job; *kept*: whether its output stays."""
    from vllm_proxy.cli.quiet import quiet_engine

    def there(rows: int) -> str:
        if not kept:
            return f"{rows} rows are lost; with --output they stay"
        then = "run the same command to continue" if job.resumable else "it cannot be resumed"
        return f"{rows} rows are in {job.output.name}; {then}"

    try:
        with quiet_engine(verbose) as hushed:
            terminal = hushed.terminal

            def on_restart(error: Exception, left: int) -> None:
                often = f"{left} more after this" if left else "for the last time"
                rows = f", {len(job.in_flight)} rows are asked again" if job.in_flight else ""
                typer.echo(
                    f"an engine died: {hushed.cause(error)}; starting another one ({often}){rows}",
                    file=terminal,
                )

            try:
                if not quiet and terminal.isatty():
                    typer.echo("starting the engine …", file=terminal)
                with _progress(job, terminal, quiet) as progress:
                    job.complete(progress, restarts=restarts, on_restart=on_restart)
            except KeyboardInterrupt:
                rows = job.done + job.summary.rows
                typer.echo(f"interrupted: {there(rows)}", file=terminal)
                raise
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BrokenPipeError:
        say(f"--output {job.output.name}: nobody reads it any more; {job.summary.rows} rows went")
        raise typer.Exit(READER_GONE) from None
    except ProxyConfigError as error:
        if not job.summary.rows:
            raise
        raise ProxyConfigError(f"{error}; {there(job.summary.rows)}") from None
    if not quiet:
        before = f"; {job.done} rows were there before" if job.done else ""
        say(f"{job.summary} -> {job.output.name}{before}" if kept else str(job.summary))


@contextmanager
def _progress(job: "Job", terminal: IO[str], quiet: bool) -> Iterator[Callable[["Summary"], None]]:
    """Yield what shows a job's progress: a bar on a terminal, else nothing."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows, {task.fields[speed]:.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(file=terminal), disable=quiet or not terminal.isatty())
    with bar:
        task = bar.add_task("", total=job.input.rows, completed=job.done, speed=0.0)

        def show(summary: "Summary") -> None:
            speed = summary.generated_tokens / (summary.seconds or 1)
            bar.update(task, completed=job.done + summary.rows, speed=speed)

        yield show
