"""Members that see images: of which families they can be, and what vLLM builds for them.

Each has a tower of its own, which turns an image into rows that stand where the prompt has
placeholders. A member's rows are as wide as its hidden states; where it has them, the rows for its
first layers (DeepStack, Meng et al. 2024, arXiv 2406.04334) follow in the same row.
"""

import copy
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_proxy.config.errors import ProxyConfigError, one_line
from vllm_proxy.config.roles import Role
from vllm_proxy.members.text_part import base_overrides, image_levels

if TYPE_CHECKING:
    from vllm.config import ModelConfig

FAMILIES: Mapping[str, str] = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
}
"""`model_type` of a config -> vLLM's class for the whole model."""

TEXT_MODELS: Mapping[str, str] = {
    "qwen3_vl": "vllm.model_executor.models.qwen3_vl:Qwen3LLMForCausalLM",
    "qwen3_vl_moe": "vllm.model_executor.models.qwen3_vl_moe:Qwen3MoeLLMForCausalLM",
}
"""vLLM's class for the text model where one that takes the rows of DeepStack has no name in its
registry. That of Qwen3-VL-MoE also reads the experts as its checkpoints have them: transposed."""


_PREFIX = "ProxyTuned"


def class_of(family: str) -> str:
    """Return the name of our class for a base of this family, in vLLM's registry."""
    return _PREFIX + FAMILIES[family]


def vllm_class_of(name: str) -> str | None:
    """Return vLLM's class of the family whose class of ours has this name; None for other names."""
    known = name.removeprefix(_PREFIX)
    return known if name != known and known in FAMILIES.values() else None


def family_of(engine: "ModelConfig") -> str | None:
    """Return the `model_type` of an engine's base if it sees images; else None."""
    return None if engine.multimodal_config is None else engine.hf_config.model_type


def require_family(engine: "ModelConfig") -> str:
    """Return the family of an engine that is to see images.

    Raises:
        ProxyConfigError: the base cannot.
    """
    family = engine.hf_config.model_type
    if family not in FAMILIES:
        raise ProxyConfigError(
            f"the base's model_type is {family!r}, and images are possible with "
            f"{', '.join(FAMILIES)}",
            field="limit_mm_per_prompt",
            remedy="remove it",
        )
    return family


def text_model(member: "ModelConfig") -> str | None:
    """Return the class to build a member's text model with; None where vLLM's registry has it."""
    family = getattr(member.hf_config, "text_of", "")
    return TEXT_MODELS.get(family) if sees(member) or family == "qwen3_vl_moe" else None


def sees(member: "ModelConfig") -> bool:
    """Whether a member sees images; others read the placeholders as ids."""
    return image_levels(member.hf_config) is not None


def embedding_width(member: "ModelConfig") -> int:
    """Return how many numbers stand for a token before a member's first layer."""
    levels = image_levels(member.hf_config) or 0
    return member.get_hidden_size() * (1 + levels)


def whole_model_config(engine: "ModelConfig", role: Role, member: "ModelConfig") -> "ModelConfig":
    """Return the `ModelConfig` from which vLLM builds a member's tower, without its text model.

    Args:
        engine: the engine's.
        role: the member.
        member: of its text model.

    Raises:
        ProxyConfigError: vLLM cannot run the whole model.
    """
    settings: dict[str, Any] = {
        field.name: getattr(member, field.name)
        for field in dataclasses.fields(member)
        if field.init
    }
    settings["hf_overrides"] = base_overrides(engine) if role == "base" else {}
    try:
        whole = type(member)(**settings)
    except (ValueError, OSError) as error:
        raise ProxyConfigError(one_line(error), field=f"{role} {member.model!r}") from error
    whole.multimodal_config = copy.copy(engine.multimodal_config)
    whole.multimodal_config.mm_encoder_only = True  # vLLM's switch for this
    whole.is_submodel_config = True
    return whole
