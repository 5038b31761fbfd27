"""Tiny checkpoints that see images: those of `tiny_multimodal`, with an image processor."""

from collections.abc import Mapping
from pathlib import Path

from transformers import AutoProcessor, AutoTokenizer
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
"""Name in config.json -> special token; their ids begin with 3."""
WORDS = [*range(3 + len(VISION_TOKENS), VOCAB_SIZE)]
"""Ids that a test may have generated: transformers takes a placeholder for one of an image."""
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
"""An image in a prompt."""
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


def write_seeing(path: Path, family: str, **shape: object) -> Path:
    """Write a float32 checkpoint of a family of `TOWERS`, with tokenizer and image processor."""
    ids = {name: 3 + i for i, name in enumerate(VISION_TOKENS)}
    tower = {"patch_size": PATCHES["patch_size"], "initializer_range": 0.3, **TOWERS[family]}
    write_multimodal(path, family, tower=tower, **ids, **shape)
    tokenizer = write_tokenizer(path, more=list(VISION_TOKENS.values()))
    whole, videos = _PROCESSORS[family]
    whole(
        image_processor=Qwen2VLImageProcessor(size=PIXELS, **PATCHES),
        tokenizer=tokenizer,
        video_processor=videos(size=PIXELS, **PATCHES),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(path)
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
