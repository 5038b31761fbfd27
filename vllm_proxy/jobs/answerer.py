"""From rows to records: one engine that answers many rows at once."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from textwrap import shorten
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_proxy.config.errors import EngineDiedError, ProxyConfigError
from vllm_proxy.config.request import PREFIX
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.jobs.inputs import Line
from vllm_proxy.jobs.media import has_images, with_file_urls
from vllm_proxy.jobs.records import answer, failure
from vllm_proxy.jobs.rows import PromptRow, parse_row, row_id
from vllm_proxy.llm.sampling import request_name, require_one_answer, sampling_params

if TYPE_CHECKING:
    from vllm import SamplingParams

    from vllm_proxy.llm.proxy_llm import ProxyLLM


_OF_THE_PROCESS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC)
"""Errors of the system that every other row would meet too."""


class Answerer:
    """Submits rows to a `ProxyLLM`, and returns their records in the order in which they finish.

    Args:
        llm: the engine; nothing else may submit requests to it.
        config: the parameters of rows that set none.

    Attributes:
        capacity: number of rows to have submitted, so that the engine never waits for a row.

    Raises:
        ProxyConfigError: the configuration's sampling parameters are wrong.
    """

    row_type: ClassVar[type[PromptRow]] = PromptRow

    def __init__(self, llm: "ProxyLLM", config: ProxyConfig) -> None:
        self._llm = llm
        self._alpha = config.alpha
        # The checkpoint's generation config has the lowest precedence, as in `LLM.generate`.
        checkpoint = llm.model_config.get_diff_sampling_param()
        self._defaults = {**checkpoint, **config.sampling}
        self._default_params = sampling_params(self._defaults)
        _verify(llm, self._default_params)
        self.capacity = 4 * llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
        self._submitted: dict[str, tuple[int, PromptRow, SamplingParams]] = {}

    def __len__(self) -> int:
        """Return the number of rows that are submitted and not answered."""
        return len(self._submitted)

    def submit(self, line: Line) -> dict[str, Any] | None:
        """Submit a row, and return None; or return its failure record if it cannot be submitted.

        Raises:
            EngineDiedError: the engine died.
        """
        row = None
        try:
            with reraise_as_row_error():
                if line.problem:
                    raise ProxyConfigError(line.problem)
                row = parse_row(line.data, text=line.is_text, row_type=self.row_type)
                params = self._default_params
                if row.sampling:
                    params = sampling_params({**self._defaults, **row.sampling})
                    _verify(self._llm, params)
                with reraise_engine_death():
                    request = self._enqueue(located(row, line.directory), params)
        except ProxyConfigError as error:
            return failure(line.index, row.id if row else row_id(line.data), str(error))
        self._submitted[request] = line.index, row, params
        return None

    def _enqueue(self, row: PromptRow, params: "SamplingParams") -> str:
        """Enqueue a row as `generate` and `chat` do, and return its request's name.

        Raises:
            ProxyConfigError: vLLM rejects the row: too long, unknown ids, no chat template, ….
        """
        kind, params = row.kind, with_row_values(row, params)
        with reraise_as_config_error(kind), reraise_image_error(row):
            if kind == "messages":
                ids = self._llm.enqueue_chat(
                    [row.messages], params, use_tqdm=False, **row.chat_options
                )
            else:
                ids = self._llm.enqueue([{kind: getattr(row, kind)}], params, use_tqdm=False)
        return request_name(ids[0])

    def step(self) -> Iterator[dict[str, Any]]:
        """Run one step of the engine, and yield the records of the rows that finished in it.

        Raises:
            EngineDiedError: the engine died.
        """
        with reraise_engine_death():
            outputs = self._llm.llm_engine.step()
        for output in outputs:
            if output.finished:
                index, row, params = self._submitted.pop(output.request_id)
                try:
                    with reraise_as_row_error():
                        record = answer(index, row, output, params, self._alpha)
                except ProxyConfigError as error:
                    record = failure(index, row.id, str(error))
                yield record


@contextmanager
def reraise_as_row_error() -> Iterator[None]:
    """Turn any error that concerns one row into a `ProxyConfigError`, so that other rows go on.

    Reading, tokenizing and submitting a row change nothing that other rows need, and vLLM withdraws
    a request for which it raises. So an exception here concerns this row: a template, a tokenizer
    or a validator could not handle it. The exceptions are the death of the engine, and errors of
    the system (files, memory): every other row would meet them too, and fail without a fault.
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
def reraise_image_error(row: PromptRow) -> Iterator[None]:
    """Raise an error of the system as a `ValueError` if it is about an image of *row*.

    An image that is missing, that no server gives, or that may not be read, concerns its row only.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not has_images(row.messages) or getattr(error, "errno", None) in _OF_THE_PROCESS:
            raise
        reason = str(error).replace("--allowed-local-media-path", "engine.allowed_local_media_path")
        raise ValueError(f"an image cannot be read ({reason})") from error


@contextmanager
def reraise_engine_death() -> Iterator[None]:
    """Raise vLLM's `EngineDeadError` as `EngineDiedError`."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise EngineDiedError(str(error)) from error


def _verify(llm: "ProxyLLM", params: "SamplingParams") -> None:
    """Reject parameters that this engine does not support. Raises `ProxyConfigError`."""
    require_one_answer(params.n)
    config = llm.llm_engine.vllm_config
    if llm.llm_engine.tokenizer is None and (params.stop or params.bad_words):
        raise ProxyConfigError(
            "`stop` and `bad_words` are text, and the engine has no tokenizer",
            field="sampling",
            remedy="remove `engine.skip_tokenizer_init`",
        )
    with reraise_as_config_error("sampling"):
        params.verify(
            config.model_config,
            config.speculative_config,
            config.structured_outputs_config,
            llm.llm_engine.tokenizer,
        )


@contextmanager
def reraise_as_config_error(field: str) -> Iterator[None]:
    """Raise vLLM's errors about invalid input as a `ProxyConfigError` that names *field*."""
    from vllm.exceptions import VLLMClientError

    try:
        yield
    except ProxyConfigError as error:  # a row gives its values without our prefix
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
        raise ProxyConfigError(message or type(error).__name__, field=field) from None


def located(row: PromptRow, directory: str) -> PromptRow:
    """Return a row with `file:` URLs of its images that are files, relative to *directory*."""
    if not has_images(row.messages):
        return row
    messages = with_file_urls(row.messages or (), directory)
    return row.model_copy(update={"messages": messages})


def with_row_values(row: PromptRow, params: "SamplingParams") -> "SamplingParams":
    """Return the parameters of a row's request, with the row's strength, filters and prompts."""
    if values := row.to_extra_args():
        params = copy(params)
        params.extra_args = {**(params.extra_args or {}), **values}
    return params
