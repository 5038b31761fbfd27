"""Does an adapter fit the model that it will be merged into? Reads headers, never weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.roles import Role
from vllm_proxy.config.schema import Member, ProxyConfig
from vllm_proxy.members.adapters import architecture_tensors
from vllm_proxy.members.location import Unreadable, locate
from vllm_proxy.members.read import ReadMember
from vllm_proxy.members.weights import safetensors_header
from vllm_proxy.preflight.check.weights import CheckpointInfo

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_proxy.members.lora import LoraAdapter


def inspect_adapters(
    members: Mapping[Role, ReadMember],
    checkpoints: Mapping[Role, CheckpointInfo],
    *,
    dummy: bool,
    config: ProxyConfig,
) -> tuple[list[str], list[str]]:
    """Merge each member's adapter into its checkpoint, by shapes only.

    Args:
        members: the members that can be used.
        checkpoints: what is known of their checkpoints.
        dummy: the engine will read neither checkpoints nor adapters (`load_format: dummy`).
        config: tells whether the small members may run in one pass.

    Returns:
        Notes on what will be merged, and the problems.
    """
    sentences, problems = [], []
    owned = [(role, *adapter) for role in members for adapter in config.adapters_of(role).items()]
    for role, owner, lora in owned:
        if dummy:
            sentences.append(f"{owner} runs without its adapter (`engine.load_format: dummy`).")
            continue
        try:
            sentences += _inspect(members[role], owner, lora, checkpoints[role], config)
        except Unreadable as error:
            problems.append(f"{owner} adapter `{lora}`: {error}")
        except ProxyConfigError as error:
            names_itself = error.field in ("one_pass", owner)
            problems.append(str(error) if names_itself else f"{owner} {error}")
    return sentences, problems


def _inspect(
    member: ReadMember, owner: str, lora: str, checkpoint: CheckpointInfo, config: ProxyConfig
) -> list[str]:
    from vllm_proxy.members.lora import LoraAdapter, must_be_merged, read_adapter_config

    if Path(lora).is_file():
        raise Unreadable("it is a file; give the directory that holds adapter_config.json")
    files = locate(Member(model=lora))
    adapter_config = read_adapter_config(lora, files.directory)
    model = member.member.model_copy(update={"lora": None})
    subject = f"{owner} is `{model}` with the adapter `{lora}`"
    quantization = member.model_config.quantization
    added, in_one_pass = (
        "merged during loading",
        "added to its layers, in one pass with the antiexpert",
    )
    pairs = member.role == "expert" and config.may_run_as_one
    file = files.directory / "adapter_model.safetensors"
    if file.is_file():
        adapter = LoraAdapter.parse(lora, adapter_config, _on_meta(safetensors_header(file)))
        adapter.require_mergeable(quantization)
        tensors = (
            architecture_tensors(member.model_config)
            if quantization
            else _on_meta(checkpoint.tensors)
        )
        if tensors:
            for _ in adapter.merge(tensors.items(), member.model_config.hf_text_config):
                pass  # meta tensors: nothing is computed
        if pairs and adapter.is_plain:
            added = in_one_pass
        elif config.experts:
            raise must_be_merged(lora, owner, "use one that does not")
        elif pairs and config.one_pass:
            raise must_be_merged(lora)
        sentences = [f"{subject} ({_size(adapter)}) {added}."]
    elif files.from_hub or (files.directory / "adapter_model.bin").is_file():
        if quantization:  # else an engine refuses it
            added = in_one_pass
        sentences = [f"{subject} (its weights were not inspected) {added}."]
    else:
        raise Unreadable("the directory has no adapter_model.safetensors; save the adapter again")
    trained_on = adapter_config.get("base_model_name_or_path")
    # The same model may be in any directory: the last part of its name says more than its path.
    if trained_on and Path(trained_on).name.lower() != Path(model.model).name.lower():
        sentences.append(
            f"The adapter of {owner} says that it was trained on {trained_on!r}; if that is "
            "a different model with the same shapes, the output is meaningless."
        )
    return sentences


def _on_meta(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, "Tensor"]:
    import torch

    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _size(adapter: "LoraAdapter") -> str:
    ranks = adapter.ranks
    parts = []
    if ranks:
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        modules = len(adapter.modules)
        parts.append(f"{rank}, {modules} module{'' if modules == 1 else 's'}")
    if replaced := len(adapter.replaced):
        parts.append(f"{replaced} tensor{'' if replaced == 1 else 's'} instead of the model's")
    if trained := sum(len(ids) for ids, _ in adapter.tokens.values()):
        parts.append(f"{trained} trained token{'' if trained == 1 else 's'}")
    return ", ".join(parts)
