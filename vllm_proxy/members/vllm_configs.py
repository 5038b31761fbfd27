"""Each member's vLLM configs.

A vLLM worker runs one model. These functions present each member to vLLM's model builder as if it
were that model, with a separate `ModelConfig`, quantization and compile cache.
"""

import dataclasses
from typing import TYPE_CHECKING, cast

from vllm_proxy.config.errors import ProxyConfigError, one_line
from vllm_proxy.config.roles import Role
from vllm_proxy.config.schema import Member, ProxySection
from vllm_proxy.members.images import family_of, whole_model_config
from vllm_proxy.members.recurrent import is_recurrent, state_dtype
from vllm_proxy.members.text_part import (
    TextOverrides,
    base_overrides,
    is_text_part,
    layer_names,
)
from vllm_proxy.members.tying import follow_checkpoint

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.config.cache import MambaDType
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig


def proxy_section(model_config: "ModelConfig") -> ProxySection:
    """Return the validated `proxy` entry of the base's (overridden) Hugging Face config.

    Raises:
        ProxyConfigError: the entry is missing, or one of its fields is wrong.
    """
    values = getattr(model_config.hf_config, "proxy", None)
    if not isinstance(values, dict):
        raise ProxyConfigError(
            "`proxy` is missing",
            field="hf_overrides",
            remedy='add {"proxy": {"expert": …, "antiexpert": …, "alpha": 1.0}}',
        )
    return ProxySection.parse(values, "hf_overrides.proxy")


def member_model_config(parent: "ModelConfig", role: Role, load_format: str) -> "ModelConfig":
    """Return the `ModelConfig` that vLLM would build for a member served alone.

    Settings that must be common are the parent's: dtype, context length, seed, eager mode.
    Settings that belong to a checkpoint are read from the member: architecture, quantization,
    Hugging Face config. `proxy_member` goes into that config because it is part of the hash that
    names compiled graphs: expert and antiexpert often have the same config otherwise, and would
    overwrite each other's graphs.

    Args:
        parent: the `ModelConfig` of `ProxyTunedForCausalLM`, whose `model` is the base.
        role: the member.
        load_format: the engine's.

    Raises:
        ProxyConfigError: vLLM cannot run the member under the parent's settings.
    """
    member = configured_member(parent, role)
    settings = {f.name: getattr(parent, f.name) for f in dataclasses.fields(parent) if f.init}
    settings |= {"model": member.model, "revision": member.revision, "served_model_name": None}
    overrides = {}
    if role == "base":
        overrides = base_overrides(parent)
    else:
        settings |= {
            "tokenizer": member.model,
            "tokenizer_revision": member.revision,
            "hf_config_path": None,
            "code_revision": None,
            "quantization": None,
        }
    overrides["proxy_member"] = role
    family = family_of(parent)
    settings["multimodal_config"] = None
    # A base that is no multimodal model stays in vLLM's hands: what is overridden may be its type.
    is_whole = role == "base" and family is None and not is_text_part(parent.hf_config)
    settings["hf_overrides"] = overrides if is_whole else TextOverrides(overrides, sees=family)
    try:
        config = type(parent)(**settings)
    except (ValueError, OSError) as error:
        raise ProxyConfigError(one_line(error), field=f"{role} {str(member)!r}") from error
    # The configuration is verified already: VllmConfig need not do it again.
    config.is_submodel_config = True
    follow_checkpoint(config, load_format)  # vLLM does this itself, but only for the engine's model
    return config


def configured_member(parent: "ModelConfig", role: Role) -> Member:
    """Return this member as configured."""
    if role == "base":
        return Member(model=parent.model, revision=parent.revision)
    return getattr(proxy_section(parent), role)


def member_vllm_config(vllm_config: "VllmConfig", role: Role) -> "VllmConfig":
    """Return the engine's configuration for one member.

    Scheduler, parallelism and the forward context that attention layers register in are shared.
    """
    from vllm.config.utils import replace

    load_format = vllm_config.load_config.load_format
    model_config = member_model_config(vllm_config.model_config, role, load_format)
    cache_config, windows = vllm_config.cache_config, attention_windows(model_config)
    window = next(iter(windows)) if len(windows) == 1 else None
    if window != cache_config.sliding_window:
        # vLLM stores a window common to all layers here. It is the base's; the others may differ.
        cache_config = replace(cache_config, sliding_window=window)
    if is_recurrent(model_config):
        dtype = cast("MambaDType", state_dtype(vllm_config, model_config))
        cache_config = replace(cache_config, mamba_ssm_cache_dtype=dtype)
    return replace(
        vllm_config,
        model_config=model_config,
        cache_config=cache_config,
        quant_config=_quant_config(vllm_config, model_config, role),
    )


def tower_vllm_config(vllm_config: "VllmConfig", member: "VllmConfig", role: Role) -> "VllmConfig":
    """Return the engine's configuration for the tower of a member that sees images.

    Args:
        vllm_config: the engine's.
        member: of the member's text model.
        role: the member.
    """
    from vllm.config import VllmConfig
    from vllm.config.utils import replace

    whole = whole_model_config(vllm_config.model_config, role, member.model_config)
    quantization = VllmConfig.get_quantization_config(whole, vllm_config.load_config)
    return replace(member, model_config=whole, quant_config=quantization)


def _quant_config(
    vllm_config: "VllmConfig", model_config: "ModelConfig", role: Role
) -> "QuantizationConfig | None":
    """Return a member's quantization, which looks layers up by their names in its checkpoint."""
    from vllm.config import VllmConfig

    config = vllm_config.quant_config  # the engine's was built from the base's checkpoint
    if role != "base":
        config = VllmConfig.get_quantization_config(model_config, vllm_config.load_config)
    if config is not None and is_text_part(model_config.hf_config):
        config.apply_vllm_mapper(layer_names())
    if config is not None and role != "base":
        if vllm_config.cache_config.cache_dtype == "auto" and hasattr(config, "kv_cache_scheme"):
            config.kv_cache_scheme = None  # see `cache_dtype.py`
        resolve = config.get_quant_method
        config.get_quant_method = lambda layer, prefix: resolve(
            layer, prefix.removeprefix(f"{role}.")
        )
    return config


def layer_windows(config: "ModelConfig") -> list[int | None]:
    """Return the sliding window of each of a member's layers; None stands for full attention."""
    window = config.get_sliding_window()
    kinds = getattr(config.hf_text_config, "layer_types", None)
    kinds = kinds or ["sliding_attention"] * config.get_total_num_hidden_layers()
    return [window if kind == "sliding_attention" else None for kind in kinds]


def attention_windows(config: "ModelConfig") -> set[int | None]:
    """Return the different sliding windows of a member's layers; None stands for full attention."""
    return set(layer_windows(config))
