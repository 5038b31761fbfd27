"""What decides which pixels and tokens an image has, by family.

vLLM prepares an image once, by the base's processor, and writes its tokens into the prompt. So
these are the fields that members must agree on.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_COMMON = (
    *("size", "do_resize", "resample", "do_convert_rgb", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std"),
)
"""Fields of every image processor on which pixels depend."""


@dataclass(frozen=True)
class ImageFields:
    """Where a family's files say how it cuts images.

    Attributes:
        config: fields of config.json, with dots where they are nested.
        pixels: fields of the image processor.
        tokens: fields of the processor of text and images (`processor_config.json`), with the
            values that transformers (5) takes where the file has none.
        misfit: why vLLM cannot give images to this tower, from the config, `pixels` and `tokens`;
            None if it can.
        size: what the image processor's `size` must have.
        range: the fewest and most tokens of an image, from the config and the image processor's
            fields.
        around: other tokens of an image in the usual prompt.
        smaller: a value of `mm_processor_kwargs` that makes images smaller.
    """

    config: tuple[str, ...]
    pixels: tuple[str, ...]
    size: tuple[str, ...]
    range: Callable[["PreTrainedConfig", Mapping[str, Any]], tuple[int, int]]
    smaller: str
    around: int = 0
    tokens: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    misfit: Callable[["PreTrainedConfig", Mapping[str, Any], Mapping[str, Any]], str | None] = (
        lambda config, pixels, tokens: None
    )


def _qwen_range(config: "PreTrainedConfig", pixels: Mapping[str, Any]) -> tuple[int, int]:
    side = pixels["patch_size"] * pixels["merge_size"]
    size = pixels["size"]
    return -(-size["shortest_edge"] // side**2), size["longest_edge"] // side**2


def _pixtral_range(config: "PreTrainedConfig", pixels: Mapping[str, Any]) -> tuple[int, int]:
    """Each row of patches has a token more: for a break, or for the end of the image."""
    side = config.vision_config.patch_size * config.spatial_merge_size
    rows = -(-pixels["size"]["longest_edge"] // side)
    return 2, rows * (rows + 1)


def _tiles_range(config: "PreTrainedConfig", pixels: Mapping[str, Any]) -> tuple[int, int]:
    """The whole image is a tile; if it is cut, each piece is one, with a separator after it."""
    vision, pieces = config.vision_config, pixels["max_patches"]
    patches = (vision.image_size // vision.patch_size) ** 2
    tile = patches // round(1 / vision.pixel_shuffle_ratio**2)
    whole = tile + 3  # its start, its end, and the token before the whole
    return whole, whole + (pieces * (tile + 1) if pieces > 1 else 0)


def _pixtral_misfit(
    config: "PreTrainedConfig", pixels: Mapping[str, Any], tokens: Mapping[str, Any]
) -> str | None:
    """vLLM counts tokens by the config; the tower has as many positions as its largest image."""
    patch, merge = config.vision_config.patch_size, config.spatial_merge_size
    for name, own in {"patch_size": patch, "spatial_merge_size": merge}.items():
        if tokens[name] != own:
            return (
                f"`{name}` in processor_config.json is {tokens[name]}, and {own} in config.json; "
                "use the files that were published together"
            )
    edge, largest = pixels["size"]["longest_edge"], config.vision_config.image_size
    if edge > largest:
        return (
            f"images may have a `longest_edge` of {edge}, and its tower sees at most {largest} "
            "(`vision_config.image_size`); make `size` smaller"
        )
    return None


def _tiles_misfit(
    config: "PreTrainedConfig", pixels: Mapping[str, Any], tokens: Mapping[str, Any]
) -> str | None:
    """vLLM counts tokens by the config."""
    side, size = config.vision_config.image_size, pixels["size"]
    if (size["height"], size["width"]) == (side, side):
        return None
    return (
        f"`size` of its image processor is {dict(size)}, and `vision_config.image_size` in "
        f"config.json is {side}; use the files that were published together"
    )


QWEN = ImageFields(
    config=(
        *("image_token_id", "vision_start_token_id", "vision_end_token_id"),
        "vision_config.patch_size",
        "vision_config.spatial_merge_size",
        "vision_config.temporal_patch_size",
    ),
    pixels=("patch_size", "merge_size", "temporal_patch_size", *_COMMON),
    size=("shortest_edge", "longest_edge"),
    range=_qwen_range,
    around=2,  # its start and end
    smaller="max_pixels: …",
)
MISTRAL = ImageFields(
    config=("image_token_index", "spatial_merge_size", "vision_config.patch_size"),
    pixels=_COMMON,
    tokens={
        **{"patch_size": 16, "spatial_merge_size": 1, "image_token": "[IMG]"},
        **{"image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
    },
    misfit=_pixtral_misfit,
    size=("longest_edge",),
    range=_pixtral_range,
    smaller="size: {longest_edge: …}",
)
LLAMA = ImageFields(
    config=(
        *("image_token_index", "boi_token_index", "eoi_token_index"),
        *("vision_config.image_size", "vision_config.patch_size"),
        "vision_config.pixel_shuffle_ratio",
    ),
    pixels=("max_patches", "resize_to_max_canvas", *_COMMON),
    tokens={"image_token": "<|image|>", "patch_token": "<|patch|>"},
    misfit=_tiles_misfit,
    size=("height", "width"),
    range=_tiles_range,
    smaller="max_patches: …",
)
_OTHERS = {"mistral3": MISTRAL, "llama4": LLAMA}


def fields_of(family: str) -> ImageFields:
    """Return the fields of a family; *family*: a key of `images.FAMILIES`."""
    return _OTHERS.get(family, QWEN)
