"""Which members an engine has, as a digest: what the contents of its KV cache depend on.

vLLM knows an engine by its base's name. Where engines share a store of KV caches, or send each
other theirs, that is not enough: with another expert, the same tokens have other keys and values.
"""

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_proxy.config.schema import Member
from vllm_proxy.members.location import on_this_machine
from vllm_proxy.members.text_part import base_overrides
from vllm_proxy.members.vllm_configs import configured_member, proxy_section

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_FILES = ("config.json", "adapter_config.json", "*.safetensors", "*.bin", "*.pt")
_SAMPLES, _SAMPLE_BYTES = 16, 4096
"""How much of each file is read, from its begin to its end: enough to see another training."""


def members_digest(config: "VllmConfig") -> str:
    """Return the same for engines whose members compute the same keys and values of a text.

    Equal configurations have the same digest in all processes, and on all machines that have the
    members at the same paths. The strength is not part of it: it changes logits only.
    """
    parent, section = config.model_config, proxy_section(config.model_config)
    facts = {
        "members": {r: list(_identity(configured_member(parent, r))) for r in section.roles},
        # What the members' files do not say. vLLM has two of these for the base alone.
        "base": [parent.quantization, base_overrides(parent)],
        "dtypes": [str(parent.dtype), str(config.cache_config.cache_dtype)],
        "random": config.load_config.load_format == "dummy",
        "one_pass": section.one_pass,
        "experts": {name: [lora, _version(lora, None)] for name, lora in section.experts.items()},
    }
    return sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _identity(member: Member) -> Iterator[str | None]:
    for name, revision in ((member.model, member.revision), (member.lora, None)):
        yield name
        yield revision
        if name is not None:
            yield _version(name, revision)


def _version(name: str, revision: str | None) -> str | None:
    """Return the commit of a model on the hub, or a digest of files in a local directory."""
    try:
        directory = on_this_machine(name, revision)
    except (OSError, ValueError):
        return None
    if not Path(name).is_dir():
        return directory.name  # named after the commit
    digest = sha256()
    for file in sorted(file for pattern in _FILES for file in directory.glob(pattern)):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        for part in _parts(file):
            digest.update(part)
    return digest.hexdigest()


def _parts(file: Path) -> Iterator[bytes]:
    last = max(file.stat().st_size - _SAMPLE_BYTES, 0)
    with file.open("rb") as opened:
        for i in range(_SAMPLES):
            opened.seek(i * last // (_SAMPLES - 1))
            yield opened.read(_SAMPLE_BYTES)
