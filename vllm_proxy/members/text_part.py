"""The text model of a multimodal checkpoint: its config, and the names of its tensors.

A multimodal model answers text with its language model alone. So a member is built as that model,
by vLLM's class for it, and the towers for images, video and audio are neither built nor loaded.
Positions in three rows (M-RoPE) are alike for text, and plain RoPE is then the same (Qwen2-VL, Wang
et al. 2024, section 2.1): the model is built with it, and all members read the same positions.

A member that sees images (`images.py`) keeps M-RoPE, and its tower is built next to its text model.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from vllm.config import ModelConfig
    from vllm.model_executor.models.utils import WeightsMapper

T = TypeVar("T")

TEXT_CLASSES: Mapping[str, str | None] = {
    "gemma3": "Gemma3ForCausalLM",
    "gemma4": "Gemma4ForCausalLM",
    "llama4": "Llama4ForCausalLM",
    "mistral3": None,
    "qwen2_vl": "Qwen2ForCausalLM",
    "qwen2_5_vl": "Qwen2ForCausalLM",
    "qwen3_vl": "Qwen3ForCausalLM",
    "qwen3_vl_moe": "Qwen3MoeForCausalLM",
    "qwen3_5": "Qwen3_5ForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForCausalLM",
}
"""`model_type` of a multimodal config -> vLLM's class for its text model; None where the text
model's own `model_type` decides."""

COMPOSITE = ("vision_config", "audio_config", "text_config", "thinker_config")
"""Keys of config.json that only multimodal models have."""

_OF_THE_WHOLE = (
    *("dtype", "eos_token_id", "quantization_config", "tie_word_embeddings"),
    *("proxy", "proxy_member"),
)
"""What a config may say at its top about the text model, where transformers (5) and vLLM read it
first; and what we add to a config."""

_SCALES: Mapping[str | None, Mapping[str, str]] = {
    "mistral3": {".activation_scale": ".input_scale", ".weight_scale_inv": ".weight_scale"}
}
"""Other names of FP8 scales, which vLLM's multimodal classes map to those of its layers."""

_NAMES = (
    *("visual.", "vision_tower.", "vision_model.", "audio_tower."),
    *("multi_modal_projector.", "embed_vision.", "embed_audio."),
)
_TOWERS = (*_NAMES, *(f"model.{name}" for name in _NAMES))
"""What the names of towers' tensors begin with."""

_MROPE = ("mrope_section", "mrope_interleaved")


def is_text_part(config: "PreTrainedConfig") -> bool:
    """Whether `text_config` took this config from a multimodal one."""
    return getattr(config, "text_of", None) is not None


def see_alike(family: str, other: str) -> bool:
    """Whether models of both families read the same images: one may be the other's mixture."""
    return family.removesuffix("_moe") == other.removesuffix("_moe")


def image_levels(config: "PreTrainedConfig") -> int | None:
    """Return how many of the first layers get rows of an image; None if the member sees none."""
    return getattr(config, "image_levels", None)


def text_config(config: "PreTrainedConfig", sees: str | None = None) -> "PreTrainedConfig":
    """Return the config of a multimodal model's text model; other configs as they are.

    Checkpoints of a text model alone (Qwen3.5) may still ask for M-RoPE.

    Args:
        config: of the whole model.
        sees: the family that sees images in this engine, or None.

    Raises:
        ValueError: the model is of another family than the one that sees images.
    """
    if config.get_text_config() is config:
        return _with_plain_rope(config)
    if config.model_type not in TEXT_CLASSES:
        return config
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text = copy.deepcopy(config.get_text_config())
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    architecture = TEXT_CLASSES[config.model_type] or known.get(text.model_type)
    if sees is not None and not see_alike(sees, config.model_type):
        raise ValueError(
            f"its model_type is {config.model_type!r}, and the base that sees images is {sees!r}: "
            "use a model of the same family, or of text only"
        )
    if sees is None:
        text = _with_plain_rope(text)
    if text.model_type not in known:  # it differs from a plain text model by M-RoPE only
        values = {key: value for key, value in text.to_dict().items() if key != "model_type"}
        text = getattr(transformers, str(architecture)).config_class(**values)
    whole = {key: getattr(config, key, None) for key in _OF_THE_WHOLE}
    text.update({key: value for key, value in whole.items() if value is not None})
    text.architectures = [architecture]
    text.text_of = config.model_type
    if sees is not None:
        text.image_levels = len(getattr(config.vision_config, "deepstack_visual_indexes", ()))
    return text


def _with_plain_rope(config: "PreTrainedConfig") -> "PreTrainedConfig":
    """Return a config without M-RoPE; the same one, if it has none."""
    if not any(key in rope for rope in _rope_parameters(config) for key in _MROPE):
        return config
    config = copy.deepcopy(config)
    for rope in _rope_parameters(config):
        for key in _MROPE:
            rope.pop(key, None)
        for key in ("rope_type", "type"):
            if rope.get(key) == "mrope":
                rope[key] = "default"
    return config


def _rope_parameters(config: "PreTrainedConfig") -> Iterator[dict[str, Any]]:
    """Yield the config's RoPE parameters, also if each kind of layer has some."""
    rope = getattr(config, "rope_parameters", None) or {}
    yield rope
    yield from (value for value in rope.values() if isinstance(value, dict))


@dataclass(frozen=True)
class TextOverrides:
    """vLLM's `hf_overrides` that change a config, and then take its text model's.

    An object, not a function: vLLM sends it to other processes, with a draft model's config.
    """

    overrides: Mapping[str, Any]
    sees: str | None = None

    def __call__(self, config: "PreTrainedConfig") -> "PreTrainedConfig":
        """Return the text model's config."""
        from transformers import PreTrainedConfig

        for key, value in self.overrides.items():
            part = getattr(config, key, None)
            if isinstance(value, dict) and isinstance(part, PreTrainedConfig):
                part.update(value)
            else:
                config.update({key: value})
        return text_config(config, self.sees)


def with_text_part(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return engine arguments that make vLLM read the text model of a multimodal `model`."""
    given = arguments.get("hf_overrides") or {}
    if not isinstance(given, Mapping):  # vLLM rejects it
        return dict(arguments)
    return {**arguments, "hf_overrides": TextOverrides(given)}


def base_overrides(engine: "ModelConfig") -> dict[str, Any]:
    """Return what the engine's `hf_overrides` change in the base's config."""
    given = engine.hf_overrides
    given = given.overrides if isinstance(given, TextOverrides) else given
    given = given if isinstance(given, dict) else {}
    return {k: v for k, v in given.items() if k not in ("architectures", "proxy")}


def take_text_part(model_config: "ModelConfig") -> None:
    """Let an engine whose base is multimodal see the base's text model only.

    As vLLM's `VllmConfig.with_hf_config` does for the language model of a multimodal one. The
    engine's `architectures` and `proxy` section stay. vLLM applies the overrides, if they can be
    called, to a draft model's config too, which is the base's.
    """
    whole = model_config.hf_config
    if (text := text_config(whole)) is whole:
        return
    text.architectures = whole.architectures
    model_config.hf_overrides = TextOverrides(base_overrides(model_config))
    model_config.hf_config = model_config.hf_text_config = text
    model_config.model_arch_config = model_config.get_model_arch_config()


@cache
def text_names(family: str | None = None) -> "WeightsMapper":
    """Return the mapping of tensors' names in multimodal checkpoints to the text model's own.

    Checkpoints have them in several ways; the text model's own do not change. Tensors of towers and
    of layers for drafts (multi-token prediction) are left out. *family*: a key of `TEXT_CLASSES`;
    needed for the scales of quantized layers.
    """
    from vllm.model_executor.models.utils import WeightsMapper

    return WeightsMapper(
        orig_to_new_prefix={
            **dict.fromkeys((*_TOWERS, "mtp."), None),
            "model.language_model.": "model.",
            "language_model.model.": "model.",
            "language_model.lm_head.": "lm_head.",
        },
        orig_to_new_suffix=_SCALES.get(family, {}),
    )


def text_weights(
    config: "PreTrainedConfig", weights: Iterable[tuple[str, T]]
) -> Iterable[tuple[str, T]]:
    """Return a checkpoint's tensors, or what is known of them, under the text model's own names.

    Those of models that are not multimodal are returned as they are.
    """
    return text_names(config.text_of).apply(weights) if is_text_part(config) else weights


def is_towers(name: str) -> bool:
    """Whether a tensor of a multimodal checkpoint belongs to a tower."""
    return name.startswith(_TOWERS)


def layer_prefix(config: "PreTrainedConfig") -> str:
    """Return what the names of a member's layers begin with, as in vLLM's multimodal class."""
    return "language_model" if is_text_part(config) else ""


@cache
def layer_names() -> "WeightsMapper":
    """Return the mapping of names in a multimodal checkpoint's quantization to those of layers."""
    from vllm.model_executor.models.utils import WeightsMapper

    return WeightsMapper(
        orig_to_new_prefix={
            "model.language_model.": "language_model.model.",
            "model.": "language_model.model.",
            "lm_head": "language_model.lm_head",
        }
    )
