"""Is a model's head tied to its embedding? The checkpoint may contradict the config."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_proxy.members.location import on_this_machine

if TYPE_CHECKING:
    from vllm.config import ModelConfig

ROWS = 4096
"""Number of rows that are compared at a time."""


def follow_checkpoint(config: "ModelConfig", load_format: str) -> None:
    """Untie a model's head if its checkpoint has a separate one, though its config ties it.

    As vLLM does with a model served alone, and transformers (5) with every model. Both load a head
    that is a copy of the embedding, and then tie it. Here the memory of all heads is laid out
    before anything is loaded, so a copy must be recognised first.

    Args:
        config: changed in place.
        load_format: the engine's; `dummy` reads no checkpoint.
    """
    if is_tied(config) and has_separate_head(config, load_format):
        config.maybe_untie_word_embeddings()


def is_tied(config: "ModelConfig") -> bool:
    """Whether a model's config ties its head to the embedding."""
    return bool(getattr(config.hf_config, "tie_word_embeddings", False))


def has_separate_head(config: "ModelConfig", load_format: str) -> bool:
    """Whether a model's checkpoint has a head that is not a copy of its embedding.

    Args:
        config: the model's.
        load_format: the engine's; `dummy` reads no checkpoint.
    """
    return load_format != "dummy" and _has_head(config) and not _head_is_a_copy(config)


def _has_head(config: "ModelConfig") -> bool:
    from vllm.transformers_utils.config import checkpoint_has_lm_head

    try:
        return bool(checkpoint_has_lm_head(config.model, revision=config.revision))
    except Exception:  # noqa: BLE001 - a broken file is reported where it is read
        return False


def _head_is_a_copy(config: "ModelConfig") -> bool:
    """Return whether another tensor of the checkpoint has the same values as its head.

    False where that cannot be read: vLLM then examines the checkpoint itself.
    """
    import torch
    from safetensors import SafetensorError

    try:
        files = sorted(on_this_machine(config.model, config.revision).glob("*.safetensors"))
        with torch.device("cpu"):  # also while a model is built on the meta device
            return any(_equal_tensors(files))
    except (SafetensorError, OSError, ValueError):
        return False


def _equal_tensors(files: list[Path]) -> Iterator[bool]:
    """Yield, for each other tensor of the head's shape, whether it equals the head."""
    import torch
    from safetensors import safe_open

    handles = [safe_open(file, framework="pt") for file in files]
    tensors = {name: h.get_slice(name) for h in handles for name in h.keys()}  # noqa: SIM118
    heads = [name for name in tensors if name.endswith("lm_head.weight")]
    if len(heads) != 1:
        return
    head = tensors.pop(heads[0])
    shape, kind = head.get_shape(), head.get_dtype()
    for tensor in tensors.values():
        if tensor.get_shape() == shape and tensor.get_dtype() == kind:
            starts = range(0, shape[0], ROWS)
            yield all(torch.equal(head[i : i + ROWS], tensor[i : i + ROWS]) for i in starts)
