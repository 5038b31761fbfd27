"""Our scheduler: virtual prompts, the members' names in hashes, drafts and their lengths."""

import time
from collections import deque
from hashlib import sha256
from typing import Any

import msgspec
from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds, LogprobsTensors, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_proxy.config.request import BASE_LENGTH, EXPERT_KEY, PROMPT_KEYS, extra_args_of
from vllm_proxy.engine.drafting.lengths import DraftLengths
from vllm_proxy.members.identity import members_digest
from vllm_proxy.members.vllm_configs import proxy_section


class ProxyScheduler(Scheduler):
    """vLLM's scheduler with virtual prompts; asynchronous if vLLM's would be.

    Outside the engine's core (in the server, in counts of prompt tokens, in echoed prompts) a
    request has the base's prompt. From here on it has the virtual prompt of `alignment.py`.
    """

    dynamic_sd_lookup: Any

    def __new__(cls, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> "ProxyScheduler":
        """Choose the class as `SchedulerConfig.get_scheduler_cls` does."""
        is_async = vllm_config.scheduler_config.async_scheduling
        return super().__new__(_AsyncProxyScheduler if is_async else cls)

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self._lengths: DraftLengths | None = None
        # Steps that are scheduled but not finished, and when each was scheduled.
        self._running: deque[tuple[SchedulerOutput, float]] = deque()
        self._updated = 0.0  # when the last step finished
        self._drafts: dict[str, list[int]] = {}  # of steps that are not finished
        # Others may read the keys and values that this engine computes, if it has a KV connector.
        self._members = (
            None if vllm_config.kv_transfer_config is None else members_digest(vllm_config)
        )
        speculate = proxy_section(vllm_config.model_config).speculate
        if speculate is not None and speculate.adapts and self.dynamic_sd_lookup is not None:
            self._lengths = self.dynamic_sd_lookup = DraftLengths(self.dynamic_sd_lookup)

    def add_request(self, request: Request) -> None:
        """Add a request, with its virtual prompt."""
        if self._members is not None:
            salt(request, self._members)
        if expert := extra_args_of(request.sampling_params).get(EXPERT_KEY):
            salt(request, f"expert {expert}")  # its keys and values are its adapter's
        lengthen_prompt(request, self.block_size, self.max_model_len)
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule a step, and note the time."""
        output = super().schedule(*args, **kwargs)
        if self._lengths is not None:
            self._running.append((output, time.perf_counter()))
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        """Finish a step, and record its time."""
        if self._lengths is not None:
            self._time(scheduler_output, self._lengths)
        self._shorten_prompt_logprobs(model_runner_output.prompt_logprobs_dict)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self._drafts:
            self._release_drafts(scheduler_output)
        return outputs

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Take drafts of the step that was scheduled last.

        With pipeline stages, vLLM (0.32, 0.33) brings them before the step's tokens, and would
        schedule them without the token that they follow. They wait until the step is finished.
        """
        if not self.use_pp:
            super().update_draft_token_ids(draft_token_ids)
            return
        self._drafts |= zip(draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True)

    def _release_drafts(self, finished: SchedulerOutput) -> None:
        """Let drafts of a finished step be scheduled; not behind a prompt that is not finished."""
        for req_id in finished.num_scheduled_tokens:
            drafts, request = self._drafts.pop(req_id, None), self.requests.get(req_id)
            if drafts is None or request is None or request.num_in_flight_tokens:
                continue
            if request.status == RequestStatus.RUNNING:
                super().update_draft_token_ids(DraftTokenIds([req_id], [drafts]))

    def _shorten_prompt_logprobs(self, by_request: dict[str, LogprobsTensors | None]) -> None:
        """Keep the rows of the base's prompt, of those of the virtual one."""
        for req_id, rows in by_request.items():
            request = self.requests.get(req_id)  # None: aborted while it ran
            extra_args = extra_args_of(request and request.sampling_params)
            if rows is not None and BASE_LENGTH in extra_args:
                count = extra_args[BASE_LENGTH] - 1  # nothing predicts the first token
                kept = (tensor[len(tensor) - count :] for tensor in rows[:3])
                by_request[req_id] = LogprobsTensors(*kept) if count else None

    def _time(self, output: SchedulerOutput, lengths: DraftLengths) -> None:
        """Record the time of a step in which every request had the same number of drafts."""
        begun, now = None, time.perf_counter()
        while self._running and begun is None:
            other, scheduled = self._running.popleft()
            begun = scheduled if other is output else None
        before, self._updated = self._updated, now
        tokens, drafts = output.num_scheduled_tokens, output.num_spec_tokens_to_schedule
        if begun is not None and tokens and {*tokens.values()} == {1 + drafts}:
            # An asynchronous step is scheduled while another one runs, and begins after it.
            lengths.record_step_time(now - max(begun, before), len(tokens), drafts)

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: Any,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        **kwargs: Any,
    ) -> Any:
        """Record how many of a request's drafts were accepted."""
        if self._lengths is not None:
            self._lengths.record_acceptance(num_draft_tokens, num_accepted_tokens)
        return super().make_spec_decoding_stats(
            spec_decoding_stats, num_draft_tokens, num_accepted_tokens, **kwargs
        )


class _AsyncProxyScheduler(ProxyScheduler, AsyncScheduler):
    pass


def salt(request: Request, more: str) -> None:
    """Make the hashes of a request's blocks differ from those of others without this text."""
    request.cache_salt = f"{more}:{request.cache_salt or ''}"
    request.block_hashes.clear()
    request.update_block_hashes()


def lengthen_prompt(request: Request, block_size: int, max_model_len: int) -> None:
    """Make a request's prompt as long as the longest member's, by repeating its first token.

    The contents of a KV cache block depend on all members' prompts, so only requests with the same
    prompts may share cached blocks: the cache salt identifies them. If no multiple of the block
    size fits, this request shares none.
    """
    params = request.sampling_params
    extra_args = extra_args_of(params)
    others = [ids for key in PROMPT_KEYS.values() if (ids := extra_args.get(key)) is not None]
    base = request.prompt_token_ids
    if not others or base is None:
        return
    longest = max(len(base), *map(len, others))
    length = -(-longest // block_size) * block_size  # rounded up to whole blocks
    prompts = sha256(msgspec.json.encode([extra_args.get(key) for key in PROMPT_KEYS.values()]))
    own_salt = f"{request.cache_salt or ''}:{prompts.hexdigest()}:{len(base)}"
    if length >= max_model_len:
        length, own_salt = longest, request.request_id
    params.extra_args = {**extra_args, BASE_LENGTH: len(base)}
    if params.prompt_logprob_token_ids is not None:  # scored from a row of the base's prompt
        params.prompt_logprob_start = (params.prompt_logprob_start or 0) + length - len(base)
    request.prompt_token_ids = [base[0]] * (length - len(base)) + base
    request._all_token_ids[:] = request.prompt_token_ids
    request.num_prompt_tokens = length
    request.cache_salt = own_salt
    request.block_hashes.clear()
    request.update_block_hashes()
