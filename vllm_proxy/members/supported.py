"""Whether one model can be a member on this machine."""

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from vllm_proxy.config.errors import ProxyConfigError, one_line
from vllm_proxy.config.roles import Role

if TYPE_CHECKING:
    from vllm.config import LoadConfig, ModelConfig, ParallelConfig, VllmConfig
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig


_OWN_NAMES = {"PhimoeForCausalLM": "PhiMoEForCausalLM"}
"""Classes of transformers that vLLM (0.32) has under another name -> that name."""
SATURATES_MESSAGE = "vLLM's kernel computes int8 activations (W8A8) wrongly on a CPU without VNNI"


def require_supported_member(
    config: "ModelConfig", role: Role, load_config: "LoadConfig | None"
) -> None:
    """Reject a model that is not a text-only decoder, or cannot be loaded on this machine.

    Args:
        config: vLLM's config of the member served alone.
        role: the member.
        load_config: how it is loaded; None if that happens on another machine.

    Raises:
        ProxyConfigError: names role, model and remedy.
    """
    if config.model_weights:
        raise ProxyConfigError(
            "vLLM streams a model from object storage with a loader that can read one checkpoint "
            "only",
            field=f"{role} {config.model_weights!r}",
            remedy="download it, and give the directory",
        )
    name = f"{role} {config.model!r}"
    kinds = {
        "an encoder-decoder": config.is_encoder_decoder,
        "a multimodal model": config.is_multimodal_model,
        "a pooling model": config.runner_type == "pooling",
    }
    for kind, found in kinds.items():
        if found:
            raise ProxyConfigError(
                f"{config.architecture} is {kind}",
                field=name,
                remedy="members must be text-only decoders",
            )
    for given in config.architectures:
        if given in _OWN_NAMES:
            raise ProxyConfigError(
                f"vLLM's Transformers backend fails at the first request to {given}",
                field=name,
                remedy=f"name {_OWN_NAMES[given]} as `architectures` in its config.json, which is "
                "vLLM's own class",
            )
    if config.quantization is not None and load_config is not None:
        _require_quantization_kernel(config, load_config, name)


def count_experts(engine: "VllmConfig", members: Mapping[Role, "ModelConfig"]) -> None:
    """Let vLLM see the engine's model as a mixture of experts if a member is one.

    Otherwise it makes no group of ranks for experts, and data parallel engines do not step
    together. The numbers of experts stay the base's, if it has some.
    """
    mixed = [member.model_arch_config for member in members.values() if member.is_moe]
    if mixed and not engine.model_config.is_moe:
        known = engine.model_config.model_arch_config
        known.num_experts = mixed[0].num_experts
        known.num_experts_per_token = mixed[0].num_experts_per_token
        engine.parallel_config.is_moe_model = True


def verify_parallelism(config: "ModelConfig", parallel: "ParallelConfig") -> None:
    """Have vLLM check a member under the engine's parallelism. Raises `ValueError`.

    vLLM rejects expert parallelism for a model without experts. A member without them can run next
    to one that has some: its layers are split as without it.
    """
    if parallel.enable_expert_parallel and not config.is_moe:
        parallel = copy.copy(parallel)
        parallel.enable_expert_parallel = False
    config.verify_with_parallel_config(parallel)


def saturates(config: "ModelConfig", load_config: "LoadConfig") -> bool:
    """Whether vLLM computes a member's int8 products wrongly on this machine, also without us.

    vLLM multiplies int8 activations by int8 weights with oneDNN, which adds pairs of products in
    16 bits (`vpmaddubsw`) on a CPU without VNNI.
    """
    import torch
    from vllm.config import VllmConfig
    from vllm.platforms import CpuArchEnum, current_platform

    if config.quantization is None or not current_platform.is_cpu():
        return False
    x86 = current_platform.get_cpu_architecture() == CpuArchEnum.X86
    if not x86 or torch.cpu._is_vnni_supported():
        return False
    return any(
        scheme["weights"].type == "int" and scheme.get("input_activations") is not None
        for scheme in _schemes(VllmConfig.get_quantization_config(config, load_config))
    )


def _schemes(quantization: "QuantizationConfig | None") -> Iterable[Mapping[str, Any]]:
    """Return compressed-tensors' scheme for each kind of layer; nothing for other methods."""
    return getattr(quantization, "target_scheme_map", {}).values()


def _require_quantization_kernel(
    config: "ModelConfig", load_config: "LoadConfig", name: str
) -> None:
    import torch
    from vllm.config import VllmConfig
    from vllm.platforms import current_platform
    from vllm.scalar_type import scalar_types

    try:  # vLLM checks dtype, GPU and the section in config.json
        quantization = VllmConfig.get_quantization_config(config, load_config)
    except ValueError as error:
        raise ProxyConfigError(one_line(error), field=name) from error
    if not current_platform.is_cpu():
        return
    if "mxfp4" in config.quantization and not torch.cpu._is_amx_tile_supported():
        raise ProxyConfigError(
            f"its experts are quantized to {config.quantization}, for which vLLM has no kernel on "
            "a CPU without AMX",
            field=name,
            remedy="use an unquantized checkpoint, or another machine",
        )
    if hasattr(torch.ops._C, "cpu_gemm_wna16"):
        return
    # vLLM would start, and fail at the first request.
    int4 = scalar_types.uint4, scalar_types.uint4b8
    if getattr(quantization, "quant_type", None) in int4 or any(
        scheme["weights"].num_bits == 4 and scheme.get("input_activations") is None
        for scheme in _schemes(quantization)
    ):
        raise ProxyConfigError(
            f"it is quantized to int4 ({config.quantization}), for which vLLM has no kernel on a "
            "CPU without AVX512",
            field=name,
            remedy="use the unquantized checkpoint, or another machine",
        )
