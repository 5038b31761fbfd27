"""A checkpoint's files: which of them vLLM reads, and the shapes in their headers."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_proxy.members.attempt import attempt
from vllm_proxy.members.location import Files, Unreadable

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from vllm.config import ModelConfig


MISTRAL = "consolidated"
"""Prefix of weight files in Mistral's format. If there are any, vLLM reads only these, unless
`load_format` says otherwise."""


def meta_model(config: "ModelConfig") -> "PreTrainedModel | None":
    """Return transformers' model of the config on the meta device; None if it has none."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = attempt(AutoModelForCausalLM.from_config, config.hf_config)
    # An exception: not an architecture in transformers, or one that needs a real device.
    return None if isinstance(model, Exception) else model


def is_converted(model: "PreTrainedModel") -> bool:
    """Whether transformers renames or merges this architecture's tensors while loading."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return False
    return bool(get_model_conversion_mapping(model, add_legacy=False))


def checkpoint_files(files: Files, load_format: str) -> list[Path]:
    """Return the safetensors files that vLLM would read.

    Empty if it would read other files, or if some of them are not downloaded yet.

    Raises:
        Unreadable: the index of the files cannot be read, or names a missing file.
    """
    directory, present = files.directory, sorted(files.directory.glob("*.safetensors"))
    if load_format in ("pt", "npcache"):
        return []
    index = directory / "model.safetensors.index.json"
    mistral = [file for file in present if file.name.startswith(MISTRAL)]
    if load_format == "mistral" or (load_format == "auto" and mistral):
        present, index = mistral, directory / f"{MISTRAL}.safetensors.index.json"
    if not index.is_file():
        return present
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise Unreadable(f"{index.name} cannot be read; restore the file") from None
    absent = [name for name in names if not (directory / name).is_file()]
    if absent and present and not files.from_hub:
        raise Unreadable(
            f"{index.name} names {absent[0]!r}, which is missing ({len(absent)} of {len(names)} "
            "files are); download the checkpoint again"
        )
    return [] if absent else [directory / name for name in names]


def safetensors_header(file: Path) -> dict[str, tuple[int, ...]]:
    """Return name -> shape. Raises `Unreadable` if the file is truncated or not safetensors."""
    from safetensors import SafetensorError, safe_open

    try:
        # for "pt", memory is reserved for the whole file
        with safe_open(file, framework="np") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise Unreadable(f"{file.name}: {error}; download the checkpoint again") from None
