"""The host's time for work that is not in a FULL CUDA graph.

The host launches a FULL graph once. It launches other work operator by operator, while the device
still runs earlier operators; such work takes the host's time or the device's, whichever is longer.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

Part = Literal["decode", "prompts", "drafts", "prefill"]
"""Steps of all members without prompts; those whose members have different prompts; the expert's
drafting; prompts."""
Graphs = Literal["full", "piecewise", "none"]

CAPTURED: Mapping[Part, Graphs] = MappingProxyType(
    {"decode": "full", "prompts": "full", "drafts": "full", "prefill": "none"}
)
"""What an engine captures with vLLM's default `cudagraph_mode`. Prompts are usually longer than
vLLM's largest graph."""

LAUNCH = 5e-6
"""Seconds of the host per kernel launch through PyTorch: our assumption."""
PYTHON_OPERATOR = 45e-6
"""Seconds of the host per operator that vLLM implements in Python: our assumption."""


class _Count(NamedTuple):
    """What the host launches.

    Attributes:
        kernels: launches per layer.
        operators: operators in Python per layer: attention, and its write to the KV cache.
        others: launches per step: embedding, metadata, head and sampling.
    """

    kernels: int
    operators: int
    others: int


# Counted in vLLM 0.33's Llama with FlashAttention 3: products, rotation, write, attention, its
# combination, activation, all-reduces with norms. Piecewise: a graph and the attention's kernels.
_COUNTS = {"none": _Count(12, 2, 25), "piecewise": _Count(5, 2, 25)}


def host_seconds(graphs: Graphs, layers: int) -> float:
    """Return the time in which the host launches *layers* layers of a member; 0 for a graph."""
    if graphs == "full":
        return 0.0
    kernels, operators, others = _COUNTS[graphs]
    return layers * (kernels * LAUNCH + operators * PYTHON_OPERATOR) + others * LAUNCH


def captured(enforce_eager: bool, mode: str | None) -> Mapping[Part, Graphs]:
    """Return what an engine captures.

    Args:
        enforce_eager: vLLM's argument.
        mode: the name of vLLM's `cudagraph_mode`; None for its default.
    """
    nothing: dict[Part, Graphs] = dict.fromkeys(CAPTURED, "none")
    if enforce_eager or mode == "NONE":
        return MappingProxyType(nothing)
    if mode == "PIECEWISE":
        return MappingProxyType({**nothing, "decode": "piecewise", "prompts": "piecewise"})
    return CAPTURED
