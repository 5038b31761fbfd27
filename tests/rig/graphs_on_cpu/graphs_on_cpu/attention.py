"""Attention in plain torch that a graph can capture.

vLLM's CPU kernels get a plan that the host computes in every step, in a new tensor. GPU kernels
get tensors that the runner keeps, and plans that a builder keeps in buffers. So does this one: the
builder copies the lengths of sequences into a buffer, from which its layers read.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

ROWS = 32
"""Rows whose scores are computed at once."""


@dataclass
class Metadata:
    """What a layer's attention reads: all tensors keep their addresses."""

    num_actual_tokens: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    max_seq_len: int


class Builder(CPUAttentionMetadataBuilder):
    """Keeps the lengths of sequences in a buffer, as builders for GPUs keep their plans."""

    _cudagraph_support: ClassVar = AttentionCGSupport.ALWAYS

    def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        requests = vllm_config.scheduler_config.max_num_seqs
        self.plan = torch.zeros(requests, dtype=torch.int32)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Metadata:
        common = common_attn_metadata
        plan = self.plan[: common.num_reqs]
        plan.copy_(common.seq_lens[: common.num_reqs])
        return Metadata(
            num_actual_tokens=common.num_actual_tokens,
            query_start_loc=common.query_start_loc,
            seq_lens=plan,
            block_table=common.block_table_tensor,
            max_seq_len=common.max_seq_len,
        )


class Implementation(CPUAttentionBackendImpl):
    """Attends to all blocks of a request's table, masked by the positions of its rows."""

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Metadata | None,
        output: torch.Tensor,
        **_: Any,
    ) -> torch.Tensor:
        if attn_metadata is None:
            return output
        starts = attn_metadata.query_start_loc
        size = kv_cache.shape[2]
        blocks = -(-attn_metadata.max_seq_len // size)
        table = attn_metadata.block_table[:, :blocks]
        tokens = torch.arange(attn_metadata.num_actual_tokens, dtype=torch.int32)
        request = torch.searchsorted(starts[1:].contiguous(), tokens, right=True)
        request = request.clamp(max=len(starts) - 2)
        # The position of each row: rows are the last ones of their sequences.
        position = attn_metadata.seq_lens[request] - starts[request + 1] + tokens
        places = torch.arange(table.shape[1] * size)
        for first in range(0, len(tokens), ROWS):
            rows = slice(first, min(first + ROWS, len(tokens)))
            heads = kv_cache[table[request[rows]].long()]  # [rows, blocks, heads, size, 2 D]
            heads = heads.permute(0, 2, 1, 3, 4).flatten(2, 3).float()
            keys, values = heads.chunk(2, dim=-1)
            seen = places <= position[rows, None]
            if self.sliding_window > 0:
                seen = seen & (places > position[rows, None] - self.sliding_window)
            output[rows] = self._attend(query[rows], keys, values, seen).view(output[rows].shape)
        return output

    def _attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor
    ) -> torch.Tensor:
        """Return `[rows, H, D]` of keys and values `[rows, KV heads, places, D]`."""
        rows, kv_heads = keys.shape[:2]
        query = query.view(rows, kv_heads, -1, self.head_size).float()
        scores = query @ keys.transpose(-1, -2) * self.scale  # [rows, KV heads, queries, places]
        if self.logits_soft_cap:
            scores = self.logits_soft_cap * torch.tanh(scores / self.logits_soft_cap)
        scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
        if self.sinks is not None:  # a place for each head that has no value
            sinks = self.sinks.float().view(1, kv_heads, -1, 1).expand(rows, -1, -1, -1)
            scores = torch.cat([scores, sinks], dim=-1)
        weights = scores.softmax(-1)[..., : keys.shape[2]]
        # What is not seen may be anything, NaN included.
        values = values.masked_fill(~seen[:, None, :, None], 0.0)
        return (weights.nan_to_num(0.0) @ values).reshape(rows, -1, self.head_size)

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        slots = slot_mapping.long().clamp(min=0)  # padding is -1: the null block takes it
        size, count = kv_cache.shape[2], len(slots)
        both = torch.cat([key[:count], value[:count]], dim=-1).to(kv_cache.dtype)
        kv_cache.permute(0, 2, 1, 3).index_put_((slots // size, slots % size), both)


class GraphAttention(CPUAttentionBackend):
    """vLLM's attention on a CPU, with these parts."""

    @staticmethod
    def get_impl_cls() -> type[Implementation]:
        return Implementation

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        return Builder
