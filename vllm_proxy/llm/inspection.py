"""Inspections: what each member predicted for every token of an answer.

An answer, generated or given, is scored by one more request whose prompt is the original prompt
followed by the answer. The same answer is appended to the members' own prompts. The workers measure
the distributions (`model/probe.py`); here they are requested, collected and turned into objects.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.request import INSPECTED, MOST_TOP_K, PREFIX, PROMPT_KEYS
from vllm_proxy.config.roles import DISTRIBUTIONS, ROLES, Role
from vllm_proxy.engine.admission import inspecting
from vllm_proxy.engine.config_hook import WORKER_EXTENSION
from vllm_proxy.llm.pieces import TokenTexts
from vllm_proxy.llm.sampling import request_name, require_known_ids, require_one_answer
from vllm_proxy.members.vllm_configs import proxy_section
from vllm_proxy.model.probe import TokenStats


@dataclass(frozen=True)
class Candidate:
    """One of the most likely tokens: its id, its text and its log-probability (in nats)."""

    token_id: int
    token: str
    logprob: float


@dataclass(frozen=True)
class Distribution:
    """One of the four distributions of the next token, over the ids that all members have.

    Attributes:
        logprob: of the answer's token; minus infinity if a filter removed it.
        rank: 1 + the number of tokens that are more likely.
        top: the most likely tokens, without those whose probability is zero.
    """

    logprob: float
    rank: int
    top: tuple[Candidate, ...]


@dataclass(frozen=True)
class InspectedToken:
    """One token of an answer.

    Attributes:
        token_id: its id.
        token: its text alone (`pieces.TokenText`).
        kind: one of `pieces.KINDS`.
        base: the base's distribution; likewise *expert* and *antiexpert*.
        proxy: the fused distribution, before temperature and other sampling parameters.
        kl: KL(proxy ‖ base) of the next token, in nats.
    """

    token_id: int
    token: str
    kind: str
    base: Distribution
    expert: Distribution
    antiexpert: Distribution
    proxy: Distribution
    kl: float

    @property
    def changed(self) -> bool:
        """Whether the proxy's most likely token differs from the base's."""
        return self.proxy.top[0].token_id != self.base.top[0].token_id

    def to_record(self) -> dict[str, Any]:
        """Return it for JSON; a log-probability of minus infinity is null."""
        record = {"token_id": self.token_id, "token": self.token, "kind": self.kind}
        record |= {"kl": self.kl, "changed": self.changed}
        for name in DISTRIBUTIONS:
            distribution: Distribution = getattr(self, name)
            logprob = distribution.logprob
            record[name] = {
                "logprob": logprob if math.isfinite(logprob) else None,
                "rank": distribution.rank,
                "top": [vars(candidate) for candidate in distribution.top],
            }
        return record


@dataclass(frozen=True)
class Inspection:
    """An answer, and the four distributions at each of its tokens.

    Attributes:
        prompt_token_ids: the base's prompt.
        token_ids: of the answer.
        text: of the answer.
        finish_reason: vLLM's; None for an answer that was given.
        tokens: one for each of *token_ids*.
        missing: members that the model does not have; the base's logits are used instead.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str | None
    tokens: list[InspectedToken]
    missing: tuple[Role, ...]


class Inspector:
    """Submits inspections of answers to an engine, and collects them.

    Args:
        llm: the engine.
        top_k: number of the most likely tokens to keep of each distribution.

    Raises:
        ProxyConfigError: *top_k* is out of range, or the engine does not support inspections.
    """

    def __init__(self, llm: LLM, top_k: int) -> None:
        _require_top_k(top_k)
        config = llm.llm_engine.vllm_config
        if config.parallel_config.worker_extension_cls != WORKER_EXTENSION:
            raise ProxyConfigError(
                "this engine does not run vllm-proxy's worker (`worker_cls` or "
                "`worker_extension_cls` is set, or the platform is not supported)",
                field="inspect",
                remedy="remove these arguments",
            )
        if config.cache_config.kv_sharing_fast_prefill:
            raise ProxyConfigError(
                "it skips layers for prompt tokens, so inspections would be wrong",
                field="kv_sharing_fast_prefill",
                value=True,
                remedy="set it to False",
            )
        self._llm = llm
        self._top_k = top_k
        self._texts = TokenTexts(llm.llm_engine.tokenizer)
        roles = proxy_section(config.model_config).roles
        self.missing = tuple(role for role in ROLES if role not in roles)
        self._ids: dict[str, str] = {}
        self._answers: dict[str, list[int]] = {}

    def submit(self, prompt: Sequence[int], answer: Sequence[int], params: SamplingParams) -> str:
        """Submit an inspection, and return the name of its request in the engine's outputs.

        Args:
            prompt: the base's, at least one id.
            answer: at least one id.
            params: of the request that was answered; only our `extra_args` matter.

        Raises:
            ProxyConfigError: prompt and answer together exceed the model's context.
        """
        # The last token of the answer is predicted, but never read.
        read = list(answer[:-1])
        extra_args = {k: v for k, v in (params.extra_args or {}).items() if k.startswith(PREFIX)}
        for key in PROMPT_KEYS.values():
            if extra_args.get(key) is not None:
                extra_args[key] = [*extra_args[key], *read]
        extra_args[INSPECTED] = {"token_ids": list(answer), "top_k": self._top_k}
        scoring = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            # Makes vLLM compute logits for every prompt token; it always does for the last one.
            prompt_logprobs=0 if read else None,
            detokenize=False,
            extra_args=extra_args,
        )
        with inspecting():
            (request_id,) = self._llm.enqueue(
                [TokensPrompt(prompt_token_ids=[*prompt, *read])], scoring, use_tqdm=False
            )
        request = request_name(request_id)
        self._ids[request] = request_id
        self._answers[request] = list(answer)
        return request

    def collect(self, requests: Iterable[str]) -> dict[str, list[InspectedToken]]:
        """Return and remove finished inspections; those of requests that failed are left out."""
        by_id = {self._ids.pop(request): request for request in requests}
        if not by_id:
            return {}
        found: dict[str, list[bytes]] = {}
        for of_worker in self._llm.collective_rpc("take_inspected", args=(list(by_id),)):
            found |= of_worker
        inspected = {}
        for request_id, request in by_id.items():
            answer = self._answers.pop(request)
            if request_id in found:
                stats = TokenStats.unpack(found[request_id], len(answer))
                inspected[request] = self._tokens(answer, stats)
        return inspected

    def abort(self) -> None:
        """Abort the inspections that are submitted and not collected."""
        self._llm.llm_engine.abort_request(list(self._ids.values()), internal=True)
        self.collect(list(self._ids))

    def _tokens(self, answer: Sequence[int], stats: TokenStats) -> list[InspectedToken]:
        kl, kinds = stats.kl.tolist(), self._texts.kinds(answer)
        columns = [array.tolist() for array in stats[:4]]
        tokens = []
        for index, token_id in enumerate(answer):
            distributions = {
                name: self._distribution(*values)
                for name, *values in zip(DISTRIBUTIONS, *(c[index] for c in columns), strict=True)
            }
            text = self._texts[token_id].text
            tokens.append(
                InspectedToken(token_id, text, kinds[index], **distributions, kl=kl[index])
            )
        return tokens

    def _distribution(
        self, logprob: float, rank: int, top_ids: list[int], top_logprobs: list[float]
    ) -> Distribution:
        top = tuple(
            Candidate(id_, self._texts[id_].text, top_logprob)
            for id_, top_logprob in zip(top_ids, top_logprobs, strict=True)
            if top_logprob > -math.inf
        )
        return Distribution(logprob, rank, top)

    def answer_ids(self, completion: str | Sequence[int]) -> list[int]:
        """Return the ids of a given answer; text is encoded separately, without special tokens.

        Raises:
            ProxyConfigError: it is empty, has unknown ids, or is text and there is no tokenizer.
        """
        tokenizer = self._llm.llm_engine.tokenizer
        if isinstance(completion, str):
            if tokenizer is None:
                raise ProxyConfigError(
                    "it is text, and the engine has no tokenizer",
                    field="completion",
                    remedy="give token ids, or remove `engine.skip_tokenizer_init`",
                )
            ids = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
        else:
            ids = list(completion)
        require_known_ids("completion", ids, self._llm)
        if not ids:
            raise ProxyConfigError(
                "it is empty", field="completion", remedy="give at least one token"
            )
        return ids

    def text(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """Return the text of ids; empty without a tokenizer."""
        tokenizer = self._llm.llm_engine.tokenizer
        if tokenizer is None:
            return ""
        return tokenizer.decode(list(token_ids), skip_special_tokens=not special)


def _require_top_k(top_k: object) -> None:
    """Reject a `top_k` that is out of range. Raises `ProxyConfigError`."""
    if type(top_k) is not int or not 1 <= top_k <= MOST_TOP_K:
        remedy = f"give a count from 1 to {MOST_TOP_K}"
        raise ProxyConfigError(field="top_k", value=top_k, remedy=remedy)


def inspect(
    llm: LLM,
    requests: Sequence[tuple[list[int], SamplingParams]],
    completions: Sequence[str | Sequence[int]] | None,
    top_k: int,
    *,
    use_tqdm: Any,
) -> list[Inspection]:
    """Answer, unless *completions* are given, and inspect; see `ProxyLLM.inspect`.

    Args:
        llm: the engine.
        requests: prompt ids and parameters of each request.
        completions: None, or an answer for each.
        top_k: see `Inspector`.
        use_tqdm: see `vllm.LLM.generate`; shows progress while answers are generated.
    """
    inspector = Inspector(llm, top_k)
    if completions is None:
        answers = _generated(llm, requests, use_tqdm)
    else:
        answers = [_given(inspector, completion) for completion in completions]
    inspected = _inspected(llm, inspector, requests, [answer.token_ids for answer in answers])
    return [
        Inspection(
            prompt,
            answer.token_ids,
            answer.text,
            answer.finish_reason,
            tokens,
            inspector.missing,
        )
        for (prompt, _), answer, tokens in zip(requests, answers, inspected, strict=True)
    ]


class _Answer(NamedTuple):
    token_ids: list[int]
    text: str
    finish_reason: str | None


def _generated(
    llm: LLM, requests: Sequence[tuple[list[int], SamplingParams]], use_tqdm: Any
) -> list[_Answer]:
    for _, params in requests:
        require_one_answer(params.n, "n")
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids, _ in requests]
    outputs = llm.generate(prompts, [params for _, params in requests], use_tqdm=use_tqdm)
    completions = (output.outputs[0] for output in outputs)
    return [_Answer(list(c.token_ids), c.text, c.finish_reason) for c in completions]


def _given(inspector: Inspector, completion: str | Sequence[int]) -> _Answer:
    ids = inspector.answer_ids(completion)
    text = completion if isinstance(completion, str) else inspector.text(ids)
    return _Answer(ids, text, None)


def _inspected(
    llm: LLM,
    inspector: Inspector,
    requests: Sequence[tuple[list[int], SamplingParams]],
    answers: Sequence[list[int]],
) -> list[list[InspectedToken]]:
    """Return the inspected tokens of each answer; none of an empty answer."""
    inspected: list[list[InspectedToken]] = [[] for _ in answers]
    pending: dict[str, int] = {}
    try:
        for index, ((prompt, params), answer) in enumerate(zip(requests, answers, strict=True)):
            if answer:
                pending[inspector.submit(prompt, answer, params)] = index
        while llm.llm_engine.has_unfinished_requests():
            outputs = llm.llm_engine.step()
            finished = [output.request_id for output in outputs if output.finished]
            found = inspector.collect(name for name in finished if name in pending)
            for name, tokens in found.items():
                inspected[pending[name]] = tokens
    except BaseException:
        with suppress(Exception):  # if the engine died, there is nothing left to abort
            inspector.abort()
        raise
    return inspected
