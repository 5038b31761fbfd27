"""Engines whose members see images: what their configuration needs, and what they cannot do."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.roles import Role
from vllm_proxy.members.images import class_of, embedding_width, require_family, sees
from vllm_proxy.members.vllm_configs import proxy_section

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


def see_images(model_config: "ModelConfig") -> None:
    """Let an engine's model be our class for the base's family, and take images only.

    Args:
        model_config: the engine's, changed in place.

    Raises:
        ProxyConfigError: the base cannot see.
    """
    from vllm.config.multimodal import AudioDummyOptions, VideoDummyOptions

    name = class_of(require_family(model_config))
    model_config.hf_config.architectures = [name]
    model_config._architecture = name
    limits = model_config.get_multimodal_config().limit_per_prompt
    limits |= {"video": VideoDummyOptions(count=0), "audio": AudioDummyOptions(count=0)}


def images_problem(
    config: "VllmConfig", members: Mapping[Role, "ModelConfig"]
) -> ProxyConfigError | None:
    """Set the width of embeddings in an engine that sees images; return what it cannot do.

    A token has the embeddings of all members that see, side by side.
    """
    model = config.model_config
    if model.multimodal_config is None:
        return None
    # vLLM reads this as the width of what comes before the first layer.
    model.hf_text_config.projection_dim = sum(
        embedding_width(member) for member in members.values() if sees(member)
    )
    for field, (value, problem) in _unsupported(config, members).items():
        if value:
            return ProxyConfigError(
                f"not possible with images: {problem}",
                field=field,
                value=value,
                remedy="remove it, or `limit_mm_per_prompt`",
            )
    return None


def _unsupported(
    config: "VllmConfig", members: Mapping[Role, "ModelConfig"]
) -> dict[str, tuple[Any, str]]:
    """Return by argument its value, if it asks for something, and why that is not possible."""
    model, parallel = config.model_config, config.parallel_config
    images, section = model.get_multimodal_config(), proxy_section(model)
    stages, speculate = parallel.pipeline_parallel_size, section.speculate
    pairs = "antiexpert" in members and sees(members["antiexpert"])
    pair = section.one_pass and pairs
    lora = None
    if pairs and section.expert is not None and members["antiexpert"].quantization is not None:
        lora = section.expert.lora
    return {
        "expert.lora": (lora, "it would be merged into the antiexpert, which is quantized"),
        "experts": ([*section.experts] or None, "adapters are merged where small members see"),
        "speculate": (speculate and speculate.tokens, "the expert drafts from text only"),
        "speculative_config.method": (
            config.speculative_config and config.speculative_config.method,
            "drafts are of text only",
        ),
        "one_pass": (pair, "small members that see run one by one"),
        "pipeline_parallel_size": (
            stages if stages > 1 else None,
            "only the first stage would have the images",
        ),
        "kv_transfer_config": (
            config.kv_transfer_config and config.kv_transfer_config.kv_connector,
            "no connector has moved several members' caches of images",
        ),
        "kv_offloading_size": (
            config.cache_config.kv_offloading_size,
            "no connector has moved several members' caches of images",
        ),
        "ec_transfer_config": (
            config.ec_transfer_config and config.ec_transfer_config.ec_connector,
            "no connector has moved the embeddings of several members",
        ),
        "weight_transfer_config": (
            config.weight_transfer_config and config.weight_transfer_config.backend,
            "towers' weights cannot be replaced",
        ),
        "enable_mm_embeds": (
            images.enable_mm_embeds,
            "each member needs embeddings of its own tower",
        ),
        "video_pruning_rate": (images.video_pruning_rate, "there is no video"),
        "mm_encoder_only": (images.mm_encoder_only, "members generate text"),
        "compile_mm_encoder": (
            config.compilation_config.compile_mm_encoder,
            "compiled towers of several members would have one name",
        ),
        "is_mm_prefix_lm": (
            model.is_mm_prefix_lm,
            "the tokens of an image see each other, which is not supported",
        ),
    }
