"""Inspections of answers: what is measured in the workers, asked for and read back.

An answer, generated before or given, is scored by one more request, which reads the prompt and the
answer at once (`probe.py`). The members' prompts of the request are followed by the same answer.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from vllm import LLM, SamplingParams

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.request import INSPECTED, MOST_TOP_K, PREFIX, PROMPT_KEYS
from vllm_proxy.config.roles import DISTRIBUTIONS, ROLES, Role
from vllm_proxy.engine.admission import inspecting
from vllm_proxy.engine.config_hook import WORKER_EXTENSION
from vllm_proxy.llm.pieces import Pieces
from vllm_proxy.llm.sampling import require_known_ids
from vllm_proxy.members.vllm_configs import proxy_section
from vllm_proxy.model.probe import TokenStats


@dataclass(frozen=True)
class Candidate:
    """One of the likeliest tokens: its id, how it looks, and its log-probability."""

    token_id: int
    token: str
    logprob: float


@dataclass(frozen=True)
class Distribution:
    """One of the four distributions of the next token, over the ids that all members have.

    Attributes:
        logprob: of the answer's token; minus infinity where a filter removed it.
        rank: 1 and the number of tokens that are likelier.
        top: the likeliest tokens, without those that have no probability.
    """

    logprob: float
    rank: int
    top: tuple[Candidate, ...]


@dataclass(frozen=True)
class InspectedToken:
    """One token of an answer.

    Attributes:
        token_id: its id.
        token: how it looks by itself (`pieces.Piece`).
        kind: one of `pieces.KINDS`.
        base: what the base said; likewise *expert* and *antiexpert*.
        proxy: what all of them together said, before temperature and what else changes sampling.
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
        """Whether the likeliest token is another one than the base's."""
        return self.proxy.top[0].token_id != self.base.top[0].token_id

    def to_record(self) -> dict[str, Any]:
        """Return what a line of JSON has of it; a log-probability of minus infinity is null."""
        record = {"token_id": self.token_id, "token": self.token, "kind": self.kind}
        record |= {"kl": self.kl, "changed": self.changed}
        for name in DISTRIBUTIONS:
            own: Distribution = getattr(self, name)
            record[name] = {
                "logprob": own.logprob if math.isfinite(own.logprob) else None,
                "rank": own.rank,
                "top": [vars(candidate) for candidate in own.top],
            }
        return record


@dataclass(frozen=True)
class Inspection:
    """An answer and what was said of each of its tokens.

    Attributes:
        prompt_token_ids: the base's prompt.
        token_ids: the answer.
        text: the answer.
        finish_reason: vLLM's; None for an answer that was given.
        tokens: one for each of *token_ids*.
        missing: members that there are none of; the base plays their part.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str | None
    tokens: list[InspectedToken]
    missing: tuple[Role, ...]


class Inspector:
    """Asks an engine what its members say of answers.

    Args:
        llm: the engine.
        top_k: how many of the likeliest tokens to keep of each distribution.

    Raises:
        ProxyConfigError: *top_k* is wrong, or the engine cannot do it.
    """

    def __init__(self, llm: LLM, top_k: int) -> None:
        require_top_k("`top_k`", top_k)
        config = llm.llm_engine.vllm_config
        if config.parallel_config.worker_extension_cls != WORKER_EXTENSION:
            raise ProxyConfigError(
                "inspect: the engine was started with a worker of its own (worker_cls, "
                "worker_extension_cls) or on a platform without ours; leave these out"
            )
        if config.cache_config.kv_sharing_fast_prefill:
            raise ProxyConfigError(
                "inspect: kv_sharing_fast_prefill leaves layers of a prompt out; set it to false"
            )
        self._llm, self._top_k = llm, top_k
        self.pieces = Pieces(llm.llm_engine.tokenizer)
        roles = proxy_section(config.model_config).roles
        self.missing = tuple(role for role in ROLES if role not in roles)
        self._ids: dict[str, str] = {}
        self._answers: dict[str, list[int]] = {}

    def ask(self, prompt: Sequence[int], answer: Sequence[int], params: SamplingParams) -> str:
        """Ask for an inspection, and return the name of its request in the engine's outputs.

        Args:
            prompt: the base's, at least one id.
            answer: at least one id.
            params: those of the request whose answer it is; only our `extra_args` matter.

        Raises:
            ProxyConfigError: prompt and answer are too long for the model's context.
        """
        fed = list(answer[:-1])
        own = {k: v for k, v in (params.extra_args or {}).items() if k.startswith(PREFIX)}
        for key in PROMPT_KEYS.values():
            if own.get(key) is not None:
                own[key] = [*own[key], *fed]
        own[INSPECTED] = {"token_ids": list(answer), "top_k": self._top_k}
        scoring = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            # Has the logits of all rows computed; the sampled row's are anyway.
            prompt_logprobs=0 if fed else None,
            detokenize=False,
            extra_args=own,
        )
        with inspecting():
            (request_id,) = self._llm.enqueue(
                [{"prompt_token_ids": [*prompt, *fed]}], scoring, use_tqdm=False
            )
        # The engine makes ids unique by a suffix, which it does not show in its outputs.
        request = request_id.partition("-")[0]
        self._ids[request], self._answers[request] = request_id, list(answer)
        return request

    def take(self, requests: Iterable[str]) -> dict[str, list[InspectedToken]]:
        """Return and forget inspections that ended; those of requests that failed are left out."""
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
        """Give up what is asked and not taken."""
        self._llm.llm_engine.abort_request(list(self._ids.values()), internal=True)
        self.take(list(self._ids))

    def _tokens(self, answer: Sequence[int], stats: TokenStats) -> list[InspectedToken]:
        kl, kinds = stats.kl.tolist(), self.pieces.kinds(answer)
        columns = [array.tolist() for array in stats[:4]]
        tokens = []
        for index, token_id in enumerate(answer):
            distributions = {
                name: self._distribution(*own)
                for name, *own in zip(DISTRIBUTIONS, *(c[index] for c in columns), strict=True)
            }
            piece = self.pieces[token_id].text
            tokens.append(
                InspectedToken(token_id, piece, kinds[index], **distributions, kl=kl[index])
            )
        return tokens

    def _distribution(
        self, logprob: float, rank: int, top_ids: list[int], top_logprobs: list[float]
    ) -> Distribution:
        top = tuple(
            Candidate(id_, self.pieces[id_].text, own)
            for id_, own in zip(top_ids, top_logprobs, strict=True)
            if own > -math.inf
        )
        return Distribution(logprob, rank, top)

    def answer_ids(self, completion: str | Sequence[int]) -> list[int]:
        """Return the ids of an answer that was given; text is encoded by itself.

        Raises:
            ProxyConfigError: it is empty, is text and there is no tokenizer, or has unknown ids.
        """
        tokenizer = self._llm.llm_engine.tokenizer
        if isinstance(completion, str):
            if tokenizer is None:
                raise ProxyConfigError(
                    "`completion` is text, and the engine has no tokenizer; give token ids, or "
                    "remove `engine.skip_tokenizer_init`"
                )
            completion = tokenizer(completion, add_special_tokens=False)["input_ids"]
        require_known_ids("completion", completion, self._llm)
        if not completion:
            raise ProxyConfigError("`completion` is empty; give at least one token")
        return list(completion)

    def text(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """Return the text of ids; empty without a tokenizer."""
        tokenizer = self._llm.llm_engine.tokenizer
        if tokenizer is None:
            return ""
        return tokenizer.decode(list(token_ids), skip_special_tokens=not special)


def require_top_k(name: str, top_k: object) -> None:
    """Refuse a wrong number of tokens to keep. Raises `ProxyConfigError`."""
    is_int = isinstance(top_k, int) and not isinstance(top_k, bool)
    if not is_int or not 1 <= top_k <= MOST_TOP_K:
        raise ProxyConfigError(f"{name} is {top_k!r}; give a count from 1 to {MOST_TOP_K}")


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
        requests: prompt ids and parameters of each.
        completions: an answer for each.
        top_k: as of `Inspector`.
        use_tqdm: as of `vllm.LLM.generate`, while answers are generated.
    """
    inspector = Inspector(llm, top_k)
    answers: list[tuple[list[int], str, str | None]] = []
    if completions is None:
        for _, params in requests:
            if params.n != 1:
                raise ProxyConfigError(f"`n` is {params.n}: one answer is inspected; repeat it")
        prompts = [{"prompt_token_ids": ids} for ids, _ in requests]
        outputs = llm.generate(prompts, [params for _, params in requests], use_tqdm=use_tqdm)
        for output in outputs:
            own = output.outputs[0]
            answers.append((list(own.token_ids), own.text, own.finish_reason))
    else:
        for completion in completions:
            ids = inspector.answer_ids(completion)
            text = completion if isinstance(completion, str) else inspector.text(ids)
            answers.append((ids, text, None))
    inspected: list[list[InspectedToken]] = [[] for _ in answers]
    try:
        asked: Mapping[str, int] = {
            inspector.ask(prompt, ids, params): index
            for index, ((prompt, params), (ids, *_)) in enumerate(
                zip(requests, answers, strict=True)
            )
            if ids
        }
        while llm.llm_engine.has_unfinished_requests():
            outputs = llm.llm_engine.step()
            ended = [output.request_id for output in outputs if output.finished]
            for request, tokens in inspector.take(r for r in ended if r in asked).items():
                inspected[asked[request]] = tokens
    except BaseException:
        with suppress(Exception):  # an engine that died has nothing left to give up
            inspector.abort()
        raise
    return [
        Inspection(prompt, ids, text, reason, tokens, inspector.missing)
        for (prompt, _), (ids, text, reason), tokens in zip(
            requests, answers, inspected, strict=True
        )
    ]
