"""What members make of an image: the base's processor prepares it once, for all their towers.

So members that see must cut an image into the same patches, and have been trained on pixels that
were prepared in the same way.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_proxy.config.errors import ProxyConfigError, one_line
from vllm_proxy.config.media import images_problem
from vllm_proxy.config.roles import Role
from vllm_proxy.members.attempt import attempt
from vllm_proxy.members.image_fields import ImageFields, fields_of
from vllm_proxy.members.images import FAMILIES, family_problem
from vllm_proxy.members.location import Unreadable
from vllm_proxy.members.text_part import is_towers, see_alike

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from vllm.config import ModelConfig


@dataclass(frozen=True)
class Tower:
    """What decides how a member sees.

    Attributes:
        config: of the whole model.
        processor: the values of `ImageFields.pixels`.
        tokens: the values of `ImageFields.tokens`.
    """

    config: "PreTrainedConfig"
    processor: Mapping[str, Any]
    tokens: Mapping[str, Any]

    @property
    def family(self) -> str:
        """The `model_type`."""
        return self.config.model_type

    @property
    def fields(self) -> ImageFields:
        """What members of its family must agree on."""
        return fields_of(self.family)

    @property
    def image_tokens(self) -> tuple[int, int]:
        """The fewest and the most tokens of an image."""
        return self.fields.range(self.config, self.processor)

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
    fields = fields_of(config.model_type)
    nested = (changes or {}).get("images_kwargs") or {}
    known = ("min_pixels", "max_pixels", *fields.pixels)
    changes = {key: value for key, value in {**(changes or {}), **nested}.items() if key in known}
    processor = attempt(AutoImageProcessor.from_pretrained, model, **options, **changes)
    if isinstance(processor, Exception):
        raise Unreadable(
            "no image processor can be read from its files; add preprocessor_config.json from "
            "where the model was published"
        )
    written = processor.to_dict()
    values = {name: _plain(written.get(name)) for name in fields.pixels}
    if not all(key in (values["size"] or {}) for key in fields.size):
        needed = " and ".join(fields.size)
        raise Unreadable(f"`size` of its image processor is {values['size']}; give it {needed}")
    tower = Tower(config, values, _tokens(model, revision, fields))
    if problem := fields.misfit(config, tower.processor, tower.tokens):
        raise Unreadable(problem)
    return tower


def _tokens(model: str, revision: str | None, fields: ImageFields) -> Mapping[str, Any]:
    """Return the values of `ImageFields.tokens`: those of transformers, if there is no file."""
    from transformers.utils.hub import cached_file

    def read() -> Any:
        path = cached_file(model, "processor_config.json", revision=revision)
        return json.loads(Path(str(path)).read_text(encoding="utf-8"))

    found = attempt(read) if fields.tokens else {}
    values = found if isinstance(found, dict) else {}
    return {name: values.get(name, default) for name, default in fields.tokens.items()}


def _plain(value: Any) -> Any:
    """Return a value as JSON has it, so that equal ones compare equal."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items() if inner is not None}
    return list(value) if isinstance(value, tuple) else value


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
    for name in base.fields.config:
        mine, bases = (_nested(one.config, name) for one in (tower, base))
        yield name, mine, bases, "config.json"
    for name in base.fields.pixels:
        mine, bases = tower.processor[name], base.processor[name]
        yield name, mine, bases, "its image processor (preprocessor_config.json)"
    for name in base.fields.tokens:
        yield name, tower.tokens[name], base.tokens[name], "processor_config.json"


def _nested(config: "PreTrainedConfig", name: str) -> Any:
    """Return a field of a config, which may have dots; None if there is no such field."""
    for part in name.split("."):
        config = getattr(config, part, None)
    return config


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
