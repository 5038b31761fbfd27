"""Do a checkpoint's tensors fit its architecture? Reads safetensors headers, never weights."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_proxy.config.engine_arguments import FAST_LOAD_FORMATS
from vllm_proxy.config.roles import Role
from vllm_proxy.members.location import Files, Unreadable
from vllm_proxy.members.read import ReadMember
from vllm_proxy.members.text_part import text_weights
from vllm_proxy.members.weights import (
    MISTRAL,
    checkpoint_files,
    is_converted,
    meta_model,
    safetensors_header,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from vllm.config import ModelConfig

# Tensors in old checkpoints that vLLM skips: computed from the config, not learnt.
_COMPUTED = re.compile(
    r"(rotary_emb|rotary_pos_emb)\.|\.(attn|attention|self_attn)\.(masked_)?bias$|position_ids$"
)


_OTHERS = {
    **dict.fromkeys(("safetensors", *FAST_LOAD_FORMATS, "mistral"), ()),
    "pt": ("*.pt",),
}
"""Other files that a load format reads if there are no safetensors files for it."""


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What is known of a member's checkpoint.

    Attributes:
        parameters: number of weights, tied ones once; None if transformers lacks the architecture.
        problems: where the weights do not fit the architecture, without the member's name.
        note: why the weights were not compared with the architecture, or None.
        tensors: name -> shape of the checkpoint's tensors; empty if they are not known.
    """

    parameters: int | None
    problems: tuple[str, ...] = ()
    note: str | None = None
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def inspect_weights(
    members: Mapping[Role, ReadMember], load_format: str
) -> dict[Role, CheckpointInfo]:
    """Compare each checkpoint, as the engine's *load_format* reads it, with its architecture."""
    models = {id(member.model_config): member for member in members.values()}  # each model once
    inspected = {
        key: _inspect(member.files, member.model_config, load_format)
        for key, member in models.items()
    }
    return {role: inspected[id(member.model_config)] for role, member in members.items()}


def _inspect(files: Files, config: "ModelConfig", load_format: str) -> CheckpointInfo:
    model = meta_model(config)
    parameters = None if model is None else sum(p.numel() for p in model.parameters())
    if load_format == "dummy":
        return CheckpointInfo(parameters)
    try:
        read = checkpoint_files(files, load_format)
        tensors = {name: shape for file in read for name, shape in safetensors_header(file).items()}
        tensors = dict(text_weights(config.hf_config, tensors.items()))
    except Unreadable as error:
        return CheckpointInfo(parameters, problems=(str(error),))
    if tensors:
        mistral = any(file.name.startswith(MISTRAL) for file in read)  # its names differ
        renamed = model is None or is_converted(model) or mistral
        if not renamed and not config.is_quantized:
            problems = tuple(_compare_tensors(model, tensors))
            return CheckpointInfo(parameters, problems=problems, tensors=tensors)
        note = "names of its tensors were not compared with the architecture"
        problems = () if renamed else tuple(_missing_head(model, tensors))
        return CheckpointInfo(parameters, problems=problems, note=note, tensors=tensors)
    if files.from_hub:
        return CheckpointInfo(parameters, note="its weights are on the hub and were not inspected")
    others = _OTHERS.get(load_format, ("*.bin", "*.pt"))
    if any(file for pattern in others for file in files.directory.glob(pattern)):
        return CheckpointInfo(
            parameters, note="its weights are not safetensors and were not inspected"
        )
    wanted = f" that `engine.load_format: {load_format}` reads" if load_format != "auto" else ""
    problem = (
        f"the directory has no weights{wanted}; add *.safetensors, or set `engine.load_format: "
        "dummy` to run on random ones"
    )
    return CheckpointInfo(parameters, problems=(problem,))


def _missing_head(
    model: "PreTrainedModel", tensors: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    """Yield a problem if a quantized checkpoint lacks the head, which would then be random."""
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is head]
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if names and not tied and not any(name.startswith(f"{names[0]}.") for name in tensors):
        yield (
            f"its checkpoint lacks the head ({names[0]}), which its config does not tie to the "
            "embedding (`tie_word_embeddings`); use the config.json that belongs to these weights"
        )


def _compare_tensors(
    model: "PreTrainedModel", tensors: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    known = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    prefix = model.base_model_prefix + "."
    # in a checkpoint of the bare decoder, names lack the prefix
    tensors = {
        name if name in known or prefix + name not in known else prefix + name: shape
        for name, shape in tensors.items()
    }
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    # tied parameters are one tensor: any of their names is enough
    missing = [names[0] for names in groups.values() if not any(n in tensors for n in names)]
    ignored = [re.compile(p) for p in (model._keys_to_ignore_on_load_unexpected or ())]
    extra = [
        name
        for name in tensors
        if name not in known and not any(p.search(name) for p in (_COMPUTED, *ignored))
    ]
    reshaped = [
        f"{name} {list(tensors[name])} instead of {list(shape)}"
        for name, shape in known.items()
        if name in tensors and tensors[name] != shape
    ]
    for names, what in (
        (missing, "that the architecture needs not in the checkpoint"),
        (extra, "in the checkpoint that the architecture does not have"),
        (reshaped, "of another shape than config.json says"),
    ):
        if names:
            plural = "" if len(names) == 1 else "s"
            listed = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            yield (
                f"{len(names)} tensor{plural} {what}: {listed}; use the config.json that belongs "
                "to these weights"
            )
