"""Members that are LM heads of vLLM's without a model, also as ranks of a tensor-parallel group."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import vocab_parallel_embedding
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from vllm_proxy.config.request import RequestControl
from vllm_proxy.config.roles import ROLES
from vllm_proxy.model.controls import LogitControls
from vllm_proxy.model.head import ProxyHead

HIDDEN = {"base": 96, "expert": 64, "antiexpert": 32}
ROWS = 7


class Member(nn.Module):
    """An LM head as vLLM's model classes have it, on no model."""

    def __init__(self, vocab_size: int, hidden_size: int, *, tied: bool = False, **config) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(vocab_size, hidden_size)
        self.lm_head = ParallelLMHead(vocab_size, hidden_size, bias=config.pop("bias", False))
        if tied:
            self.lm_head = self.lm_head.tie_weights(self.embed_tokens)
        self.multiplier = config.pop("multiplier", 1.0)
        head_dtype = config.pop("head_dtype", None)
        self.logits_processor = LogitsProcessor(vocab_size, **config)
        self.logits_processor.head_dtype = head_dtype

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.multiplier != 1.0:
            hidden_states = hidden_states * self.multiplier
        return self.logits_processor(self.lm_head, hidden_states, self.lm_head.bias)


class Triple:
    """Members on one tensor-parallel rank, their head, and the weights that they were given.

    A role for which *configs* has None is the base's as well.
    """

    def __init__(
        self,
        sizes: tuple[int, ...],
        dtype: torch.dtype,
        alpha: float,
        *,
        separate_role: str | None = None,
        one_module: bool = False,
        may_compile: bool = False,
        **configs,
    ) -> None:
        torch.set_default_dtype(dtype)
        self.roles = [role for role in ROLES if configs.get(role, {}) is not None]
        self.sizes = {role: sizes[ROLES.index(role)] for role in self.roles}
        self.hidden_sizes = [HIDDEN[role] for role in self.roles]
        self.members = {
            role: Member(self.sizes[role], HIDDEN[role], **configs.get(role, {}))
            for role in self.roles
        }
        if one_module:
            self.members["expert"] = self.members["antiexpert"]
        default = LogitControls.of(RequestControl(alpha=alpha))
        self.head = ProxyHead(
            *(self.members, self.hidden_sizes, self.sizes, default),
            separate_role=separate_role,
            may_compile=may_compile,
        )
        random = torch.Generator().manual_seed(0)
        self.weights = {
            role: torch.randn(self.sizes[role], HIDDEN[role], generator=random)
            for role in self.roles
        }
        if one_module:
            self.weights["expert"] = self.weights["antiexpert"]
        self.biases = {role: torch.randn(self.sizes[role], generator=random) for role in self.roles}
        for role, member in self.members.items():
            layer = member.lm_head
            layer.weight.weight_loader(layer.weight, self.weights[role])
            if layer.bias is not None:
                layer.bias.weight_loader(layer.bias, self.biases[role])
        self.hidden_states = torch.randn(ROWS, sum(self.hidden_sizes), generator=random)

    def ready(self) -> "Triple":
        """As vLLM does once the weights are there."""
        self.head.weights_loaded()
        for module in (*self.members.values(), self.head):
            for layer in module.modules():
                if isinstance(getattr(layer, "quant_method", None), QuantizeMethodBase):
                    layer.quant_method.process_weights_after_loading(layer)
        return self

    def logits(self, role: str, **config) -> torch.Tensor:
        """A member's logits in float64, `[rows, ids that all members have]`."""
        role = role if role in self.roles else "base"
        part = self.hidden_states.split(self.hidden_sizes, dim=-1)[self.roles.index(role)]
        logits = config.get("multiplier", 1.0) * part.double() @ self.weights[role].double().T
        if config.get("bias"):
            logits += self.biases[role].double()
        if soft_cap := config.get("soft_cap"):
            logits = soft_cap * (logits / soft_cap).tanh()
        return config.get("scale", 1.0) * logits[:, : min(self.sizes.values())]


@contextmanager
def rank_of(ranks: int, rank: int) -> Iterator[None]:
    """Build vLLM's layers as this rank of a tensor-parallel group (without the group: a mock)."""
    with pytest.MonkeyPatch.context() as patch, set_current_vllm_config(VllmConfig()):
        patch.setattr(
            vocab_parallel_embedding, "get_tensor_model_parallel_world_size", lambda: ranks
        )
        patch.setattr(vocab_parallel_embedding, "get_tensor_model_parallel_rank", lambda: rank)
        yield


def by_ranks(ranks: int, *args, **configs) -> tuple[list[Triple], torch.Tensor]:
    """Return the ranks' triples and their logits side by side."""
    triples, logits = [], []
    for rank in range(ranks):
        with rank_of(ranks, rank):
            triples.append(Triple(*args, **configs).ready())
        logits.append(triples[-1].head(triples[-1].hidden_states, gather=False))
    return triples, torch.cat(logits, dim=-1)
