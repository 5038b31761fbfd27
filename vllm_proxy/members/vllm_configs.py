"""How members become models of vLLM's.

vLLM runs one model a worker. These functions present each member to vLLM's own model builder as
if it were that one model: its own `ModelConfig`, its own quantization, its own compile cache.
"""

import dataclasses
from typing import TYPE_CHECKING

from vllm_proxy.config.errors import ProxyConfigError, one_line
from vllm_proxy.config.roles import Role
from vllm_proxy.config.schema import Member, ProxySection
from vllm_proxy.members.tying import follow_checkpoint

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig


def proxy_section(model_config: "ModelConfig") -> ProxySection:
    """Return the validated `proxy` entry of the base's (overridden) Hugging Face config.

    Raises:
        ProxyConfigError: the entry is missing, or one of its fields is wrong.
    """
    values = getattr(model_config.hf_config, "proxy", None)
    if not isinstance(values, dict):
        raise ProxyConfigError(
            "hf_overrides: `proxy` is missing; add "
            '{"proxy": {"expert": …, "antiexpert": …, "alpha": 1.0}}'
        )
    return ProxySection.parse(values, "hf_overrides.proxy")


def member_model_config(parent: "ModelConfig", role: Role, load_format: str) -> "ModelConfig":
    """Return the `ModelConfig` that vLLM would make for a member served alone.

    Everything that must be common stays the parent's: dtype, context length, seed, eagerness.
    What belongs to a checkpoint is read anew from the member's own: architecture, quantization,
    Hugging Face config. `proxy_member` goes into that config because it is part of the hash that
    names compiled graphs: expert and antiexpert are often alike in every other respect, and would
    overwrite each other's.

    Args:
        parent: the `ModelConfig` of `ProxyTunedForCausalLM`, whose `model` is the base.
        role: which member.
        load_format: the engine's.

    Raises:
        ProxyConfigError: vLLM cannot run the member under the parent's settings.
    """
    member = configured_member(parent, role)
    settings = {f.name: getattr(parent, f.name) for f in dataclasses.fields(parent) if f.init}
    settings |= {"model": member.model, "revision": member.revision, "served_model_name": None}
    overrides = {}
    if role == "base":
        overrides = {
            k: v for k, v in parent.hf_overrides.items() if k not in ("architectures", "proxy")
        }
    else:
        settings |= {
            "tokenizer": member.model,
            "tokenizer_revision": member.revision,
            "hf_config_path": None,
            "code_revision": None,
            "quantization": None,
        }
    settings["hf_overrides"] = {**overrides, "proxy_member": role}
    try:
        config = type(parent)(**settings)
    except (ValueError, OSError) as error:
        raise ProxyConfigError(f"{role} {str(member)!r}: {one_line(error)}") from error
    # A view of a configuration that is already verified: tells VllmConfig not to start over.
    config.is_submodel_config = True
    follow_checkpoint(config, load_format)  # of the engine's model, vLLM does that itself
    return config


def configured_member(parent: "ModelConfig", role: Role) -> Member:
    """Return what the configuration says of this member."""
    if role == "base":
        return Member(model=parent.model, revision=parent.revision)
    return getattr(proxy_section(parent), role)


def member_vllm_config(vllm_config: "VllmConfig", role: Role) -> "VllmConfig":
    """Return the engine's configuration as one member sees it.

    Scheduler, parallelism and the forward context that attention layers join are the engine's.
    """
    from vllm.config.utils import replace

    load_format = vllm_config.load_config.load_format
    model_config = member_model_config(vllm_config.model_config, role, load_format)
    cache_config, windows = vllm_config.cache_config, attention_windows(model_config)
    window = next(iter(windows)) if len(windows) == 1 else None
    if window != cache_config.sliding_window:
        # A window of all layers is kept here: the base's, which the others would inherit.
        cache_config = replace(cache_config, sliding_window=window)
    return replace(
        vllm_config,
        model_config=model_config,
        cache_config=cache_config,
        quant_config=_quant_config(vllm_config, model_config, role),
    )


def _quant_config(
    vllm_config: "VllmConfig", model_config: "ModelConfig", role: Role
) -> "QuantizationConfig | None":
    """Return a member's own quantization, which finds layers by the names its checkpoint has."""
    from vllm.config import VllmConfig

    if role == "base":  # the engine's configuration was made from its checkpoint
        return vllm_config.quant_config
    config = VllmConfig.get_quantization_config(model_config, vllm_config.load_config)
    if config is not None:
        resolve = config.get_quant_method
        config.get_quant_method = lambda layer, prefix: resolve(
            layer, prefix.removeprefix(f"{role}.")
        )
    return config


def attention_windows(config: "ModelConfig") -> set[int | None]:
    """Return the sliding windows of a member's layers; None stands for full attention."""
    window = config.get_sliding_window()
    types = getattr(config.hf_text_config, "layer_types", None) or ["sliding_attention"]
    return {window if kind == "sliding_attention" else None for kind in types}
