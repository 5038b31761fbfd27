"""Checks a request where vLLM admits it: in the process that can still answer with HTTP 400.

vLLM calls `validate_params` of every custom logits processor on each request, under both model
runners and from every entry point. Our processors do only that; they never change logits. What
depends on the prompt, or on what vLLM adds to the parameters, is checked after vLLM's own checks,
in a wrapper around `InputProcessor.process_inputs`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsProcessor as LogitsProcessorV2,
)

from vllm_proxy.config.errors import ProxyConfigError, did_you_mean
from vllm_proxy.config.request import (
    EXPERT_KEY,
    INSPECTED,
    INTERNAL,
    PROMPT_KEYS,
    RequestControl,
)
from vllm_proxy.config.roles import ROLES, Role

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import ModelConfig

NO_PROMPTS_REASONS = {
    "images": "images (limit_mm_per_prompt)",
    "windows": "sliding windows of several sizes (set disable_hybrid_kv_cache_manager; with "
    "pipelines, one of the sizes must be full attention)",
    "window": "sliding windows and a worker of your own (worker_cls)",
    "graphs": "full CUDA graphs (set compilation_config.cudagraph_mode to PIECEWISE or NONE)",
    "breakable": "breakable CUDA graphs (set VLLM_USE_BREAKABLE_CUDAGRAPH to 0)",
    "states": "recurrent layers (Mamba, gated delta nets, short convolutions) under Model Runner "
    "V1, or next to sliding windows",
    "routing": "enable_return_routed_experts",
    "transfer": "a KV connector (kv_transfer_config or kv_offloading_size)",
    "context": "context parallelism",
    "experts": "data parallel experts",
    "speculation": "adaptive verification of drafts",
    "scheduler": "a scheduler of your own (scheduler_cls)",
}
"""Reasons why members cannot have different prompts in an engine, and the words for them."""
NO_CONTROLS = "worker"
"""Means that the engine's worker is not ours (worker_cls): requests cannot set anything."""

_INSPECTING = ContextVar("_INSPECTING", default=False)


@contextmanager
def inspecting() -> Iterator[None]:
    """Admit requests that inspect an answer, from this process and within the body only.

    Somebody must fetch what they leave in the workers, so a server's clients may not send them.
    """
    token = _INSPECTING.set(True)
    try:
        yield
    finally:
        _INSPECTING.reset(token)


def validator(runner: str, limit: int | str, vocab_sizes: Mapping[Role, int]) -> str:
    """Return the name by which vLLM finds the processor that checks an engine's requests.

    vLLM passes no arguments to the class that it finds, and looks it up in several processes. So
    the name carries the limits of the engine, for example `V2_511_480_500_500`, and `__getattr__`
    makes the class from it.

    Args:
        runner: `V1` or `V2`.
        limit: the most tokens that a member's prompt may have, or a key of `NO_PROMPTS_REASONS`, or
            `NO_CONTROLS`.
        vocab_sizes: how many ids each member can read, of those that there are.
    """
    sizes = "_".join(str(vocab_sizes.get(role, 0)) for role in ROLES)
    return f"{__name__}:{runner}_{limit}_{sizes}"


@cache  # looked up for every request
def __getattr__(name: str) -> type:
    """Make the class that `validator` named; called by Python for an unknown module attribute."""
    bases = {"V1": _ValidatorV1, "V2": _ValidatorV2}
    runner, *facts = name.split("_")
    if runner not in bases or len(facts) != 1 + len(ROLES):
        raise AttributeError(name)
    _check_admitted()  # in whatever process vLLM looks it up
    limit, *sizes = facts
    vocab_sizes = dict(zip(ROLES, map(int, sizes), strict=True))
    return type(name, (bases[runner],), {"limit": limit, "vocab_sizes": vocab_sizes})


def admits_prompts(model_config: "ModelConfig") -> bool:
    """Whether an engine's requests may have different prompts for members."""
    ours = validator_of(model_config)
    return ours is not None and ours.limit not in (*NO_PROMPTS_REASONS, NO_CONTROLS)


def validator_of(model_config: "ModelConfig") -> "type[_Validator] | None":
    """Return the class that checks the requests of an engine; None if its model is not ours."""
    prefix = f"{__name__}:"
    names = [str(p) for p in model_config.logits_processors or ()]
    ours = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    return __getattr__(ours[0]) if ours else None


def _check_admitted() -> None:
    """Make vLLM also refuse requests by `validate_request`, in this process, from now on."""
    from vllm.v1.engine.input_processor import InputProcessor

    admit = InputProcessor.process_inputs
    if hasattr(admit, "__wrapped__"):
        return

    @wraps(admit)
    def process_inputs(self: InputProcessor, *args: Any, **kwargs: Any) -> Any:
        request = admit(self, *args, **kwargs)
        ours = validator_of(self.model_config)
        if ours is not None and request.sampling_params is not None:
            try:
                ours.validate_request(
                    request.prompt_token_ids or (),
                    request.sampling_params,
                    self.model_config.max_model_len,
                )
                require_expert(request.sampling_params.extra_args, self.model_config)
            except ProxyConfigError as error:
                raise VLLMValidationError(str(error)) from error
        return request

    InputProcessor.process_inputs = process_inputs


def require_expert(values: Mapping[str, Any] | None, model_config: "ModelConfig") -> None:
    """Reject the name of an expert that the engine does not have. Raises `ProxyConfigError`."""
    if (name := (values or {}).get(EXPERT_KEY)) is None:
        return
    names = model_config.hf_config.proxy.get("experts", {})
    if name not in names:
        remedy = did_you_mean(str(name), names) if names else "the configuration has no `experts`"
        raise ProxyConfigError(field=EXPERT_KEY, value=name, remedy=remedy)


@contextmanager
def without_ours(model_config: "ModelConfig") -> Iterator[None]:
    """Hide our processors from vLLM's code that makes instances of them."""
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
        """Reject what this engine cannot do. Raises `ProxyConfigError` (a `ValueError`)."""
        extra_args = sampling_params.extra_args or {}
        is_inspected = INSPECTED in extra_args and _INSPECTING.get()
        for key in INTERNAL:
            if key in extra_args and not (key == INSPECTED and is_inspected):
                raise ProxyConfigError("unknown key", field=key, remedy="remove it")
        control = RequestControl.from_extra_args(sampling_params.extra_args)
        if control is None:
            return
        if cls.limit == NO_CONTROLS:
            raise ProxyConfigError(
                "this engine does not run vllm-proxy's worker (worker_cls is set, or the platform "
                "is not supported), so per-request values are not available",
                field="proxy_…",
                remedy="remove them",
            )
        for role, prompt in control.prompts.items():
            key, size = PROMPT_KEYS[role], cls.vocab_sizes[role]
            if size == 0:
                raise ProxyConfigError(
                    f"the model has no {role}; the base is used in its place",
                    field=key,
                    remedy="remove it",
                )
            if cls.limit in NO_PROMPTS_REASONS:
                raise ProxyConfigError(
                    f"not possible with {NO_PROMPTS_REASONS[cls.limit]}",
                    field=key,
                    remedy="remove it",
                )
            if isinstance(prompt, str):
                raise ProxyConfigError(
                    "text is accepted by vllm-proxy's own entry points only",
                    field=key,
                    remedy="send a list of token ids, or start the server with vllm-proxy serve",
                )
            _require_length(prompt, key, int(cls.limit))
            if max(prompt) >= size:
                raise ProxyConfigError(
                    f"it has the id {max(prompt)}; the {role} reads ids from 0 to {size - 1}",
                    field=key,
                    remedy="remove it",
                )

    @classmethod
    def validate_request(
        cls, prompt: Sequence[int], params: "SamplingParams", max_model_len: int
    ) -> None:
        """Reject ids that a member cannot read, and parameters that leave no token to generate.

        Args:
            prompt: the base's, as token ids.
            params: with the stop tokens and the tokenized words that vLLM adds at admission.
            max_model_len: the engine's. `auto` is known only after it has started, and is then
                smaller than the one in the limit, where memory is scarce.

        Raises:
            ProxyConfigError: naming the field and the remedy.
        """
        control = RequestControl.from_extra_args(params.extra_args) or RequestControl()
        is_inspected = INSPECTED in (params.extra_args or {})
        for role, own in control.prompts.items():
            _require_length(own, PROMPT_KEYS[role], max_model_len - 1)
        last, first = max(prompt, default=0), min(prompt, default=0)
        for role, size in cls.vocab_sizes.items():
            if size == 0 or role in control.prompts:
                continue
            if (first < 0 or last >= size) and (is_inspected or role in control.members):
                raise _unreadable(prompt, role, size)
        cls._require_a_token(params)

    @classmethod
    def fewest_ids(cls) -> tuple[Role, int]:
        """Return the member with the fewest ids, and how many: those that can be generated."""
        sizes = {role: size for role, size in cls.vocab_sizes.items() if size}
        role = min(sizes, key=sizes.__getitem__)
        return role, sizes[role]

    @classmethod
    def _require_a_token(cls, params: "SamplingParams") -> None:
        role, shared = cls.fewest_ids()
        lacking = f"that the {role} lacks: all members have the ids from 0 to {shared - 1}"
        allowed = params.allowed_token_ids
        if allowed is not None and min(allowed) >= shared:
            raise ProxyConfigError(
                f"it has only ids {lacking}", field="allowed_token_ids", remedy="add one of these"
            )
        if max(getattr(params, "trace_decode_token_ids", None) or [0]) >= shared:
            raise ProxyConfigError(
                f"it has ids {lacking}", field="trace_decode_token_ids", remedy="remove them"
            )
        limits = _limits(params)
        banned = set().union(*limits.values())
        candidates = range(shared) if allowed is None else [i for i in allowed if i < shared]
        if banned.issuperset(candidates):
            names = ["allowed_token_ids"] * (allowed is not None) + list(limits)
            listed = " and ".join(f"`{name}`" for name in names)
            raise ProxyConfigError(f"{listed} leave no token to generate; remove one of them")
        structured, end = params.structured_outputs, params.eos_token_id
        is_structured = structured is not None and not structured.all_constraints_none()
        if is_structured and end is not None and end >= shared:
            raise ProxyConfigError(
                f"they end with the token {end}, which the {role} lacks, so it is never generated",
                field="structured_outputs",
                remedy="remove them",
            )


def _require_length(prompt: Sequence[object] | str, key: str, limit: int) -> None:
    if len(prompt) > limit:
        raise ProxyConfigError(
            f"it has {len(prompt)} tokens, more than the limit of {limit}",
            field=key,
            remedy="shorten it",
        )


def _limits(params: "SamplingParams") -> dict[str, set[int]]:
    """Return the fields that forbid tokens, and the tokens that each forbids at the first step."""
    bias = params.logit_bias or {}
    for token, value in bias.items():
        if math.isnan(value) or value == math.inf:
            raise ProxyConfigError(
                field=f"`logit_bias` of {token}", value=value, remedy="give a finite number"
            )
    found = {
        "bad_words": {ids[0] for ids in params.bad_words_token_ids or () if len(ids) == 1},
        "min_tokens": set(params.all_stop_token_ids) if params.min_tokens else set(),
        "logit_bias": {token for token, value in bias.items() if value == -math.inf},
    }
    return {name: ids for name, ids in found.items() if ids}


def _unreadable(prompt: Sequence[int], role: Role, size: int) -> ProxyConfigError:
    at = next(i for i, id_ in enumerate(prompt) if not 0 <= id_ < size)
    remedy = "remove it"
    if role in PROMPT_KEYS:
        remedy += f", or give the {role} a prompt without it (`{PROMPT_KEYS[role]}`)"
    return ProxyConfigError(
        f"it has the id {prompt[at]} at position {at}; the {role} reads ids from 0 to {size - 1}",
        field="prompt",
        remedy=remedy,
    )


class _ValidatorV1(_Validator, LogitsProcessorV1):
    def __init__(self, *args: object) -> None:
        raise AssertionError("never instantiated: it only checks requests; see `without_ours`")

    def apply(self, logits: Any) -> Any:
        """Part of vLLM's interface; never called."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """Part of vLLM's interface; never called."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """Part of vLLM's interface; never called."""


class _ValidatorV2(_Validator, LogitsProcessorV2):
    def add_request(self, req_idx: int, sampling_params: "SamplingParams") -> bool:
        """Tell vLLM that this processor has nothing to do for the request."""
        return False

    def apply(self, logits: Any, ctx: Any) -> Any:
        """Part of vLLM's interface; never called."""
        return logits
