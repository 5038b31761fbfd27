"""A batch job: rows in, one record per row out, resumable after a crash or a kill.

Every record is written and flushed when its row finishes, so the output itself shows which rows are
done. `OUTPUT.job.json` next to it identifies the job. A job that is started again with the same
models, parameters and input answers only the rows that have no record.
"""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Self

from vllm_proxy.config.engine_arguments import RESOURCES
from vllm_proxy.config.errors import EngineDiedError, ProxyConfigError
from vllm_proxy.config.redaction import without_secrets
from vllm_proxy.config.roles import ROLES
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.jobs import RESTARTS
from vllm_proxy.jobs.inputs import STANDARD_STREAM, Input, Line
from vllm_proxy.jobs.outputs import Output, companion_files
from vllm_proxy.jobs.records import OWN_FORMAT, RecordFormat
from vllm_proxy.jobs.rows import row_id
from vllm_proxy.jobs.suspects import Suspects

FORMAT = 1
"""Version of the fingerprint and of the records; a job is not resumed across versions."""


def fingerprint(config: ProxyConfig, source: Input) -> dict[str, Any] | None:
    """Return everything that a job's records depend on; None if its input cannot be read twice."""
    if source.sha256 is None:
        return None
    engine = without_secrets({k: v for k, v in config.engine.items() if k not in RESOURCES})
    section = config.hf_overrides()["proxy"]
    values: dict[str, Any] = {
        "format": FORMAT,
        **{role: str(config.member(role)) for role in ROLES},
        **{key: section[key] for key in ("alpha", "filters", "chat") if key in section},
        "engine": engine,
        "sampling": config.sampling,
        "input": {"sha256": source.sha256, "lines_are": "text" if source.is_text else "json"},
    }
    # As it will be read from the file: JSON has neither tuples nor keys that are numbers.
    return json.loads(json.dumps(values, default=str))


@dataclass
class Summary:
    """Counts of one run of a job: rows, tokens and seconds."""

    rows: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0

    @property
    def answered(self) -> int:
        """Number of rows that an engine has answered."""
        return self.rows - self.errors

    def add(self, record: dict[str, Any], record_format: RecordFormat = OWN_FORMAT) -> None:
        """Count *record*."""
        prompt_tokens, generated_tokens = record_format.tokens(record)
        self.rows += 1
        self.errors += record_format.is_error(record)
        self.prompt_tokens += prompt_tokens
        self.generated_tokens += generated_tokens

    def __str__(self) -> str:
        speed = self.generated_tokens / self.seconds if self.seconds else 0.0
        return (
            f"{self.rows} rows ({self.errors} errors), {self.prompt_tokens} prompt tokens, "
            f"{self.generated_tokens} generated tokens in {self.seconds:.1f} s: "
            f"{speed:.1f} tokens/s"
        )


_REPEATS = "no other engine is started: each one dies of this before it answers a row"


class Job(ABC):
    """Answers every row of its input that has no record yet, many at once, in bounded memory.

    Args:
        config: the model, and the parameters of rows that set none.
        source: the rows.
        target: path of the output, or `-`.
        ordered: sort the records by row at the end.
        overwrite: replace the output of another job.

    Attributes:
        done: number of rows that had a record before this run.
        summary: counts of this run so far.
        in_flight: rows that were read and have no record yet, by index.

    Raises:
        ProxyConfigError: input or output cannot be used; raised before an engine is started.
    """

    record_format: ClassVar[RecordFormat] = OWN_FORMAT
    restarts_engines: ClassVar[bool] = True
    """Whether `complete` starts another engine after one died; otherwise `answer` does."""
    isolates_rows: ClassVar[bool] = False
    """Whether `answer` can submit a row alone, to find one that kills engines."""

    def __init__(
        self,
        config: ProxyConfig,
        source: Input,
        target: str,
        *,
        ordered: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.config = config
        self.input = source
        if target != STANDARD_STREAM:
            _require_other_files(source, target)
        self.output = Output(
            target,
            self.fingerprint(),
            source.rows,
            self.record_format,
            total=source.total,
            ordered=ordered,
            overwrite=overwrite,
        )
        self.done = self.output.done.count(1)
        self.summary = Summary()
        self.in_flight: dict[int, Line] = {}
        self._suspects = Suspects(isolates=self.isolates_rows)
        self._rows: Iterator[Line] | None = None
        self._started = 0.0
        self._has_begun = False
        self._progress: Callable[[Summary], None] = lambda _: None
        self._restarts = RESTARTS
        self._on_restart: Callable[[EngineDiedError, int], None] = lambda *_: None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.output.close()

    def fingerprint(self) -> dict[str, Any] | None:
        """Return everything that the records depend on; None if the job cannot be resumed."""
        return fingerprint(self.config, self.input)

    @property
    def resumable(self) -> bool:
        """Whether the job continues where it stopped if it is started again."""
        return self.output.resumable

    @property
    def finished(self) -> bool:
        """Whether every row already has a record."""
        return self.resumable and self.done == self.input.rows

    def complete(
        self,
        progress: Callable[[Summary], None] = lambda _: None,
        *,
        restarts: int = RESTARTS,
        on_restart: Callable[[EngineDiedError, int], None] = lambda *_: None,
    ) -> Summary:
        """Start an engine, answer the missing rows, and start another engine if it dies.

        Args:
            progress: called after every record.
            restarts: start another engine at most this many times; with several engines, for each
                of them.
            on_restart: called with the error that ended an engine, and the number of restarts that
                remain after the coming one.

        Returns:
            The counts of this run.

        Raises:
            ProxyConfigError: the configuration's sampling parameters are wrong, or the output
                cannot be written, for instance because the disk is full.
            EngineDiedError: no restart is left, or another engine would die of the same cause.
        """
        self._restarts = restarts
        self._on_restart = on_restart
        left = restarts if self.restarts_engines else 0
        while True:
            before = self.summary.answered
            try:
                with self.engine() as engine:
                    self.run(engine, progress)
                break
            except EngineDiedError as error:
                if not self._found_a_row(error, answered=self.summary.answered > before):
                    if not left:
                        raise
                    left -= 1
                on_restart(error, left)
        self.output.finish()
        return self.summary

    def _found_a_row(self, error: EngineDiedError, *, answered: bool) -> bool:
        """Return whether a row is known to kill engines; if so, write a failure as its record.

        Args:
            error: ended the engine.
            answered: whether this engine had answered a row.

        Raises:
            EngineDiedError: another engine would die of the same cause.
        """
        ever = self.summary.answered > 0 or self.done > self.output.failed
        blame = self._suspects.blame(self.in_flight, answered=answered, ever=ever)
        if blame.row is not None:
            line = self.in_flight[blame.row]
            reason = "an engine died each time this row was submitted; leave it out"
            id_ = None if line.is_text else row_id(line.data)
            self.finish(self.record_format.failure(line.index, id_, reason))
            return True
        if blame.engine:
            raise EngineDiedError(str(error), _REPEATS) from error
        return False

    @abstractmethod
    def engine(self) -> AbstractContextManager[Any]:
        """Start the engine that `run` needs. Raises what vLLM raises."""

    @abstractmethod
    def answer(self, engine: Any) -> None:
        """Answer all rows of `lines` with *engine*, in the order in which they finish.

        Raises `EngineDiedError`, after which another engine may continue.
        """

    def run(self, engine: Any, progress: Callable[[Summary], None] = lambda _: None) -> Summary:
        """Answer the missing rows with *engine*; `complete` also starts it."""
        self._progress = progress
        if not self._has_begun:
            self._has_begun = True
            self._started = time.perf_counter()
            self.output.begin()
        self.answer(engine)
        return self.summary

    def lines(self) -> Iterator[Line]:
        """Yield the rows that have no record; first those that a dead engine left unanswered."""
        again = self._suspects.in_order(self.in_flight.values())
        if self._rows is None:
            self._rows = self.input.missing(self.output.done)
        for line in chain(again, self._rows):
            self.in_flight[line.index] = line
            yield line

    def finish(self, record: dict[str, Any]) -> None:
        """Write the record of a row of `lines`."""
        self.write(record)
        del self.in_flight[self.record_format.index(record)]

    def write(self, record: dict[str, Any]) -> None:
        """Write and count a record."""
        record = self.output.write(record)
        self.summary.add(record, self.record_format)
        self.summary.seconds = time.perf_counter() - self._started
        self._progress(self.summary)


def _require_other_files(source: Input, target: str) -> None:
    """Reject an output, or a file next to it, that is also an input. Raises `ProxyConfigError`."""
    for path in source.paths:
        for written in map(Path, (target, *companion_files(target))):
            if path != STANDARD_STREAM and written.exists() and written.samefile(path):
                raise ProxyConfigError(
                    "it is the input",
                    field=f"--output {str(written)!r}",
                    remedy="give another path",
                )
