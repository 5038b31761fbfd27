"""`vllm-proxy evaluate`."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from vllm_proxy.cli.options import Config, load_config, parse_strength, require, say
from vllm_proxy.config.errors import ProxyConfigError

if TYPE_CHECKING:
    from vllm_proxy.evaluate.lm import Progress
    from vllm_proxy.evaluate.run import Evaluation
    from vllm_proxy.evaluate.systems import System


def evaluate(
    config: Config,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE.yaml[,…]",
            help="Tasks, groups and tags of lm-evaluation-harness, patterns of them, or files.",
        ),
    ],
    include: Annotated[
        str | None, typer.Option(metavar="DIR", help="A directory of more tasks, which go first.")
    ] = None,
    systems: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,…]",
            help="Some of proxy, base, expert, antiexpert. By default the first three.",
        ),
    ] = None,
    tuned: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL|FILE.yaml",
            help="A directly tuned model to compare with: a directory, a hub id, or a file with "
            "{model: …, revision: …, lora: …, engine: …}.",
        ),
    ] = None,
    alpha: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A",
            help="A number, or adaptive, instead of the configuration's. Repeated, a row each.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Only the first N rows of each task.")
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(metavar="N", help="Examples before a question; else as the task says."),
    ] = None,
    apply_chat_template: Annotated[
        bool,
        typer.Option(
            "--apply-chat-template",
            help="Ask in conversations, which members see as the configuration's `chat` says.",
        ),
    ] = False,
    confirm_run_unsafe_code: Annotated[
        bool,
        typer.Option(
            "--confirm-run-unsafe-code", help="Allow tasks that run the code that models write."
        ),
    ] = False,
    output: Annotated[
        str | None, typer.Option(metavar="FILE.json", help="Everything that was measured.")
    ] = None,
    log_samples: Annotated[
        bool,
        typer.Option("--log-samples", help="Write all questions and answers to FILE.samples, too."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output of another evaluation.")
    ] = False,
    cache: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Keep answers there: interrupted, it goes on from them."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Logs of vLLM and the harness, and tracebacks.")
    ] = False,
) -> None:
    """Score proxy, base and expert, and a directly tuned model, with lm-evaluation-harness."""
    arguments = dict(locals())
    require("--limit", limit, limit is None or limit > 0, "give at least 1")
    require("--num-fewshot", num_fewshot, num_fewshot is None or num_fewshot >= 0, "give a count")
    needs = "it needs --output FILE.json"
    require("--log-samples", log_samples, output is not None or not log_samples, needs)
    strengths = [parse_strength(text) for text in alpha or ()]
    specs = [spec.strip() for spec in tasks.split(",") if spec.strip()]
    require("--tasks", tasks, bool(specs), "name a task")
    settings = load_config(config, None)

    if output is not None:
        _require_new(output, overwrite)

    from vllm_proxy.evaluate.systems import systems_of
    from vllm_proxy.evaluate.tuned import read_tuned

    chosen = systems_of(settings, systems.split(",") if systems else None, strengths)
    other = None if tuned is None else read_tuned(tuned)

    def prepare() -> "Evaluation":
        from vllm_proxy.evaluate.run import Evaluation
        from vllm_proxy.evaluate.tasks import select_tasks

        selection = select_tasks(
            specs,
            include,
            num_fewshot=num_fewshot,
            confirm_run_unsafe_code=confirm_run_unsafe_code,
        )
        evaluation = Evaluation(
            settings,
            chosen,
            selection,
            tuned=other,
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=apply_chat_template,
            confirm_run_unsafe_code=confirm_run_unsafe_code,
            cache=cache,
            samples=f"{output}.samples" if log_samples else None,
        )
        evaluation.require_valid()
        return evaluation

    _run_evaluation(prepare, output, arguments, quiet=quiet, verbose=verbose)


def _require_new(output: str, overwrite: bool) -> None:
    path = Path(output)
    reason = None
    if path.is_dir():
        reason = "it is a directory; give a file"
    elif not path.parent.is_dir():
        reason = "its directory does not exist; give a file in one that does"
    elif path.exists() and not overwrite:
        reason = "it exists; add --overwrite to replace it, or give another"
    if reason:
        raise ProxyConfigError(f"--output {output!r}: {reason}")


def _run_evaluation(
    prepare: "Callable[[], Evaluation]",
    output: str | None,
    arguments: dict[str, Any],
    *,
    quiet: bool,
    verbose: bool,
) -> None:
    from rich.console import Console

    from vllm_proxy.cli.quiet import quiet_engine

    cache = arguments["cache"]
    then = "run the same command to continue" if cache else "with --cache DIR it could be continued"
    evaluation = None
    try:
        with quiet_engine(verbose) as hushed:
            terminal = hushed.terminal
            try:
                if not quiet and terminal.isatty():
                    typer.echo("reading tasks and models …", file=terminal)
                evaluation = prepare()
                for note in evaluation.selection.notes:
                    typer.echo(note, file=terminal)
                with keeping_ctrl_c() as check, _bars(terminal, quiet, check) as show:
                    evaluation.run(*show)
                metrics, record = evaluation.metrics(), evaluation.record(arguments)
            except KeyboardInterrupt:
                done = ", ".join(evaluation.results) if evaluation else ""
                typer.echo(f"interrupted: {done or 'no system'} finished; {then}", file=terminal)
                raise
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except ProxyConfigError as error:
        if not (evaluation and evaluation.results):
            raise
        done = ", ".join(evaluation.results)
        raise ProxyConfigError(f"{error}; {done} finished; {then}") from None
    for name, count in evaluation.cut.items():
        if count:
            say(f"{name}: {count} contexts were too long for the engine and lost their beginning")

    from vllm_proxy.evaluate.scores import print_table

    print_table(Console(), metrics, evaluation.every, evaluation.parts)
    if output is not None:
        from vllm_proxy.evaluate.run import write

        write(record, output)
        say(f"everything that was measured -> {output}")


@contextmanager
def keeping_ctrl_c() -> Iterator[Callable[[], None]]:
    """Yield what raises a Ctrl-C again that some library has swallowed."""
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # as of a job in the background
        signal.signal(signal.SIGINT, press)
    try:
        yield check
    except Exception:
        check()  # an engine gets its own Ctrl-C, and dies of it
        raise
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _bars(
    terminal: IO[str], quiet: bool, check: Callable[[], None]
) -> "Iterator[tuple[Callable[[System], Progress], Callable[[System], None]]]":
    """Yield what shows how far systems are: a bar each on a terminal, else a line at its end.

    *check* is called after every answer.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("requests"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    is_terminal = terminal.isatty()
    console = Console(file=terminal)
    with Progress(*columns, console=console, disable=quiet or not is_terminal) as bars:

        def progress_of(system: "System") -> "Callable[[int, int], None]":
            bar = bars.add_task(system.name, total=None)

            def progress(done: int, total: int) -> None:
                check()
                bars.update(bar, completed=done, total=total)

            return progress

        def on_done(system: "System") -> None:
            if not quiet and not is_terminal:
                typer.echo(f"{system.name}: done", file=terminal)

        yield progress_of, on_done
