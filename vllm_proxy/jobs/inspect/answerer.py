"""From rows to records of `vllm-proxy inspect`: an answer, generated or given, is inspected."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.request import PROMPT_KEYS
from vllm_proxy.config.roles import ROLES, Role
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.jobs.answerer import (
    Answerer,
    reraise_as_config_error,
    reraise_as_row_error,
    reraise_engine_death,
    with_row_values,
)
from vllm_proxy.jobs.records import answer, failure, strength_of
from vllm_proxy.jobs.rows import InspectedRow, PromptRow
from vllm_proxy.llm.inspection import Inspector
from vllm_proxy.llm.sampling import request_name

if TYPE_CHECKING:
    from vllm import SamplingParams

    from vllm_proxy.llm.proxy_llm import ProxyLLM


class InspectingAnswerer(Answerer):
    """An `Answerer` whose records have, for every token, what each member predicted.

    A record is that of `generate` with three more fields: `prompts` (what each member read, as
    text), `missing`, and `tokens` (`InspectedToken.to_record`).
    """

    row_type: ClassVar[type[PromptRow]] = InspectedRow

    def __init__(self, llm: "ProxyLLM", config: ProxyConfig, top_k: int) -> None:
        super().__init__(llm, config)
        self._inspector = Inspector(llm, top_k)
        self._prompts: dict[str, tuple[list[int], SamplingParams]] = {}
        self._records: dict[str, dict[str, Any]] = {}

    def _enqueue(self, row: PromptRow, params: "SamplingParams") -> str:
        assert isinstance(row, InspectedRow)
        params = with_row_values(row, params)
        with reraise_as_config_error(row.kind):
            is_chat = row.kind == "messages"
            source = row.messages if is_chat else {row.kind: getattr(row, row.kind)}
            options = row.chat_options if is_chat else None
            ((prompt, params),) = self._llm.render([source], params, {}, chat_options=options)
            if row.completion is None:
                # The rendered ids, so that generation and inspection read the same prompt.
                ids = self._llm.enqueue([{"prompt_token_ids": prompt}], params, use_tqdm=False)
                request = request_name(ids[0])
                self._prompts[request] = prompt, params
                return request
        given = self._inspector.answer_ids(row.completion)
        is_text = isinstance(row.completion, str)
        with reraise_as_config_error(row.kind):
            request = self._inspector.submit(prompt, given, params)
        self._records[request] = {
            "text": row.completion if is_text else self._inspector.text(given),
            "token_ids": given,
            "finish_reason": None,
            "prompt_tokens": len(prompt),
            "completion_tokens": len(given),
            **strength_of(row, self._alpha),
            **self._read_by_members(prompt, params),
        }
        return request

    def step(self) -> Iterator[dict[str, Any]]:
        """Run one step of the engine, and yield the records of the rows inspected in it.

        Raises:
            EngineDiedError: the engine died.
        """
        with reraise_engine_death():
            outputs = self._llm.llm_engine.step()
        inspected = []
        for output in outputs:
            if not output.finished:
                continue
            if output.request_id in self._records:
                inspected.append(output.request_id)
            else:
                record = self._inspect_answer(output)
                if record is not None:
                    yield record
        with reraise_engine_death():
            found = self._inspector.collect(inspected)
        for request in inspected:
            index, row, _ = self._submitted.pop(request)
            record = self._records.pop(request)
            if request not in found:
                yield failure(index, row.id, "vLLM ended the inspection; try again")
                continue
            tokens = [token.to_record() for token in found[request]]
            yield {"index": index, "id": row.id, **record, "tokens": tokens}

    def _inspect_answer(self, output: Any) -> dict[str, Any] | None:
        """Submit the inspection of an answer; or return the record of a row without one."""
        index, row, params = self._submitted.pop(output.request_id)
        prompt, request_params = self._prompts.pop(output.request_id)
        try:
            with reraise_as_row_error():
                record = answer(index, row, output, params, self._alpha)
                if "error" in record:
                    return record
                record |= self._read_by_members(prompt, request_params)
                if not record["token_ids"]:
                    return {**record, "tokens": []}
                with reraise_engine_death(), reraise_as_config_error(row.kind):
                    request = self._inspector.submit(prompt, record["token_ids"], request_params)
        except ProxyConfigError as error:
            return failure(index, row.id, str(error))
        self._submitted[request] = index, row, params
        self._records[request] = record
        return None

    def _read_by_members(self, prompt: list[int], params: "SamplingParams") -> dict[str, Any]:
        ids: dict[Role, list[int]] = {"base": prompt}
        for role, key in PROMPT_KEYS.items():
            if member_ids := (params.extra_args or {}).get(key):
                ids[role] = member_ids
        prompts = {
            role: self._inspector.text(ids[role], special=True) for role in ROLES if role in ids
        }
        return {"prompts": prompts, "missing": list(self._inspector.missing)}
