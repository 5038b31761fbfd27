"""From rows to records: one engine that is asked many rows at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from textwrap import shorten
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_proxy.config.errors import EngineDiedError, ProxyConfigError
from vllm_proxy.config.request import PREFIX
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.jobs.inputs import Line
from vllm_proxy.jobs.records import answer, failure
from vllm_proxy.jobs.rows import PromptRow, parse_row, row_id
from vllm_proxy.llm.sampling import sampling_params

if TYPE_CHECKING:
    from vllm import SamplingParams

    from vllm_proxy.llm.proxy_llm import ProxyLLM


class Answerer:
    """Asks a `ProxyLLM` rows, and gives their records in the order in which they finish.

    Args:
        llm: the engine; nobody else asks it anything meanwhile.
        config: the parameters of rows that give none of their own.

    Attributes:
        capacity: rows to ask at once, so that the engine never waits for one.

    Raises:
        ProxyConfigError: the config's own sampling parameters are wrong.
    """

    row_type: ClassVar[type[PromptRow]] = PromptRow

    def __init__(self, llm: "ProxyLLM", config: ProxyConfig) -> None:
        self._llm, self._alpha = llm, config.alpha
        # The checkpoint's generation config comes first, as in `LLM.generate`.
        own = llm.model_config.get_diff_sampling_param()
        self._defaults = {**own, **config.sampling}
        self._default_params = sampling_params(self._defaults)
        _verify(llm, self._default_params)
        self.capacity = 4 * llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
        self._asked: dict[str, tuple[int, PromptRow, SamplingParams]] = {}

    def __len__(self) -> int:
        """Return the number of rows that are asked and not answered."""
        return len(self._asked)

    def ask(self, line: Line) -> dict[str, Any] | None:
        """Ask a row; or return its record, if it cannot be asked.

        Raises:
            EngineDiedError: the engine ended.
        """
        row = None
        try:
            with of_one_row():
                if line.problem:
                    raise ProxyConfigError(line.problem)
                row = parse_row(line.data, text=line.is_text, row_type=self.row_type)
                params = self._default_params
                if row.sampling:
                    params = sampling_params({**self._defaults, **row.sampling})
                    _verify(self._llm, params)
                with deaths():
                    request = self._enqueue(row, params)
        except ProxyConfigError as error:
            return failure(line.index, row.id if row else row_id(line.data), str(error))
        self._asked[request] = line.index, row, params
        return None

    def _enqueue(self, row: PromptRow, params: "SamplingParams") -> str:
        """Hand a row to the engine as `generate` and `chat` do, and return its request's id.

        Raises:
            ProxyConfigError: vLLM refuses the row: too long, unknown ids, no chat template, ….
        """
        kind, params = row.kind, with_own_values(row, params)
        with as_mistake(kind):
            if kind == "messages":
                ids = self._llm.enqueue_chat(
                    [row.messages], params, use_tqdm=False, **row.chat_options
                )
            else:
                ids = self._llm.enqueue([{kind: getattr(row, kind)}], params, use_tqdm=False)
        # The engine makes ids unique by a suffix, which it does not show in its outputs.
        return ids[0].partition("-")[0]

    def step(self) -> Iterator[dict[str, Any]]:
        """Have the engine do one step, and yield the records of rows that finished in it.

        Raises:
            EngineDiedError: it ended.
        """
        with deaths():
            outputs = self._llm.llm_engine.step()
        for output in outputs:
            if output.finished:
                index, row, params = self._asked.pop(output.request_id)
                try:
                    with of_one_row():
                        record = answer(index, row, output, params, self._alpha)
                except ProxyConfigError as error:
                    record = failure(index, row.id, str(error))
                yield record


@contextmanager
def of_one_row() -> Iterator[None]:
    """Turn whatever goes wrong with one row into a `ProxyConfigError`, so that others go on.

    Reading a row, tokenizing it and handing it over touch nothing that other rows need; vLLM takes
    back a request of which it raises. So what is raised here is of the row: a template, a tokenizer
    or a validator that it was too odd for. It is not where the engine died or the system refuses
    (files, memory): other rows would meet that too, and be recorded as failed for nothing.
    """
    try:
        yield
    except (ProxyConfigError, EngineDiedError, OSError, MemoryError):
        raise
    except Exception as error:
        reason = shorten(" ".join(str(error).split()), 300, placeholder=" …")
        raise ProxyConfigError(
            f"the row cannot be answered ({type(error).__name__}: {reason}); change it"
        ) from error


@contextmanager
def deaths() -> Iterator[None]:
    """Raise the death of an engine as ours."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise EngineDiedError(str(error)) from error


def require_one_answer(n: object) -> None:
    """Refuse more answers a row than one. Raises `ProxyConfigError`."""
    if n != 1:
        raise ProxyConfigError(f"`sampling.n` is {n!r}: a row has one answer; repeat the row")


def _verify(llm: "ProxyLLM", params: "SamplingParams") -> None:
    """Refuse parameters that this engine cannot honour. Raises `ProxyConfigError`."""
    require_one_answer(params.n)
    config = llm.llm_engine.vllm_config
    if llm.llm_engine.tokenizer is None and (params.stop or params.bad_words):
        raise ProxyConfigError(
            "`sampling`: `stop` and `bad_words` are text, and the engine has no tokenizer; "
            "remove `engine.skip_tokenizer_init`"
        )
    with as_mistake("sampling"):
        params.verify(
            config.model_config,
            config.speculative_config,
            config.structured_outputs_config,
            llm.llm_engine.tokenizer,
        )


@contextmanager
def as_mistake(field: str) -> Iterator[None]:
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


def with_own_values(row: PromptRow, params: "SamplingParams") -> "SamplingParams":
    """Return the parameters of a row's request, with the values that the row has of its own."""
    if own := row.to_extra_args():
        params = copy(params)
        params.extra_args = {**(params.extra_args or {}), **own}
    return params
