"""A member's LM head: how it makes logits of hidden states, and which ids its shard has."""

import torch
from torch import nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
    VocabParallelEmbeddingShardIndices,
)

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.roles import Role


class Projection:
    """How one member computes logits from hidden states.

    Found by running its `compute_logits` once, with a recorder instead of its `LogitsProcessor`. So
    this works for every model class of vLLM.
    """

    def __init__(self, role: Role, member: nn.Module, hidden_size: int) -> None:
        self.role = role
        self.member = member
        found = [
            (parent, name, child)
            for parent in member.modules()
            for name, child in parent.named_children()
            if isinstance(child, LogitsProcessor)
        ]
        if len(found) != 1:
            raise ProxyConfigError(
                f"{type(member).__name__} has {len(found)} logits processors, not one",
                field=role,
                remedy="use a model with one LM head",
            )
        parent, name, self.processor = found[0]
        recorder = _Recorder()
        setattr(parent, name, recorder)
        hidden_states = torch.empty(1, hidden_size)
        logits = member.compute_logits(hidden_states)
        self.layer, given, self.bias = recorder.arguments
        # Whether the member does nothing before or after the projection.
        self.is_direct = given is hidden_states and logits is recorder.logits
        setattr(parent, name, _LocalProcessor(self.processor))

    @property
    def is_quantized(self) -> bool:
        """Whether the head has anything but a plain weight."""
        plain = UnquantizedEmbeddingMethod | UnquantizedLinearMethod
        return not isinstance(self.layer.quant_method, plain)

    def obstacle(self) -> str | None:
        """Return why this is more than a product with a weight; None if it is not."""
        dtypes = None, torch.float32, self.layer.params_dtype  # the product leaves in float32
        for reason, found in {
            "quantized": self.is_quantized,
            "a bias": self.bias is not None or getattr(self.layer, "bias", None) is not None,
            "a soft cap": self.processor.soft_cap is not None,
            "a logit scale": self.processor.scale != 1.0,
            f"in {self.processor.head_dtype}": self.processor.head_dtype not in dtypes,
            "its model computes more": not self.is_direct,
        }.items():
            if found:
                return f"{self.role}'s head: {reason}"
        return None


class _Recorder(nn.Module):
    def forward(
        self,
        lm_head: VocabParallelEmbedding,
        hidden_states: torch.Tensor,
        embedding_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.arguments = lm_head, hidden_states, embedding_bias
        self.logits = torch.empty(1, 1)
        return self.logits


class _LocalProcessor(nn.Module):
    """A member's `LogitsProcessor` without the gathering, which `ProxyHead` does once.

    It adds the head's bias too where the model class loads one and leaves it out (vLLM's PhiMoE).
    """

    def __init__(self, processor: LogitsProcessor) -> None:
        super().__init__()
        self.processor = processor

    def forward(
        self,
        lm_head: VocabParallelEmbedding,
        hidden_states: torch.Tensor,
        embedding_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        bias = getattr(lm_head, "bias", None) if embedding_bias is None else embedding_bias
        return self.processor(lm_head, hidden_states, bias, skip_gather=True)


def align_shard(projection: Projection, base: VocabParallelEmbedding) -> None:
    """Give a head the base's shard of the vocabulary, whatever the size of its own vocabulary.

    To be called before weights are loaded: vLLM's loader reads by `shard_indices`, and so does an
    embedding that is tied to the head.

    Raises:
        ProxyConfigError: the head is quantized, so its rows cannot be moved.
    """
    layer, shard = projection.layer, base.shard_indices
    if layer.shard_indices == shard:
        return
    if projection.is_quantized:
        if layer.tp_size == 1:
            return  # its first columns are the ids that it shares with the base
        raise ProxyConfigError(
            f"a quantized head of {layer.org_vocab_size} ids cannot be split over ranks like the "
            f"base's head of {base.org_vocab_size} ids",
            field=projection.role,
            remedy="use tensor_parallel_size 1, or a checkpoint whose head is not quantized",
        )
    size = layer.org_vocab_size
    start, end = shard.padded_org_vocab_start_index, shard.padded_org_vocab_end_index
    indices = VocabParallelEmbeddingShardIndices(
        padded_org_vocab_start_index=start,
        padded_org_vocab_end_index=end,
        padded_added_vocab_start_index=size,
        padded_added_vocab_end_index=size,
        org_vocab_start_index=min(start, size),
        org_vocab_end_index=min(end, size),
        added_vocab_start_index=size,
        added_vocab_end_index=size,
    )
    rows = base.num_embeddings_per_partition
    owners = owners_of_weight(projection.member, layer.weight)
    for parameter in layer.parameters(recurse=False):  # weight and bias
        parameter.data = parameter.new_empty(rows, *parameter.shape[1:])
    for owner in owners:
        owner.shard_indices = indices
        owner.num_embeddings_per_partition = rows


def owners_of_weight(member: nn.Module, weight: nn.Parameter) -> list[VocabParallelEmbedding]:
    """Return the layers that have this weight: a head, and an embedding that is tied to it."""
    layers = (m for m in member.modules() if isinstance(m, VocabParallelEmbedding))
    return [layer for layer in layers if getattr(layer, "weight", None) is weight]
