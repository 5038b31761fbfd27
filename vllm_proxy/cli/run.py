"""Running an engine for a command: progress, Ctrl-C, and what is said at the end."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

import typer

from vllm_proxy.cli.options import say
from vllm_proxy.config.errors import ProxyConfigError

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

    from vllm_proxy.cli.quiet import EngineStreams
    from vllm_proxy.jobs.job import Job, Summary

INTERRUPTED = 128 + signal.SIGINT
READER_GONE = 128 + signal.SIGPIPE


@contextmanager
def running(
    verbose: bool, *, what_remains: Callable[[], str], any_remains: Callable[[], object]
) -> "Iterator[EngineStreams]":
    """Run an engine in the body, and say what remains of the work if it ends early.

    Args:
        verbose: leave vLLM's output visible.
        what_remains: returns which results exist and how to continue, in words.
        any_remains: whether this run has produced any result; an error says what remains only then.

    Raises:
        typer.Exit: 130, after Ctrl-C.
        ProxyConfigError: whatever else ended the body, as one line.
    """
    from vllm_proxy.cli.quiet import quiet_engine

    try:
        with quiet_engine(verbose) as streams:
            try:
                yield streams
            except KeyboardInterrupt:
                typer.echo(f"interrupted: {what_remains()}", file=streams.terminal)
                raise
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except ProxyConfigError as error:
        if not any_remains():
            raise
        raise ProxyConfigError(f"{error}; {what_remains()}") from None


def progress_bars(terminal: IO[str], quiet: bool, *columns: "ProgressColumn | str") -> "Progress":
    """Return bars with these columns, which show themselves on a terminal only.

    Args:
        terminal: the terminal's standard error.
        quiet: show nothing.
        columns: rich's, or formats of text.
    """
    from rich.console import Console
    from rich.progress import Progress

    is_hidden = quiet or not terminal.isatty()
    return Progress(*columns, console=Console(file=terminal), disable=is_hidden)


def run_job(job: "Job", restarts: int, *, quiet: bool, verbose: bool, kept: bool = True) -> None:
    """Complete a job, unless it is finished already; *kept*: whether its output is kept."""
    if job.finished:
        job.output.finish()
        errors = job.output.failed
        say(f"{job.output.name}: finished already: {job.done} rows ({errors} errors)")
        return

    def what_remains() -> str:
        if not kept:
            return f"{job.summary.rows} rows are lost; add --output to keep them"
        then = "run the same command to continue" if job.resumable else "it cannot be resumed"
        return f"{job.done + job.summary.rows} rows are in {job.output.name}; {then}"

    try:
        with running(
            verbose, what_remains=what_remains, any_remains=lambda: job.summary.rows
        ) as streams:
            if not quiet and streams.terminal.isatty():
                typer.echo("starting the engine …", file=streams.terminal)
            with _job_progress(job, streams.terminal, quiet) as progress:
                on_restart = _restart_reporter(job, streams)
                job.complete(progress, restarts=restarts, on_restart=on_restart)
    except BrokenPipeError:
        written = f"{job.summary.rows} rows were written"
        say(f"--output {job.output.name}: the program that reads it has ended; {written}")
        raise typer.Exit(READER_GONE) from None
    if not quiet:
        before = f"; {job.done} rows were there before" if job.done else ""
        say(f"{job.summary} -> {job.output.name}{before}" if kept else str(job.summary))


def _restart_reporter(job: "Job", streams: "EngineStreams") -> Callable[[Exception, int], None]:
    """Return what prints why an engine died and how many restarts are left."""

    def report(error: Exception, left: int) -> None:
        restarts = f"{left} more restarts after this one" if left else "the last restart"
        rows = f"; {len(job.in_flight)} rows are submitted again" if job.in_flight else ""
        cause = streams.cause(error)
        typer.echo(
            f"an engine died: {cause}; starting another one ({restarts}){rows}",
            file=streams.terminal,
        )

    return report


@contextmanager
def _job_progress(
    job: "Job", terminal: IO[str], quiet: bool
) -> Iterator[Callable[["Summary"], None]]:
    """Yield the function that shows a job's progress."""
    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

    speed = "rows, {task.fields[speed]:.0f} tokens/s"
    columns = BarColumn(), MofNCompleteColumn(), speed, TimeRemainingColumn()
    with progress_bars(terminal, quiet, *columns) as bars:
        bar = bars.add_task("", total=job.input.rows, completed=job.done, speed=0.0)

        def show(summary: "Summary") -> None:
            speed = summary.generated_tokens / (summary.seconds or 1)
            bars.update(bar, completed=job.done + summary.rows, speed=speed)

        yield show
