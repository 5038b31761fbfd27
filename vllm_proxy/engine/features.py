"""Features of vLLM that work on one model, and fail or go wrong on several members side by side."""

from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from typing import TYPE_CHECKING

from vllm_proxy.config.engine_arguments import FAST_LOAD_FORMATS, unsupported_argument
from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.roles import Role

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

DRAFTERS = ("ngram", "ngram_gpu", "suffix", "draft_model", "custom_class")
"""vLLM's speculative methods that do not read the hidden states of the model that verifies."""


def require_supported_features(config: "VllmConfig") -> None:
    """Reject a feature that fails with any members. Raises `ProxyConfigError`."""
    rules = _one_model_arguments, _fast_loader, _speculative_method
    if problem := next(filter(None, (rule(config) for rule in rules)), None):
        raise problem


def _one_model_arguments(config: "VllmConfig") -> ProxyConfigError | None:
    """Return the error for an engine argument that is wrong for any members."""
    parallel, offload = config.parallel_config, config.offload_config
    transfer = config.kv_transfer_config
    arguments = {
        "enable_prompt_embeds": config.model_config.enable_prompt_embeds,
        "load_format": config.load_config.load_format,
        "enable_lora": config.lora_config is not None,
        "enable_dbo": parallel.enable_dbo,
        "ubatch_size": parallel.ubatch_size,
        "enable_eplb": parallel.enable_eplb,
        "offload_backend": offload.offload_backend,
        "offload_group_size": offload.prefetch.offload_group_size,
        "kv_transfer_config": transfer and asdict(transfer),
    }
    problems = (unsupported_argument(key, value) for key, value in arguments.items())
    return next((problem for problem in problems if problem), None)


def _fast_loader(config: "VllmConfig") -> ProxyConfigError | None:
    """Return the error for a loader that this machine lacks; vLLM imports it with the weights."""
    from vllm.platforms import current_platform

    load_format, problem = str(config.load_config.load_format), None
    if load_format not in FAST_LOAD_FORMATS:
        return None
    if not current_platform.is_cuda_alike():
        problem = "it copies files to a GPU, and this machine has none"
    elif find_spec(load_format) is None:
        problem = "the package of that name is not installed"
    if problem is None:
        return None
    return ProxyConfigError(
        problem, field="load_format", value=load_format, remedy="remove it, or use safetensors"
    )


def _speculative_method(config: "VllmConfig") -> ProxyConfigError | None:
    """Return the error for drafts of a model that continues the base's hidden states."""
    speculative = config.speculative_config
    if speculative is None or speculative.method in DRAFTERS:
        return None
    return ProxyConfigError(
        "it drafts from the hidden states of one model, and an engine of several members returns "
        "them side by side",
        field="speculative_config.method",
        value=speculative.method,
        remedy="set `speculate`, by which the expert drafts, or use the method ngram, suffix or "
        "draft_model",
    )


def weight_filter_problem(
    config: "VllmConfig", members: Mapping[Role, "ModelConfig"]
) -> str | None:
    """Return why ranks would not read all experts that they hold; None if they do.

    With `enable_ep_weight_filter`, vLLM selects the experts of each rank by one member's number of
    them, and skips others in every checkpoint.
    """
    parallel = config.parallel_config
    is_on = parallel.enable_ep_weight_filter and parallel.enable_expert_parallel
    counts = {role: member.get_num_experts() for role, member in members.items() if member.is_moe}
    if not is_on or len(set(counts.values())) < 2:
        return None
    listed = ", ".join(f"{role} {count}" for role, count in counts.items())
    return f"members have different numbers of experts ({listed})"
