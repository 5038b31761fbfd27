"""Members with recurrent layers: Mamba, gated delta nets and short convolutions.

Such a layer keeps one state of fixed size for each request, in a block of the KV cache. vLLM sets
up states by the one model of an engine; here the engine's settings must fit all members.
"""

import copy
from collections.abc import Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, cast

from vllm_proxy.config.roles import Role
from vllm_proxy.members.images import FAMILIES, sees

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.config.cache import CacheConfig, MambaDType


def is_recurrent(config: "ModelConfig") -> bool:
    """Whether a member has layers that keep a state; some Granite 4 models have none."""
    return config.is_hybrid or config.is_attention_free


def recurrent_roles(members: Mapping[Role, "ModelConfig"]) -> list[Role]:
    """Return the members that have recurrent layers."""
    return [role for role, member in members.items() if is_recurrent(member)]


def member_view(config: "VllmConfig", member: "ModelConfig") -> "VllmConfig":
    """Return the engine's configuration with one member as its model, for vLLM's config hooks.

    What a hook must not change for the other members is copied: the KV cache, and how answers are
    parsed.
    """
    view = copy.copy(config)
    view.model_config = member
    if sees(member):  # the hook of a text model alone may take its M-RoPE away (Qwen3.5)
        view.model_config = copy.copy(member)
        view.model_config._architecture = FAMILIES[member.hf_config.text_of]
    view.cache_config = copy.copy(config.cache_config)
    view.speculative_config = copy.copy(config.speculative_config)
    view.structured_outputs_config = copy.copy(config.structured_outputs_config)
    return view


def share_state_settings(cache: "CacheConfig", members: Iterable["CacheConfig"]) -> None:
    """Give the engine the block size and the cache mode of states that vLLM chose for members.

    They are the same for all: vLLM derives them from the engine's other settings.

    Args:
        cache: the engine's, which is changed.
        members: of members with recurrent layers.
    """
    for one in members:
        cache.mamba_block_size = one.mamba_block_size
        cache.mamba_cache_mode = one.mamba_cache_mode


def state_dtype(config: "VllmConfig", member: "ModelConfig") -> str:
    """Return the dtype of a member's states: the user's, else what its architecture wants."""
    view = member_view(config, copy.copy(member))
    view.model_config.config_updated = False  # vLLM runs hooks once for each `ModelConfig`
    view.try_verify_and_update_config()
    return view.cache_config.mamba_ssm_cache_dtype


def layers_without_attention(config: "ModelConfig") -> set[int]:
    """Return the numbers of a member's layers that have no attention."""
    if not is_recurrent(config):
        return set()
    return {i for i, kind in enumerate(_kinds(config)) if kind not in _WITH_ATTENTION}


def state_bytes(config: "VllmConfig", member: "ModelConfig") -> tuple[int, ...]:
    """Return the bytes of the state that a request has in each layer, on each rank; 0 if none.

    With prefix caching, vLLM keeps two states of each running request, and those of prefixes. What
    it adds to fill pages is not counted.

    Args:
        config: the engine's.
        member: the member's.
    """
    from vllm.utils.torch_utils import get_dtype_size

    if not is_recurrent(member):
        return (0,) * member.get_total_num_hidden_layers()
    view = member_view(config, copy.copy(member))
    view.model_config.dtype = config.model_config.dtype  # the member's may be its checkpoint's
    view.cache_config.mamba_ssm_cache_dtype = cast("MambaDType", state_dtype(config, member))
    model, _ = member.registry.resolve_model_cls(member.architecture, model_config=member)
    shapes = model.get_mamba_state_shape_from_config(view)
    dtypes = model.get_mamba_state_dtype_from_config(view)
    each = sum(prod(s) * get_dtype_size(d) for s, d in zip(shapes, dtypes, strict=True))
    return tuple(each if kind in _WITH_STATE else 0 for kind in _kinds(member))


_WITH_STATE = {"mamba", "linear_attention", "conv", "hybrid"}
_WITH_ATTENTION = {"attention", "full_attention", "sliding_attention", "hybrid"}


def _kinds(config: "ModelConfig") -> list[str]:
    """Return the kind of each layer of a recurrent member, as transformers or vLLM name it."""
    text = config.hf_text_config
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    if kinds is not None:
        return list(kinds)
    alone = "mamba" if config.is_attention_free else "hybrid"
    return [alone] * config.get_total_num_hidden_layers()
