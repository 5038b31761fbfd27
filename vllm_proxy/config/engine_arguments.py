"""Groups of vLLM's engine arguments, and their form on the command line of `vllm serve`."""

import json
from collections.abc import Mapping
from typing import Any

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.kv_transfer import connector_problem
from vllm_proxy.config.media import LIMITS, limits_problem

RESOURCES = frozenset(
    {
        "cpu_offload_gb",
        "disable_log_stats",
        "distributed_executor_backend",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "max_num_batched_tokens",
        "max_num_seqs",
        "pipeline_parallel_size",
        "tensor_parallel_size",
        "use_tqdm_on_load",
    }
)
"""Engine arguments that decide where a job runs, not what it computes. They may change between the
runs of a job, for example after it ran out of memory. So may secrets."""

SERVER_SAMPLING = frozenset(
    {
        "frequency_penalty",
        "min_p",
        "presence_penalty",
        "repetition_penalty",
        "temperature",
        "top_k",
        "top_p",
    }
)
"""Sampling parameters for which a vLLM server accepts defaults (`get_diff_sampling_param`). It also
accepts `max_new_tokens`, but as a limit for requests, which `max_tokens` is not."""


FAST_LOAD_FORMATS = ("fastsafetensors", "instanttensor")
"""Load formats that copy safetensors files to GPUs, by a package of that name."""

LOAD_FORMATS = (
    *("auto", "hf", "safetensors", *FAST_LOAD_FORMATS, "mistral", "pt", "npcache"),
    "dummy",
)
"""Load formats of vLLM's default loader, which reads `model.secondary_weights`; and `dummy`, which
reads nothing."""

_OFF = (False, None, "")
_MICROBATCHES = "microbatches are not supported: members would read the values of other rows"
_PREFETCH = "vLLM prefetches the layers of one model only"
_ALLOWED = {
    # key: the values that several members support, the problem with others, and the remedy
    "enable_lora": (
        _OFF,
        "vLLM's adapters are of one model",
        "name adapters of the antiexpert as `experts`, of which each request chooses one",
    ),
    "enable_prompt_embeds": (
        _OFF,
        "each member needs different embeddings",
        "send token ids or text",
    ),
    "enable_dbo": (_OFF, _MICROBATCHES, "remove it"),
    "ubatch_size": ((0, 1, None), _MICROBATCHES, "remove it"),
    "enable_eplb": (_OFF, "experts of several members cannot be balanced", "remove it"),
    "offload_backend": (("auto", "uva"), _PREFETCH, "use uva, with `cpu_offload_gb`"),
    "offload_group_size": ((0, None), _PREFETCH, "use `cpu_offload_gb` instead"),
    "runner": (("auto", "generate"), "members generate text", "remove it"),
    "convert": (("auto", "none"), "members generate text", "remove it"),
    "model_impl": (
        ("auto", "vllm"),
        "the class that holds the members exists only for vLLM's implementation",
        "remove it; to run a member in vLLM's Transformers backend, name TransformersForCausalLM "
        "(a mixture of experts: TransformersMoEForCausalLM) as `architectures` in its config.json",
    ),
    "load_format": (
        LOAD_FORMATS,
        "it can read one checkpoint only",
        f"use one of {', '.join(LOAD_FORMATS)}",
    ),
}


def unsupported_argument(key: str, value: Any, section: str = "") -> ProxyConfigError | None:
    """Return the error for a value that vLLM supports, but not for a model of several members.

    Args:
        key: the engine argument.
        value: its value.
        section: what precedes the key where the user wrote it: `engine.`, or nothing.
    """
    if key == "kv_transfer_config":
        return connector_problem(value, section)
    if key == LIMITS:
        return limits_problem(value, section)
    allowed, problem, remedy = _ALLOWED.get(key, ((value,), "", ""))
    if value in allowed:
        return None
    return ProxyConfigError(problem, field=section + key, value=value, remedy=remedy)


def allows_images(limits: Any) -> bool:
    """Whether vLLM's `limit_mm_per_prompt` allows an image in a prompt, which asks for towers.

    Args:
        limits: items per prompt by modality, `{"image": 2}` or `{"image": {"count": 2, …}}`.
            Without it, or without `image`, members read text only.
    """
    limit = limits.get("image") if isinstance(limits, Mapping) else None
    if isinstance(limit, Mapping):
        limit = limit.get("count", 1)
    return isinstance(limit, int) and limit > 0


def serve_arguments(engine_args: Mapping[str, Any]) -> list[str]:
    """Return the command line after `vllm serve` for these engine arguments."""
    words = [engine_args["model"]]
    for key, value in engine_args.items():
        flag = "--" + key.replace("_", "-")
        if key == "model" or value is None:
            continue
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        elif isinstance(value, dict | list):
            words += [flag, json.dumps(value)]
        else:
            words += [flag, str(value)]
    return words
