"""The scheduler: lengthens the prompt of a request whose members have prompts of their own."""

from hashlib import sha256
from typing import Any

import msgspec
from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from vllm_proxy.control import BASE_LENGTH, PROMPT_KEYS


class ProxyScheduler(Scheduler):
    """vLLM's scheduler, asynchronous where vLLM's would be.

    Everything outside the engine's core (the server, counts of prompt tokens, echoed prompts) sees
    the base's own prompt; from here on there is the virtual one of `alignment.py`.
    """

    def __new__(cls, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> "ProxyScheduler":
        """Choose as `SchedulerConfig.get_scheduler_cls` does."""
        is_async = vllm_config.scheduler_config.async_scheduling
        return super().__new__(_AsyncProxyScheduler if is_async else cls)

    def add_request(self, request: Request) -> None:
        """Take in a request."""
        lengthen_prompt(request, self.block_size, self.max_model_len)
        super().add_request(request)


class _AsyncProxyScheduler(ProxyScheduler, AsyncScheduler):
    pass


def lengthen_prompt(request: Request, block_size: int, max_model_len: int) -> None:
    """Make a request's prompt as long as the longest member's, on the left, by its first token.

    What a block holds depends on all members' prompts, so only requests with the same ones share
    cached blocks. Where no multiple of the block size fits, none are shared.
    """
    params = request.sampling_params
    extra_args = (params.extra_args if params is not None else None) or {}
    own = [ids for key in PROMPT_KEYS.values() if (ids := extra_args.get(key)) is not None]
    base = request.prompt_token_ids
    if not own or base is None:
        return
    longest = max(len(base), *map(len, own))
    length = -(-longest // block_size) * block_size
    prompts = sha256(msgspec.json.encode([extra_args.get(key) for key in PROMPT_KEYS.values()]))
    salt = f"{request.cache_salt or ''}:{prompts.hexdigest()}:{len(base)}"
    if length >= max_model_len:
        length, salt = longest, request.request_id
    params.extra_args = {**extra_args, BASE_LENGTH: len(base)}
    request.prompt_token_ids = [base[0]] * (length - len(base)) + base
    request._all_token_ids[:] = request.prompt_token_ids
    request.num_prompt_tokens = length
    request.cache_salt = salt
    request.block_hashes.clear()
    request.update_block_hashes()
