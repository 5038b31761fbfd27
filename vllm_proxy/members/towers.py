"""What members make of an image: the base's processor prepares it once, for all their towers.

So members that see must cut an image into the same patches, and have been trained on pixels that
were prepared in the same way.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from vllm_proxy.config.errors import ProxyConfigError, one_line
from vllm_proxy.config.media import images_problem
from vllm_proxy.config.roles import Role
from vllm_proxy.members.attempt import attempt
from vllm_proxy.members.images import FAMILIES
from vllm_proxy.members.location import Unreadable
from vllm_proxy.members.text_part import is_towers, see_alike

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from vllm.config import ModelConfig

_IDS = ("image_token_id", "vision_start_token_id", "vision_end_token_id")
"""Fields of config.json: the tokens that stand for an image in a prompt."""
_PATCHES = ("patch_size", "spatial_merge_size", "temporal_patch_size")
"""Fields of a config's `vision_config` on which the number of an image's tokens depends."""
_PIXELS = (
    *("patch_size", "merge_size", "temporal_patch_size", "size", "do_resize", "resample"),
    *("do_convert_rgb", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
)
"""Fields of an image processor on which an image's tokens or pixels depend."""


@dataclass(frozen=True)
class Tower:
    """What decides how a member sees.

    Attributes:
        config: of the whole model.
        processor: the values of `_PIXELS`.
    """

    config: "PreTrainedConfig"
    processor: Mapping[str, Any]

    @property
    def family(self) -> str:
        """The `model_type`."""
        return self.config.model_type

    @property
    def image_tokens(self) -> tuple[int, int]:
        """The fewest and the most tokens of an image."""
        side = self.processor["patch_size"] * self.processor["merge_size"]
        size = self.processor["size"]
        return -(-size["shortest_edge"] // side**2), size["longest_edge"] // side**2

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of its weights: all but those of the text model."""
        import torch
        from transformers import AutoModelForImageTextToText

        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        text.num_hidden_layers = 1  # enough of it
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:1]
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        parameters = model.named_parameters()
        return {name: tuple(p.shape) for name, p in parameters if is_towers(name)}

    @property
    def parameters(self) -> int:
        """Number of its weights."""
        return sum(map(prod, self.shapes.values()))


def read_tower(
    model: str,
    revision: str | None = None,
    *,
    trust_remote_code: bool = False,
    changes: Mapping[str, Any] | None = None,
) -> Tower | None:
    """Return how a model sees; None if it is a model of text only.

    Args:
        model: a directory or a hub id.
        revision: on the hub.
        trust_remote_code: the engine's.
        changes: the engine's `mm_processor_kwargs`, which apply to every image.

    Raises:
        Unreadable: its config or image processor cannot be read, or is of a family that cannot see.
    """
    from transformers import AutoConfig, AutoImageProcessor

    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = attempt(AutoConfig.from_pretrained, model, **options)
    if isinstance(config, Exception):
        raise Unreadable(f"{one_line(config)}; check its config.json")
    if getattr(config, "vision_config", None) is None:
        return None
    if config.model_type not in FAMILIES:
        raise Unreadable(family_problem(config.model_type))
    nested = (changes or {}).get("images_kwargs") or {}
    changes = {key: value for key, value in {**(changes or {}), **nested}.items() if key in _SET}
    processor = attempt(AutoImageProcessor.from_pretrained, model, **options, **changes)
    if isinstance(processor, Exception):
        raise Unreadable(
            "no image processor can be read from its files; add preprocessor_config.json from "
            "where the model was published"
        )
    values = processor.to_dict()
    return Tower(config, {name: _plain(values.get(name)) for name in _PIXELS})


_SET = ("min_pixels", "max_pixels", *_PIXELS)


def _plain(value: Any) -> Any:
    """Return a value as JSON has it, so that equal ones compare equal."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items() if inner is not None}
    return list(value) if isinstance(value, tuple) else value


def family_problem(family: str) -> str:
    """Return that a model of this family cannot see, and which can."""
    return f"its model_type is {family!r}, and images are possible with {', '.join(FAMILIES)}"


def difference(tower: Tower, base: Tower) -> str | None:
    """Return why a member cannot read the images that the base's processor makes; None if it can.

    The first field that differs is named, with both values.
    """
    if not see_alike(tower.family, base.family):
        return (
            f"its model_type is {tower.family!r}, and the base's is {base.family!r}; to see "
            "images, use a model of the same family, or one of text only"
        )
    for name, ours, theirs, file in _compared(tower, base):
        if ours != theirs:
            return (
                f"`{name}` in {file} is {ours}, and the base's is {theirs}: all members see the "
                "image that the base's processor makes; use members that were trained alike"
            )
    return None


def _compared(tower: Tower, base: Tower) -> Iterator[tuple[str, Any, Any, str]]:
    """Yield the name of a field, the member's value, the base's and where it is written."""
    for name in _IDS:
        mine, bases = (getattr(one.config, name, None) for one in (tower, base))
        yield name, mine, bases, "config.json"
    for name in _PATCHES:
        mine, bases = (getattr(one.config.vision_config, name, None) for one in (tower, base))
        yield f"vision_config.{name}", mine, bases, "config.json"
    for name in _PIXELS:
        mine, bases = tower.processor[name], base.processor[name]
        yield name, mine, bases, "its image processor (preprocessor_config.json)"


def require_one_image(engine: "ModelConfig", members: Mapping[Role, "ModelConfig"]) -> None:
    """Reject members that need other images than the base's processor makes.

    Args:
        engine: the engine's; it sees images.
        members: by role.

    Raises:
        ProxyConfigError: names the member, the field and both values; or an argument of the engine
            with which no image could be read.
    """
    multimodal = engine.get_multimodal_config()
    arguments = {
        "language_model_only": multimodal.language_model_only,
        "allowed_local_media_path": engine.allowed_local_media_path,
    }
    if wrong := images_problem(arguments):
        raise wrong
    towers: dict[Role, Tower] = {}
    for role, member in members.items():
        field = f"{role} {member.model!r}"
        try:
            tower = read_tower(
                member.model,
                member.revision,
                trust_remote_code=engine.trust_remote_code,
                changes=multimodal.mm_processor_kwargs,
            )
        except Unreadable as error:
            raise ProxyConfigError(str(error), field=field) from None
        if tower is None:
            continue
        towers[role] = tower
        if problem := difference(tower, towers["base"]):
            raise ProxyConfigError(problem, field=field)
