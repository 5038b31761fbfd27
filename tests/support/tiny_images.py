"""Tiny checkpoints that see images: those of `tiny_multimodal`, with an image processor."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.llama4 import Llama4ImageProcessor, Llama4Processor
from transformers.models.pixtral import PixtralImageProcessor, PixtralProcessor
from transformers.models.qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl import (
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen3_vl import Qwen3VLProcessor, Qwen3VLVideoProcessor

from support.tiny_models import SHAPES, VOCAB_SIZE, write_model, write_tokenizer
from support.tiny_multimodal import ROPE, write_multimodal

VISION_TOKENS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
"""Name in config.json -> special token of Qwen's; their ids begin with 3."""
OTHER_TOKENS: Mapping[str, Mapping[str, str]] = {
    "mistral3": {"image_token_index": "[IMG]"},
    "llama4": {
        "image_token_index": "<|patch|>",
        "boi_token_index": "<|image_start|>",
        "eoi_token_index": "<|image_end|>",
    },
}
"""The same of other families."""
UNNAMED_TOKENS: Mapping[str, Sequence[str]] = {
    "mistral3": ("[IMG_BREAK]", "[IMG_END]"),
    "llama4": ("<|image|>", "<|tile_x_separator|>", "<|tile_y_separator|>"),
}
"""Special tokens of images that config.json does not name."""
WORDS = [*range(9, VOCAB_SIZE)]
"""Ids that a test may have generated: transformers takes a placeholder for one of an image."""
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
"""An image in a prompt of Qwen's."""
OTHER_IMAGES: Mapping[str, str] = {"mistral3": "[IMG]", "llama4": "<|image|>"}
"""The same of other families."""


def with_images(text: str, family: str) -> str:
    """Return a prompt of Qwen's as one of another family."""
    return text.replace(IMAGE, OTHER_IMAGES.get(family, IMAGE))


CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] "
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type in ('image', 'image_url') %}" + IMAGE + "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
PATCHES = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
"""A token is 8 x 8 pixels."""
PIXELS = {"shortest_edge": 4 * 64, "longest_edge": 16 * 64}
"""An image has 4 to 16 tokens."""

TOWERS: Mapping[str, Mapping[str, object]] = {
    "qwen2_vl": {"depth": 2},
    # windows of 2 x 2 tokens in the first layer
    "qwen2_5_vl": {"depth": 2, "window_size": 16, "fullatt_block_indexes": [1]},
    "qwen3_vl": {"depth": 3, "deepstack_visual_indexes": [0, 1]},
    "qwen3_vl_moe": {"depth": 3, "deepstack_visual_indexes": [0, 1]},
    "qwen3_5": {"depth": 2},
    "qwen3_5_moe": {"depth": 2},
    "mistral3": {"num_hidden_layers": 2, "image_size": 32},
    # a tile is 16 x 16 pixels and has 4 tokens
    "llama4": {"num_hidden_layers": 2, "image_size": 16, "intermediate_size": 128},
}
_PROCESSORS = {
    "qwen2_vl": (Qwen2VLProcessor, Qwen2VLVideoProcessor),
    "qwen2_5_vl": (Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
    **dict.fromkeys(
        ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
        (Qwen3VLProcessor, Qwen3VLVideoProcessor),
    ),
}
_PAIRS: Mapping[str, Mapping[str, object]] = {
    "qwen3_5_text": {
        **{"layer_types": None, "full_attention_interval": 2},
        # as checkpoints saved from Qwen3.5's text model have it
        "rope_parameters": {**ROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True},
    },
}
"""Settings of a pair of text only."""


def _qwen_processor(family: str, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    whole, videos = _PROCESSORS[family]
    return whole(
        image_processor=Qwen2VLImageProcessor(size=PIXELS, **PATCHES),
        tokenizer=tokenizer,
        video_processor=videos(size=PIXELS, **PATCHES),
        chat_template=CHAT_TEMPLATE,
    )


def _pixtral_processor(family: str, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    """A token is 8 x 8 pixels, and each row of them has one more: 2 to 20 tokens."""
    return PixtralProcessor(
        image_processor=PixtralImageProcessor(size={"longest_edge": 32}, patch_size=4),
        tokenizer=tokenizer,
        patch_size=4,
        spatial_merge_size=2,
        chat_template=with_images(CHAT_TEMPLATE, family),
    )


def _tile_processor(family: str, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    """At most 3 tiles of 4 tokens, and one of the whole: 7 to 22 tokens."""
    return Llama4Processor(
        image_processor=Llama4ImageProcessor(size={"height": 16, "width": 16}, max_patches=3),
        tokenizer=tokenizer,
        patch_size=4,
        chat_template=with_images(CHAT_TEMPLATE, family),
    )


_OTHER_PROCESSORS: Mapping[str, Callable[[str, PreTrainedTokenizerFast], ProcessorMixin]] = {
    "mistral3": _pixtral_processor,
    "llama4": _tile_processor,
}


def special_tokens(family: str) -> list[str]:
    """Return the tokens of images; their ids begin with 3."""
    return [*OTHER_TOKENS.get(family, VISION_TOKENS).values(), *UNNAMED_TOKENS.get(family, ())]


def write_seeing(path: Path, family: str, **shape: object) -> Path:
    """Write a float32 checkpoint of a family of `TOWERS`, with tokenizer and image processor."""
    ids = {name: 3 + i for i, name in enumerate(OTHER_TOKENS.get(family, VISION_TOKENS))}
    tower = {"patch_size": PATCHES["patch_size"], "initializer_range": 0.3, **TOWERS[family]}
    write_multimodal(path, family, tower=tower, **ids, **shape)
    tokenizer = write_tokenizer(path, more=special_tokens(family))
    _OTHER_PROCESSORS.get(family, _qwen_processor)(family, tokenizer).save_pretrained(path)
    return path


def write_seeing_triple(root: Path, family: str, pair: str | None = None) -> dict[str, str]:
    """Write members in the sizes of `write_triple`.

    *pair*: the family of expert and antiexpert, if it is another one: of `TOWERS`, or of text only.
    """
    paths = {"base": str(write_seeing(root / "base", family, **SHAPES["base"]))}
    tokenizer = AutoTokenizer.from_pretrained(paths["base"])  # Qwen3.5's has a class of its own
    for role in ("expert", "antiexpert"):
        path, shape = root / role, SHAPES[role]
        if pair in (None, *TOWERS):
            write_seeing(path, pair or family, **shape)
        else:
            write_model(path, pair, **shape, **_PAIRS.get(pair, {}))
            tokenizer.save_pretrained(path)
        paths[role] = str(path)
    return paths


def prompt_ids(path: str, text: str) -> list[int]:
    """Return a prompt's ids, with one placeholder per image, as for vLLM."""
    return AutoProcessor.from_pretrained(path).tokenizer(text)["input_ids"]
