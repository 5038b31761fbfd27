"""The recurrent layers of members, and how vLLM copies their states."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn
from vllm.model_executor.layers.mamba.abstract import MambaBase

if TYPE_CHECKING:
    from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncsByType


def has_states(model: nn.Module) -> bool:
    """Whether a model has recurrent layers."""
    return any(isinstance(module, MambaBase) for module in model.modules())


def state_copies(members: Iterable[Any]) -> "MambaStateCopyFuncsByType":
    """Return how states of each kind are copied from one block to the next, for vLLM's runners.

    Args:
        members: the members' models. Each knows its own kinds.
    """
    found: MambaStateCopyFuncsByType = {}
    for member in members:
        layers = [module for module in member.modules() if isinstance(module, MambaBase)]
        if layers:
            found |= member.get_mamba_state_copy_funcs({layer.mamba_type for layer in layers})
    return found
