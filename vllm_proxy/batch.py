"""A batch job: rows of a file in, one record a row out, resumable after any kind of death.

Every record is written and flushed when its row finishes, so the output itself says what is done.
Beside it, `OUTPUT.job.json` says what job it belongs to; a job that is started again with the same
models, parameters and input generates only the rows that are missing.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from vllm_proxy.config import ROLES, ProxyConfig
from vllm_proxy.control import PREFIX
from vllm_proxy.errors import ProxyConfigError
from vllm_proxy.files import STANDARD_STREAM, Input, Output
from vllm_proxy.rows import Row, answer, failure, parse_row, row_id, sampling_params

if TYPE_CHECKING:
    from vllm import SamplingParams

    from vllm_proxy.engine import ProxyLLM

FORMAT = 1
"""Version of the fingerprint and of the records; a job is not resumed across versions."""

_RESOURCES = frozenset(
    {
        "cpu_offload_gb",
        "disable_log_stats",
        "distributed_executor_backend",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "max_num_batched_tokens",
        "max_num_seqs",
        "pipeline_parallel_size",
        "tensor_parallel_size",
        "use_tqdm_on_load",
    }
)
"""Engine arguments that say where a job runs, not what it computes. They may change between runs:
a job that died for want of memory is resumed with less."""


def fingerprint(config: ProxyConfig, source: Input) -> dict[str, Any] | None:
    """Return all that a job's records depend on; None if its input cannot be read twice."""
    if source.sha256 is None:
        return None
    engine = {key: value for key, value in config.engine.items() if key not in _RESOURCES}
    section = config.hf_overrides()["proxy"]
    values = {
        "format": FORMAT,
        **{role: str(config.member(role)) for role in ROLES},
        **{key: section[key] for key in ("alpha", "filters", "chat") if key in section},
        "engine": engine,
        "sampling": config.sampling,
        "input": {"sha256": source.sha256, "lines_are": "text" if source.text else "json"},
    }
    # As it will be read back: JSON knows neither tuples nor keys that are numbers.
    return json.loads(json.dumps(values, default=str))


@dataclass
class Summary:
    """What one run of a job did, in rows, tokens and seconds."""

    rows: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0

    def add(self, record: dict[str, Any]) -> None:
        """Count *record*."""
        self.rows += 1
        self.errors += "error" in record
        self.prompt_tokens += record.get("prompt_tokens", 0)
        self.generated_tokens += record.get("completion_tokens", 0)

    def __str__(self) -> str:
        speed = self.generated_tokens / self.seconds if self.seconds else 0.0
        return (
            f"{self.rows} rows ({self.errors} errors), {self.prompt_tokens} prompt tokens, "
            f"{self.generated_tokens} generated tokens in {self.seconds:.1f} s: "
            f"{speed:.1f} tokens/s"
        )


class Job:
    """Answers every row of *source* that has no record yet, many at once, in bounded memory.

    Args:
        config: the model and the parameters of rows that give none of their own.
        source: path of the input (`.jsonl`, or `.txt` with a prompt a line), or `-`.
        target: path of the output, or `-`.
        limit: answer only the first so many rows.
        overwrite: replace an output of another job.

    Attributes:
        done: number of rows that had a record before this run.
        summary: what this run has done so far.

    Raises:
        ProxyConfigError: input or output cannot be used; raised before an engine is started.
    """

    def __init__(
        self,
        config: ProxyConfig,
        source: str,
        target: str,
        *,
        limit: int | None = None,
        overwrite: bool = False,
    ) -> None:
        _require_one_answer(config.sampling.get("n", 1))
        self.config = config
        self.input = Input(source, limit)
        if STANDARD_STREAM not in (source, target) and (
            Path(target).exists() and Path(target).samefile(source)
        ):
            raise ProxyConfigError(f"--output {target!r} is the input; give another path")
        self.output = Output(
            target, fingerprint(config, self.input), self.input.rows, overwrite=overwrite
        )
        self.done = self.output.done.count(1)
        self.summary = Summary()
        self._in_flight: dict[str, tuple[int, Row, SamplingParams]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.output.close()

    @property
    def resumable(self) -> bool:
        """Whether the job, started again, will go on where it was."""
        return self.output.resumable

    @property
    def finished(self) -> bool:
        """Whether no row is left to answer."""
        return self.resumable and self.done == self.input.rows

    def run(self, llm: "ProxyLLM", progress: Callable[[Summary], None] = lambda _: None) -> Summary:
        """Answer the missing rows; records come in the order in which rows finish.

        Args:
            llm: an engine built from the job's config.
            progress: called after every record.

        Returns:
            What this run did.

        Raises:
            ProxyConfigError: the config's own sampling parameters are wrong, or the output cannot
                be written, for instance because the disk is full.
        """
        # The checkpoint's generation config comes first, as in `LLM.generate`.
        own = llm.model_config.get_diff_sampling_param()
        defaults = {**own, **self.config.sampling}
        default_params = sampling_params(defaults)
        _verify(llm, default_params)
        # The engine should never wait for rows, and memory should not grow with the input.
        capacity = 4 * llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
        self.output.begin()
        started = time.perf_counter()

        def finish(record: dict[str, Any]) -> None:
            self.output.write(record)
            self.summary.add(record)
            self.summary.seconds = time.perf_counter() - started
            progress(self.summary)

        def step() -> None:
            for output in llm.llm_engine.step():
                if output.finished:
                    index, row, params = self._in_flight.pop(output.request_id)
                    finish(answer(index, row, output, params, self.config.alpha))

        with closing(self._missing()) as rows:
            for index, line in rows:
                row = None
                try:
                    row = parse_row(line, text=self.input.text)
                    params = default_params
                    if row.sampling:
                        params = sampling_params({**defaults, **row.sampling})
                        _verify(llm, params)
                    self._in_flight[_enqueue(llm, row, params)] = index, row, params
                except ProxyConfigError as error:
                    finish(failure(index, row.id if row else row_id(line), str(error)))
                while len(self._in_flight) >= capacity:
                    step()
        while self._in_flight:
            step()
        return self.summary

    def _missing(self) -> Iterator[tuple[int, bytes]]:
        done = self.output.done
        return ((i, line) for i, line in self.input.lines() if i >= len(done) or not done[i])


def _require_one_answer(n: object) -> None:
    if n != 1:
        raise ProxyConfigError(f"`sampling.n` is {n!r}: a row has one answer; repeat the row")


def _verify(llm: "ProxyLLM", params: "SamplingParams") -> None:
    """Refuse parameters that this engine cannot honour. Raises `ProxyConfigError`."""
    _require_one_answer(params.n)
    config = llm.llm_engine.vllm_config
    if llm.llm_engine.tokenizer is None and (params.stop or params.bad_words):
        raise ProxyConfigError(
            "`sampling`: `stop` and `bad_words` are text, and the engine has no tokenizer; "
            "remove `engine.skip_tokenizer_init`"
        )
    with _one_line("sampling"):
        params.verify(
            config.model_config,
            config.speculative_config,
            config.structured_outputs_config,
            llm.llm_engine.tokenizer,
        )


@contextmanager
def _one_line(field: str) -> Iterator[None]:
    """Turn what vLLM says of bad input into a `ProxyConfigError` that names *field*."""
    from vllm.exceptions import VLLMClientError

    try:
        yield
    except ProxyConfigError as error:  # of the row's own values, which it gives without our prefix
        raise ProxyConfigError(str(error).replace(f"`{PREFIX}", "`")) from None
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
        VLLMClientError,
    ) as error:
        message = " ".join(str(error.args[0] if error.args else error).split())
        raise ProxyConfigError(f"`{field}`: {message or type(error).__name__}") from None


def _enqueue(llm: "ProxyLLM", row: Row, params: "SamplingParams") -> str:
    """Hand a row to the engine as `generate` and `chat` do, and return its request's id.

    Raises:
        ProxyConfigError: vLLM refuses the row: too long, unknown ids, no chat template, ….
    """
    kind = row.kind
    if kind == "prompt_token_ids":
        # vLLM checks this only where it has a tokenizer; an id too large ends the engine.
        size = llm.model_config.get_vocab_size()
        wrong = next((id_ for id_ in row.prompt_token_ids if not 0 <= id_ < size), None)
        if wrong is not None:
            raise ProxyConfigError(
                f"`prompt_token_ids` has {wrong}; ids of the base go from 0 to {size - 1}"
            )
    if own := row.control.to_request():
        params = copy(params)
        params.extra_args = {**(params.extra_args or {}), **own}
    with _one_line(kind):
        if kind == "messages":
            ids = llm.enqueue_chat([row.messages], params, use_tqdm=False)
        else:
            ids = llm.enqueue([{kind: getattr(row, kind)}], params, use_tqdm=False)
    # The engine makes ids unique by a suffix, which it does not show in its outputs.
    return ids[0].partition("-")[0]
