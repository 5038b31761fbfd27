"""From rows to records of `vllm-proxy inspect`: answered, or with answers given, and inspected."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.request import PROMPT_KEYS
from vllm_proxy.config.roles import ROLES
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.jobs.answerer import Answerer, as_mistake, deaths, of_one_row, with_own_values
from vllm_proxy.jobs.records import answer, failure, strength_of
from vllm_proxy.jobs.rows import InspectedRow, PromptRow
from vllm_proxy.llm.inspection import Inspector

if TYPE_CHECKING:
    from vllm import SamplingParams

    from vllm_proxy.llm.proxy_llm import ProxyLLM


class InspectingAnswerer(Answerer):
    """An `Answerer` whose records say, for every token, what each member said.

    A record is that of `generate` and `prompts` (what each member read, as text), `missing`, and
    `tokens` (`InspectedToken.to_record`).
    """

    row_type: ClassVar[type[PromptRow]] = InspectedRow

    def __init__(self, llm: "ProxyLLM", config: ProxyConfig, top_k: int) -> None:
        super().__init__(llm, config)
        self._inspector = Inspector(llm, top_k)
        self._prompts: dict[str, tuple[list[int], SamplingParams]] = {}
        self._records: dict[str, dict[str, Any]] = {}

    def _enqueue(self, row: InspectedRow, params: "SamplingParams") -> str:
        params = with_own_values(row, params)
        with as_mistake(row.kind):
            is_chat = row.kind == "messages"
            asked = row.messages if is_chat else {row.kind: getattr(row, row.kind)}
            options = row.chat_options if is_chat else None
            ((prompt, params),) = self._llm.render([asked], params, {}, chat_options=options)
            if row.completion is None:
                # As it is, so that both passes read the same.
                ids = self._llm.enqueue([{"prompt_token_ids": prompt}], params, use_tqdm=False)
                request = ids[0].partition("-")[0]
                self._prompts[request] = prompt, params
                return request
        given = self._inspector.answer_ids(row.completion)
        is_text = isinstance(row.completion, str)
        with as_mistake(row.kind):
            request = self._inspector.ask(prompt, given, params)
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
        """Have the engine do one step, and yield the records of rows that were inspected in it.

        Raises:
            EngineDiedError: it ended.
        """
        with deaths():
            outputs = self._llm.llm_engine.step()
        inspected = []
        for output in outputs:
            if not output.finished:
                continue
            if output.request_id in self._records:
                inspected.append(output.request_id)
            else:
                record = self._answered(output)
                if record is not None:
                    yield record
        with deaths():
            found = self._inspector.take(inspected)
        for request in inspected:
            index, row, _ = self._asked.pop(request)
            record = self._records.pop(request)
            if request not in found:
                yield failure(index, row.id, "vLLM ended the inspection; try it again")
                continue
            tokens = [token.to_record() for token in found[request]]
            yield {"index": index, "id": row.id, **record, "tokens": tokens}

    def _answered(self, output: Any) -> dict[str, Any] | None:
        """Ask for the inspection of an answer; or return the row's record, if there is none."""
        index, row, params = self._asked.pop(output.request_id)
        prompt, own_params = self._prompts.pop(output.request_id)
        try:
            with of_one_row():
                record = answer(index, row, output, params, self._alpha)
                if "error" in record:
                    return record
                record |= self._read_by_members(prompt, own_params)
                if not record["token_ids"]:
                    return {**record, "tokens": []}
                with deaths(), as_mistake(row.kind):
                    request = self._inspector.ask(prompt, record["token_ids"], own_params)
        except ProxyConfigError as error:
            return failure(index, row.id, str(error))
        self._asked[request], self._records[request] = (index, row, params), record
        return None

    def _read_by_members(self, prompt: list[int], params: "SamplingParams") -> dict[str, Any]:
        own = {"base": prompt}
        for role, key in PROMPT_KEYS.items():
            if ids := (params.extra_args or {}).get(key):
                own[role] = ids
        prompts = {
            role: self._inspector.text(own[role], special=True) for role in ROLES if role in own
        }
        return {"prompts": prompts, "missing": list(self._inspector.missing)}
