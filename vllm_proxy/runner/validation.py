"""Requests are checked where they are admitted, in the process that can refuse one by HTTP 400.

vLLM runs `validate_params` of every custom logits processor on each request, under both model
runners and whatever the entry point. That is all ours do: they never change logits.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from vllm.v1.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsProcessor as LogitsProcessorV2,
)

from vllm_proxy.config import Role
from vllm_proxy.control import INSPECTED, INTERNAL, PROMPT_KEYS, Control
from vllm_proxy.errors import ProxyConfigError

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import ModelConfig

NO_PROMPTS = {
    "windows": "sliding windows (beside full attention: set disable_hybrid_kv_cache_manager)",
    "graphs": "full CUDA graphs (set compilation_config.cudagraph_mode to PIECEWISE or NONE)",
    "context": "context parallelism",
    "experts": "data parallel experts",
    "speculation": "adaptive verification of drafts",
    "scheduler": "a scheduler of your own (scheduler_cls)",
}
"""What cannot go together with a prompt for each member."""
NO_CONTROLS = "worker"
"""Says that the engine's worker is not ours (worker_cls), so that no request has its own values."""

_INSPECTING = ContextVar("_INSPECTING", default=False)


@contextmanager
def inspecting() -> Iterator[None]:
    """Admit requests that inspect an answer: of this process, and in the body alone.

    What they leave in the workers somebody must fetch, so they are not for clients of a server.
    """
    token = _INSPECTING.set(True)
    try:
        yield
    finally:
        _INSPECTING.reset(token)


def validator(runner: str, limit: int | str, vocab_sizes: Mapping[Role, int]) -> str:
    """Return the name by which vLLM finds the processor that validates an engine's requests.

    vLLM makes it from this name alone, in several processes; so the name says what it has to know.

    Args:
        runner: `V1` or `V2`.
        limit: the most tokens that a member's prompt may have, or a key of `NO_PROMPTS`, or
            `NO_CONTROLS`.
        vocab_sizes: how many ids expert and antiexpert can read, of those that there are.
    """
    sizes = "_".join(str(vocab_sizes.get(role, 0)) for role in PROMPT_KEYS)
    return f"{__name__}:{runner}_{limit}_{sizes}"


def __getattr__(name: str) -> type:
    bases = {"V1": _ValidatorV1, "V2": _ValidatorV2}
    runner, *facts = name.split("_")
    if runner not in bases or len(facts) != 1 + len(PROMPT_KEYS):
        raise AttributeError(name)
    limit, *sizes = facts
    vocab_sizes = dict(zip(PROMPT_KEYS, map(int, sizes), strict=True))
    return type(name, (bases[runner],), {"limit": limit, "vocab_sizes": vocab_sizes})


@contextmanager
def without_ours(model_config: "ModelConfig") -> Iterator[None]:
    """Hide our processors from whoever makes instances of them."""
    every = model_config.logits_processors
    others = [p for p in every or () if not str(p).startswith(f"{__name__}:")]
    model_config.logits_processors = others or None
    try:
        yield
    finally:
        model_config.logits_processors = every


class _Validator:
    limit: str
    vocab_sizes: Mapping[Role, int]

    @classmethod
    def validate_params(cls, sampling_params: "SamplingParams") -> None:
        """Refuse what cannot be honoured. Raises `ProxyConfigError` (a `ValueError`)."""
        extra_args = sampling_params.extra_args or {}
        is_inspected = INSPECTED in extra_args and _INSPECTING.get()
        for key in INTERNAL:
            if key in extra_args and not (key == INSPECTED and is_inspected):
                raise ProxyConfigError(f"unknown key `{key}`; remove it")
        control = Control.from_request(sampling_params.extra_args)
        if control is None:
            return
        if cls.limit == NO_CONTROLS:
            raise ProxyConfigError(
                "`proxy_…`: the engine was started with a worker of its own (worker_cls) or on a "
                "platform without ours, so requests cannot differ; remove it"
            )
        for role, prompt in control.prompts.items():
            key, size = PROMPT_KEYS[role], cls.vocab_sizes[role]
            if size == 0:
                raise ProxyConfigError(
                    f"`{key}`: the model has no {role}, the base plays its part; remove it"
                )
            if cls.limit in NO_PROMPTS:
                raise ProxyConfigError(f"`{key}`: not possible with {NO_PROMPTS[cls.limit]}")
            if isinstance(prompt, str):
                raise ProxyConfigError(
                    f"`{key}` is text, which only vllm-proxy's own entry points take; send a list "
                    "of token ids, or start the server with vllm-proxy serve"
                )
            if len(prompt) > int(cls.limit):
                raise ProxyConfigError(
                    f"`{key}` has {len(prompt)} tokens; the most here are {cls.limit}"
                )
            if max(prompt) >= size:
                raise ProxyConfigError(
                    f"`{key}` has {max(prompt)}; ids that the {role} can read go from 0 to "
                    f"{size - 1}"
                )
            for name in ("prompt_logprobs", "prompt_logprob_token_ids"):
                if getattr(sampling_params, name) is not None and not is_inspected:
                    raise ProxyConfigError(
                        f"`{key}`: {name} cannot be given, for members do not read the same "
                        "tokens; remove one of them"
                    )


class _ValidatorV1(_Validator, LogitsProcessorV1):
    def __init__(self, *args: object) -> None:
        raise AssertionError("only validates; see `without_ours`")

    def apply(self, logits):
        """Unused."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """Unused."""
        return True

    def update_state(self, batch_update) -> None:
        """Unused."""


class _ValidatorV2(_Validator, LogitsProcessorV2):
    def add_request(self, req_idx: int, sampling_params: "SamplingParams") -> bool:
        """Decline: nothing to do."""
        return False

    def apply(self, logits, ctx):
        """Unused."""
        return logits
