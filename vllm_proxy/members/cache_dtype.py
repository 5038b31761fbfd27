"""The dtype of the KV cache where a checkpoint chooses it: it is the base's, for all members.

Checkpoints with keys and values in fp8 say so, and vLLM follows if `kv_cache_dtype` is auto. Its
attention backends expect one dtype in an engine. So there must be one before layers are built:
while vLLM builds a layer of such a checkpoint, it changes the dtype for the layers after it.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from vllm_proxy.config.roles import Role

if TYPE_CHECKING:
    from vllm.config import LoadConfig, ModelConfig, VllmConfig


def checkpoint_cache_dtype(config: "ModelConfig", load_config: "LoadConfig") -> str:
    """Return the dtype of the KV cache that a member would have in vLLM alone; `auto` if plain."""
    from vllm.config import VllmConfig
    from vllm.utils.torch_utils import resolve_kv_cache_dtype_string

    if config.quantization is None:
        return "auto"
    quantization = VllmConfig.get_quantization_config(config, load_config)
    if getattr(quantization, "kv_cache_scheme", None) is not None:  # compressed-tensors
        return "fp8"
    return resolve_kv_cache_dtype_string("auto", config)


def engine_cache_dtype(config: "VllmConfig", base: "ModelConfig") -> str:
    """Return the dtype of the engine's KV cache: the user's, else what the base's checkpoint says.

    Args:
        config: the engine's.
        base: the base's.
    """
    given = config.cache_config.cache_dtype
    return checkpoint_cache_dtype(base, config.load_config) if given == "auto" else given


def describe_cache_dtype(
    config: "VllmConfig", members: Mapping[Role, "ModelConfig"]
) -> Iterator[str]:
    """Yield what the KV cache's dtype means for members whose checkpoints say something else.

    Args:
        config: the engine's.
        members: all of them.
    """
    cache_dtype = engine_cache_dtype(config, members["base"])
    own = {
        role: checkpoint_cache_dtype(member, config.load_config) for role, member in members.items()
    }
    base = own["base"]
    others = [role for role in members if own[role] != base]
    if not others:
        return
    listed = " and ".join(others)
    if base == cache_dtype == "auto":
        yield (
            f"The checkpoint of {listed} is for a KV cache in {own[others[0]]}, and the base's is "
            "not: the cache is not quantized. Set `engine.kv_cache_dtype` to quantize it for all "
            "members."
        )
    elif base == cache_dtype:
        yield (
            f"The KV cache of all members is in {base}, as the base's checkpoint says. That of "
            f"{listed} does not, and has no scales for it (1.0 is used); set "
            "`engine.kv_cache_dtype: bfloat16` for a cache that is not quantized."
        )
