"""How members become models of vLLM's.

vLLM runs one model a worker. These functions present each member to vLLM's own model builder as
if it were that one model: its own `ModelConfig`, its own quantization, its own compile cache.
"""

import dataclasses
import os
from collections.abc import Mapping
from math import gcd
from typing import TYPE_CHECKING

from vllm_proxy.compatibility import require_supported_vllm
from vllm_proxy.config import ROLES, Member, ProxySection, Role
from vllm_proxy.errors import ProxyConfigError, one_line

if TYPE_CHECKING:
    from torch import nn
    from vllm.config import ModelConfig, VllmConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

LOAD_FORMATS = ("auto", "hf", "safetensors", "pt", "npcache", "dummy")
"""Load formats that read `model.secondary_weights`, or (`dummy`) read nothing."""


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


def member_model_config(parent: "ModelConfig", role: Role) -> "ModelConfig":
    """Return the `ModelConfig` that vLLM would make for a member served alone.

    Everything that must be common stays the parent's: dtype, context length, seed, eagerness.
    What belongs to a checkpoint is read anew from the member's own: architecture, quantization,
    Hugging Face config. `proxy_member` goes into that config because it is part of the hash that
    names compiled graphs: expert and antiexpert are often alike in every other respect, and would
    overwrite each other's.

    Args:
        parent: the `ModelConfig` of `ProxyTunedForCausalLM`, whose `model` is the base.
        role: which member.

    Raises:
        ProxyConfigError: vLLM cannot run the member under the parent's settings.
    """
    member = _member(parent, role)
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
    return config


def _member(parent: "ModelConfig", role: Role) -> Member:
    if role == "base":
        return Member(model=parent.model, revision=parent.revision)
    return getattr(proxy_section(parent), role)


def member_vllm_config(vllm_config: "VllmConfig", role: Role) -> "VllmConfig":
    """Return the engine's configuration as one member sees it.

    Scheduler, parallelism and the forward context that attention layers join are the engine's.
    """
    from vllm.config.utils import replace

    return replace(
        vllm_config,
        model_config=member_model_config(vllm_config.model_config, role),
        # The base's own: the engine's configuration was made from its checkpoint.
        quant_config=vllm_config.quant_config if role == "base" else None,
    )


def build_member(config: "VllmConfig", role: Role) -> "nn.Module":
    """Build a member with vLLM's own class for its architecture, weights not yet loaded.

    Args:
        config: what `member_vllm_config` returned for *role*.
        role: tag of what is compiled for the member and, but for the base, prefix of its layers:
            the engine sees the layers of all members as those of one model. The base's keep the
            names they have when it is served alone, which its quantization may refer to.
    """
    from vllm.compilation.backends import set_model_tag
    from vllm.model_executor.models.utils import init_vllm_registered_model

    with set_model_tag(role):
        return init_vllm_registered_model(config, prefix="" if role == "base" else role)


def member_weights(vllm_config: "VllmConfig", role: Role) -> "DefaultModelLoader.Source":
    """Return where vLLM's loader finds a member's checkpoint; names come out as `role.name`."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    member = _member(vllm_config.model_config, role)
    return DefaultModelLoader.Source(member.model, member.revision, prefix=f"{role}.")


class ProxyModelConfigHook:
    """`MODELS_CONFIG_MAP` entry: refuses, before any process is started, what cannot work.

    Covers users of the stock `vllm serve` and `vllm.LLM`, who never pass by our own checks.
    """

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        """Check the installed vLLM and the `proxy` section. Raises `ProxyConfigError`."""
        require_supported_vllm()
        proxy_section(model_config)

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Check every member under the engine's settings. Raises `ProxyConfigError`."""
        from vllm.platforms import current_platform

        parent = vllm_config.model_config
        if parent.enable_prompt_embeds:
            raise ProxyConfigError(
                "enable_prompt_embeds: members have embeddings of their own; send token ids"
            )
        if vllm_config.load_config.load_format not in LOAD_FORMATS:
            raise ProxyConfigError(
                f"load_format {vllm_config.load_config.load_format!r} reads one checkpoint only; "
                f"use one of {', '.join(LOAD_FORMATS)}"
            )
        if vllm_config.lora_config is not None:
            raise ProxyConfigError(
                "enable_lora: no adapters a request; give one to the expert or the antiexpert: "
                '{"expert": {"model": …, "lora": …}}'
            )
        if current_platform.is_cpu():
            # On a CPU vLLM (0.32) saves what it compiled ahead of time but cannot load it back, and
            # compiles every member again at every start. Inductor's own cache does its work there.
            os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
        members = {role: member_model_config(parent, role) for role in ROLES}
        for role, member in members.items():
            require_supported_member(member, role)
        size = vllm_config.parallel_config.tensor_parallel_size
        if reason := unfit_tensor_parallel_size(members, size):
            raise ProxyConfigError(f"tensor_parallel_size is {size}: {reason}")
        if reason := unfit_pipeline(vllm_config):
            raise ProxyConfigError(f"enforce_eager: {reason}")
        for role, member in members.items():
            try:
                member.verify_with_parallel_config(vllm_config.parallel_config)
            except ValueError as error:
                raise ProxyConfigError(f"{role} {member.model!r}: {one_line(error)}") from error


def require_supported_member(config: "ModelConfig", role: Role) -> None:
    """Refuse what is no text-only decoder, and quantized small members. Raises `ProxyConfigError`.

    The layers of expert and antiexpert bear the role's prefix, so a quantization config that names
    layers to leave alone would miss them.
    """
    kinds = {
        "an encoder-decoder": config.is_encoder_decoder,
        "a multimodal model": config.is_multimodal_model,
        "a pooling model": config.runner_type == "pooling",
        "a model with recurrent layers": config.is_hybrid or config.has_inner_state,
    }
    for kind, found in kinds.items():
        if found:
            raise ProxyConfigError(
                f"{role} {config.model!r}: {config.architecture} is {kind}; "
                "members must be text-only decoders"
            )
    if role != "base" and config.quantization is not None:
        raise ProxyConfigError(
            f"{role} {config.model!r}: it is quantized ({config.quantization}), which only the "
            "base may be; use the unquantized checkpoint"
        )


def unfit_pipeline(config: "VllmConfig") -> str | None:
    """Return why vLLM would start pipeline ranks that fail at the first request, and the remedy.

    Its CPU runner V1 makes the buffers that a rank receives into while it warms up compiled code,
    and at no other time.
    """
    from vllm.platforms import current_platform

    size = config.parallel_config.pipeline_parallel_size
    eager = config.model_config.enforce_eager and not config.use_v2_model_runner
    if size > 1 and eager and current_platform.is_cpu():
        return f"on a CPU it cannot go with pipeline_parallel_size {size}; set it to false"
    return None


def unfit_tensor_parallel_size(members: Mapping[Role, "ModelConfig"], size: int) -> str | None:
    """Return why *size* ranks cannot share every member's heads, and what to use; None if they can.

    vLLM's own check passes over KV heads; its layers then fail an assertion while they are built.
    """
    archs = {role: config.model_arch_config for role, config in members.items()}

    def fits(ranks: int, role: Role) -> bool:
        heads, kv_heads = archs[role].total_num_attention_heads, archs[role].total_num_kv_heads
        # KV heads are split, or copied evenly
        return heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)

    bad = [role for role in archs if not fits(size, role)]
    if not bad:
        return None
    most = gcd(*(arch.total_num_attention_heads for arch in archs.values()))
    sizes = [str(n) for n in range(1, most + 1) if all(fits(n, role) for role in archs)]
    listed = ", ".join(
        f"{role} ({archs[role].total_num_attention_heads} and {archs[role].total_num_kv_heads})"
        for role in bad
    )
    return f"it does not divide the attention and KV heads of {listed}; use {' or '.join(sizes)}"
