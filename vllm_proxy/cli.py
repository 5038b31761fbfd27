"""`vllm-proxy generate | inspect | evaluate | serve | check | plan`: options in, exit codes out.

Exit codes: 0 for success, 1 when some rows of a batch could not be answered, 2 for a mistake in
the configuration or the options and for an engine that fails, 130 after Ctrl-C, and 141 when
whoever reads the output has gone, as of a program that SIGPIPE ends.
"""

import json
import math
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from vllm_proxy import __version__
from vllm_proxy.config.errors import ProxyConfigError

if TYPE_CHECKING:
    from vllm_proxy.config.schema import ProxyConfig
    from vllm_proxy.evaluate.lm import Progress
    from vllm_proxy.evaluate.run import Evaluation
    from vllm_proxy.evaluate.systems import System
    from vllm_proxy.jobs.inspect.job import InspectJob
    from vllm_proxy.jobs.job import Job, Summary
    from vllm_proxy.jobs.ray_job import Replicas

# Whatever a command needs is imported inside it: `--help` must not wait for torch and vLLM.


class _Commands(TyperGroup):
    """Reports every mistake of the user as one line."""

    def main(self, *args: Any, **kwargs: Any) -> None:
        """Run the command line and exit."""
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except typer.TyperException as error:
            _say(f"error: {error.format_message()}")
            code = 2
        except (ProxyConfigError, OSError) as error:
            _say(f"error: {error}")
            code = 2
        sys.exit(code or 0)


class _Generate(TyperCommand):
    """Lets `--ray` stand without its value, which Typer cannot."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give the option an empty value where none follows."""
        words: list[str] = []
        for word, after in zip(args, [*args[1:], "-"], strict=True):
            words += [word, ""] if word == "--ray" and after.startswith("-") else [word]
        return super().parse_args(ctx, words)


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Proxy tuning at vLLM speed: logits = base + alpha * (expert - antiexpert).",
)

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file: the three models.")]
Alpha = Annotated[
    str | None,
    typer.Option(metavar="A", help="A number, or adaptive, instead of the configuration's."),
]


_READER_GONE = 128 + signal.SIGPIPE


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vllm-proxy {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which version.")
    ] = False,
) -> None:
    pass


def _load(path: str, alpha: str | None, sampling: dict[str, Any] | None = None) -> "ProxyConfig":
    """Read the configuration and lay the options over it. Raises `ProxyConfigError`."""
    from vllm_proxy.config.schema import ProxyConfig

    config = ProxyConfig.from_yaml(path)
    if alpha is not None:
        config = config.model_copy(update={"alpha": _strength(alpha)})
    return config.model_copy(update={"sampling": {**config.sampling, **(sampling or {})}})


def _strength(text: str) -> float | str:
    from vllm_proxy.config.strength import ADAPTIVE, MOST_STRENGTH, is_weight

    if text == ADAPTIVE:
        return text
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    most = f"give a finite number, at most {MOST_STRENGTH:g} either way, or {ADAPTIVE}"
    _require("--alpha", text, is_weight(alpha), most)
    return alpha


def _require(option: str, value: object, holds: bool, remedy: str) -> None:
    if not holds:
        raise ProxyConfigError(f"{option} is {value!r}; {remedy}")


@app.command(cls=_Generate)
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

    _require("--top-k", top_k, top_k is None or top_k >= -1, "give a count, or 0 for all")
    _require("--logprobs", logprobs, logprobs is None or logprobs >= -1, "give a count, -1 for all")
    sampling = _sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        logprobs=logprobs,
    )
    _require_counts(limit, restarts)
    settings = _load(config, alpha, sampling)
    where = {"limit": limit, "ordered": ordered, "overwrite": overwrite}
    with open_job(settings, input, output, replicas=_replicas(ray, replicas), **where) as job:
        if job.finished:
            job.output.finish()
            _say(f"{output}: finished already: {job.done} rows ({job.output.failed} errors)")
        else:
            _run(job, restarts, quiet=quiet, verbose=verbose)
        raise typer.Exit(1 if job.output.failed else 0)


def _sampling(**options: Any) -> dict[str, Any]:
    """Return the options that are given, once those of all commands are checked."""
    given = {key: value for key, value in options.items() if value is not None}
    temperature, top_p = given.get("temperature", 0), given.get("top_p", 1)
    finite = math.isfinite(temperature) and temperature >= 0
    _require("--temperature", temperature, finite, "give a number >= 0")
    _require("--top-p", top_p, 0 < top_p <= 1, "give a number in (0, 1]")
    max_tokens = given.get("max_tokens", 1)
    _require("--max-tokens", max_tokens, max_tokens > 0, "give at least 1")
    return given


def _require_counts(limit: int | None, restarts: int) -> None:
    _require("--limit", limit, limit is None or limit > 0, "give at least 1")
    _require("--restarts", restarts, restarts >= 0, "give a count, or 0 for none")


def _replicas(address: str | None, bounds: str | None) -> "Replicas | None":
    """Read `--ray` and `--replicas`; one implies the other."""
    if address is None and bounds is None:
        return None
    from vllm_proxy.jobs.ray_job import Replicas

    least, _, most = (bounds or "1").partition(":")
    counts = [int(count) if count.isdecimal() else 0 for count in (least, most or least)]
    _require("--replicas", bounds, 0 < counts[0] <= counts[1], "give a count, or two as in 2:8")
    return Replicas(*counts, address or None)


def _run(job: "Job", restarts: int, *, quiet: bool, verbose: bool, kept: bool = True) -> None:
    """Complete a job; *kept*: whether its output stays."""
    from vllm_proxy.quiet import quiet_engine

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
        _say(f"--output {job.output.name}: nobody reads it any more; {job.summary.rows} rows went")
        raise typer.Exit(_READER_GONE) from None
    except ProxyConfigError as error:
        if not job.summary.rows:
            raise
        raise ProxyConfigError(f"{error}; {there(job.summary.rows)}") from None
    if not quiet:
        before = f"; {job.done} rows were there before" if job.done else ""
        _say(f"{job.summary} -> {job.output.name}{before}" if kept else str(job.summary))


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


@app.command()
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
        _require("--prompt", text, text != "", "give at least one token")
    kept = 1 <= top_k <= MOST_TOP_K
    _require("--top-k", top_k, kept, f"give a count from 1 to {MOST_TOP_K}")
    is_lines = output is None or not (output == "-" or output.endswith(".parquet"))
    _require("--output", output, is_lines, "give a file of JSON lines, for it is read again")
    sampling = _sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    _require_counts(limit, restarts)
    settings = _load(config, alpha, sampling)
    rows = Prompts(prompt[:limit]) if prompt else Input(input, limit)
    if html is not None:
        others = {os.path.abspath(path) for path in (output, *rows.paths) if path}
        _require("--html", html, os.path.abspath(html) not in others, "give another path")
        require_free(html, overwrite=overwrite)
    with TemporaryDirectory(prefix="vllm-proxy-") as nowhere:
        target = output or f"{nowhere}/records.jsonl"
        with InspectJob(
            settings, rows, target, top_k=top_k, keep=output is not None, overwrite=overwrite
        ) as job:
            if job.finished:
                job.output.finish()
                _say(f"{output}: finished already: {job.done} rows ({job.output.failed} errors)")
            else:
                _run(job, restarts, quiet=quiet, verbose=verbose, kept=output is not None)
            _show(job, html, quiet=quiet, kept=output is not None)
            raise typer.Exit(1 if job.output.failed else 0)


def _show(job: "InspectJob", html: str | None, *, quiet: bool, kept: bool) -> None:
    """Print tables of a job that is done, and write its page; errors, too, if nothing else does."""
    from rich.console import Console

    from vllm_proxy.jobs.inspect.summary import render

    summary = job.summary_of_shift()
    if not kept:
        for record in filter(lambda record: "error" in record, job.records()):
            _say(f"row {record['index'] + 1}: {record['error']}")
    if not quiet:
        Console().print(render(summary))
    if html is not None:
        shown = job.write_page(html, summary)
        part = f"the first {shown}" if shown < summary.records else "all"
        _say(f"{html}: {part} of {summary.records} rows")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    config: Config,
    alpha: Alpha = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the command on standard output, and exit.")
    ] = False,
) -> None:
    """Serve the OpenAI API. Every option of `vllm serve` may follow CONFIG."""
    from vllm_proxy.config.redaction import HIDDEN, shown_words
    from vllm_proxy.preflight.check.run import require_valid
    from vllm_proxy.server.command import become, environment, serve_command, unserved

    settings = _load(config, alpha)
    command = serve_command(settings, context.args)
    require_valid(settings)
    if note := unserved(settings):
        _say(note)
    additions = environment(settings)
    words = shown_words(command)
    hidden = [*additions, *([f"what is shown as {HIDDEN}"] if words != command else [])]
    printed = shlex.join(words)
    if dry_run:
        if hidden:
            _say(f"note: secrets are not printed; set {' and '.join(hidden)} before you run it")
        typer.echo(printed)
    else:
        _say(printed)
        become(command, additions)


@app.command()
def check(config: Config) -> None:
    """Say whether the three models fit together, and what to do if not."""
    from rich.console import Console

    from vllm_proxy.preflight.check.run import check, render

    report = check(_load(config, None))
    Console().print(render(report))
    if report.problems:
        raise typer.Exit(2)


@app.command()
def plan(
    config: Config,
    gpu: Annotated[
        str,
        typer.Option(metavar="NAME", help="H100-80G, A100-80G, …; or here, which is measured."),
    ],
    tp: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tensor-parallel ranks; else the configuration's, or 1."),
    ] = None,
    pp: Annotated[int | None, typer.Option(metavar="N", help="Pipeline stages, likewise.")] = None,
    gpus: Annotated[
        int | None, typer.Option(metavar="N", help="Try all layouts of so many GPUs instead.")
    ] = None,
    concurrency: Annotated[int, typer.Option(metavar="N", help="Requests at once.")] = 256,
    context: Annotated[
        int, typer.Option(metavar="TOKENS", help="What each has in its KV cache.")
    ] = 2048,
    prompt: Annotated[
        int | None, typer.Option(metavar="TOKENS", help="To prefill; else as long as --context.")
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="A JSON object on standard output; the tables go to the other."
        ),
    ] = False,
) -> None:
    """Say what the models take of GPUs: memory, requests, time of a step. Reads no weights."""
    from rich.console import Console

    from vllm_proxy.preflight.plan import Demand, as_record, render
    from vllm_proxy.preflight.plan import plan as make_plan

    counts = {"tp": tp, "pp": pp, "gpus": gpus, "concurrency": concurrency, "context": context}
    for name, value in {**counts, "prompt": prompt}.items():
        _require(f"--{name}", value, value is None or value > 0, "give at least 1")
    demand = Demand(concurrency, context, prompt or context)
    found = make_plan(_load(config, None), gpu, demand, tp=tp, pp=pp, gpus=gpus)
    Console(stderr=as_json).print(render(found))
    if as_json:
        typer.echo(json.dumps(as_record(found)))


@app.command()
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
    _require("--limit", limit, limit is None or limit > 0, "give at least 1")
    _require("--num-fewshot", num_fewshot, num_fewshot is None or num_fewshot >= 0, "give a count")
    needs = "it needs --output FILE.json"
    _require("--log-samples", log_samples, output is not None or not log_samples, needs)
    strengths = [_strength(text) for text in alpha or ()]
    specs = [spec.strip() for spec in tasks.split(",") if spec.strip()]
    _require("--tasks", tasks, bool(specs), "name a task")
    settings = _load(config, None)

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

    from vllm_proxy.quiet import quiet_engine

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
                with _keeping_ctrl_c() as check, _bars(terminal, quiet, check) as show:
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
            _say(f"{name}: {count} contexts were too long for the engine and lost their beginning")

    from vllm_proxy.evaluate.scores import print_table

    print_table(Console(), metrics, evaluation.every, evaluation.parts)
    if output is not None:
        from vllm_proxy.evaluate.run import write

        write(record, output)
        _say(f"everything that was measured -> {output}")


@contextmanager
def _keeping_ctrl_c() -> Iterator[Callable[[], None]]:
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
