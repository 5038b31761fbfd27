"""`vllm-proxy evaluate`."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from vllm_proxy.cli.options import (
    Config,
    Limit,
    Overwrite,
    Quiet,
    Verbose,
    load_config,
    parse_strength,
    require,
    say,
)
from vllm_proxy.cli.run import progress_bars, running

if TYPE_CHECKING:
    from vllm_proxy.evaluate.lm import Progress
    from vllm_proxy.evaluate.run import Evaluation
    from vllm_proxy.evaluate.systems import System


def evaluate(
    context: typer.Context,
    config: Config,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE.yaml[,…]",
            help="Tasks, groups or tags of lm-evaluation-harness, patterns such as 'arc_*', or "
            "task files.",
        ),
    ],
    include: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Directory with more tasks; they override the harness's own."
        ),
    ] = None,
    systems: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,…]",
            help="Which of proxy, base, expert and antiexpert to score. The default is the first "
            "three.",
        ),
    ] = None,
    tuned: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL|FILE.yaml",
            help="A directly tuned model to compare with: a directory, a Hub id, or a file with "
            "{model: …, revision: …, lora: …, engine: …}.",
        ),
    ] = None,
    alpha: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A",
            help='Strength of the proxy: a number, or "adaptive". Overrides `alpha` in CONFIG. Can '
            "be repeated; the table has one row for each.",
        ),
    ] = None,
    limit: Limit = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Number of examples before each question. The default is the task's own.",
        ),
    ] = None,
    apply_chat_template: Annotated[
        bool,
        typer.Option(
            "--apply-chat-template",
            help="Ask each question as a conversation. `chat` in CONFIG decides how each member "
            "sees it.",
        ),
    ] = False,
    confirm_run_unsafe_code: Annotated[
        bool,
        typer.Option(
            "--confirm-run-unsafe-code", help="Allow tasks that run code written by the models."
        ),
    ] = False,
    output: Annotated[
        str | None,
        typer.Option(metavar="FILE.json", help="Write all settings, scores and timings here."),
    ] = None,
    log_samples: Annotated[
        bool,
        typer.Option(
            "--log-samples",
            help="Also write every question and answer, to a directory named FILE.json.samples.",
        ),
    ] = False,
    overwrite: Overwrite = False,
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Cache answers in this directory; an interrupted run resumes from it.",
        ),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Score proxy, base, expert and a directly tuned model with lm-evaluation-harness."""
    require("--limit", limit, limit is None or limit > 0, "give at least 1")
    require("--num-fewshot", num_fewshot, num_fewshot is None or num_fewshot >= 0, "give a count")
    has_output = output is not None or not log_samples
    require("--log-samples", log_samples, has_output, "add --output FILE.json")
    strengths = [parse_strength(text) for text in alpha or ()]
    specs = [spec.strip() for spec in tasks.split(",") if spec.strip()]
    require("--tasks", tasks, bool(specs), "name a task")
    settings = load_config(config, None)

    from vllm_proxy.evaluate.systems import systems_of
    from vllm_proxy.evaluate.tuned import read_tuned
    from vllm_proxy.jobs.files import require_free_path

    if output is not None:
        require_free_path("--output", output, overwrite=overwrite)
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

    # `params` has an empty tuple for a repeatable option that is not given.
    _run(prepare, {**context.params, "alpha": alpha})


def _run(prepare: "Callable[[], Evaluation]", arguments: dict[str, Any]) -> None:
    """Prepare and run an evaluation, print its scores and write its record.

    Args:
        prepare: makes the evaluation; called where output is kept quiet.
        arguments: of the command; they are part of the record.
    """
    from rich.console import Console

    quiet, output = arguments["quiet"], arguments["output"]
    evaluation: Evaluation | None = None

    def finished() -> str:
        return ", ".join(evaluation.results) if evaluation else ""

    def what_remains() -> str:
        then = "add --cache DIR to be able to continue"
        if arguments["cache"]:
            then = "run the same command to continue"
        return f"{finished() or 'no system'} finished; {then}"

    with running(arguments["verbose"], what_remains=what_remains, any_remains=finished) as streams:
        terminal = streams.terminal
        if not quiet and terminal.isatty():
            typer.echo("reading tasks and models …", file=terminal)
        evaluation = prepare()
        for note in evaluation.selection.notes:
            typer.echo(note, file=terminal)
        with keeping_ctrl_c() as check, _progress(terminal, quiet, check) as show:
            evaluation.run(*show)
        metrics, record = evaluation.metrics(), evaluation.record(arguments)

    from vllm_proxy.evaluate.run import write
    from vllm_proxy.evaluate.scores import print_table

    for name, count in evaluation.cut.items():
        if count:
            say(f"{name}: {count} contexts were too long for the engine and lost their beginning")
    print_table(Console(), metrics, evaluation.every, evaluation.parts)
    if output is not None:
        write(record, output)
        say(f"all settings, scores and timings -> {output}")


@contextmanager
def keeping_ctrl_c() -> Iterator[Callable[[], None]]:
    """Yield a function that raises `KeyboardInterrupt` again if a library has swallowed it."""
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # a job in the background ignores Ctrl-C
        signal.signal(signal.SIGINT, press)
    try:
        yield check
    except Exception:
        check()  # the engine's process also received the Ctrl-C, and died
        raise
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _progress(
    terminal: IO[str], quiet: bool, check: Callable[[], None]
) -> "Iterator[tuple[Callable[[System], Progress], Callable[[System], None]]]":
    """Yield the functions that show progress: one bar per system, or one line when it is done.

    *check* is called after every answer.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar_columns = "{task.description}", BarColumn(), MofNCompleteColumn(), "requests"
    columns = *bar_columns, TimeElapsedColumn(), TimeRemainingColumn()
    with progress_bars(terminal, quiet, *columns) as bars:

        def progress_of(system: "System") -> "Callable[[int, int], None]":
            bar = bars.add_task(system.name, total=None)

            def progress(done: int, total: int) -> None:
                check()
                bars.update(bar, completed=done, total=total)

            return progress

        def on_done(system: "System") -> None:
            if not quiet and not terminal.isatty():
                typer.echo(f"{system.name}: done", file=terminal)

        yield progress_of, on_done
