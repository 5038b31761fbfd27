"""The expert as the drafter of speculative decoding, with the weights and KV cache it has anyway.

A pass of all members verifies the drafts, and leaves keys and values of every accepted token in the
expert's cache. So the expert, different from vLLM's draft models, need not read accepted tokens
again. It continues from the last token, one token at a time. The next pass has the same tokens at
the same positions, and overwrites what the expert stored for them.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from vllm.config import CUDAGraphMode, VllmConfig, get_layers_from_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.utils import AttentionGroup

from vllm_proxy.model.alignment import MemberPrompts, blocks_from, role_of
from vllm_proxy.model.side_by_side import PAIR

if TYPE_CHECKING:
    from vllm_proxy.model.proxy_model import ProxyModel

_NOWHERE = 0
"""A slot of vLLM's null block, which no request reads: what goes there is discarded."""


class Drafter(nn.Module):
    """The expert of a model, with the interface of a draft model; holds no weights."""

    def __init__(self, model: "ProxyModel") -> None:
        super().__init__()
        self._model = (model,)  # in a tuple: not a submodule

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, **_: None) -> torch.Tensor:
        """Return `[tokens, H_e]`."""
        return self._model[0].draft(input_ids, positions)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return `[rows, V]`, V the base's vocabulary."""
        return self._model[0].draft_logits(hidden_states)


def drafting_layers(vllm_config: VllmConfig, model: "ProxyModel") -> set[str]:
    """Return the names of the attention layers that run when the expert runs."""
    roles = PAIR if model.is_paired else ("expert",)
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    return {name for name in layers if role_of(name) in roles}


class Sequences:
    """Sequences that the expert extends token by token, as its attention sees them.

    For requests whose members have different prompts, positions and blocks are those of the expert.
    All tensors keep their addresses, from which CUDA graphs read. Symbols are those of
    `alignment.py`; M is the number of requests that there may be.

    Attributes:
        positions: `[M]`: of the next token of each, in the expert's sequence.
        slots: `[M]`: where its keys and values go.
        seq_lens: `[M]`, int32: number of tokens with it.
        nowhere: `[M]`: slots of vLLM's null block.
    """

    def __init__(
        self, max_requests: int, block_table: torch.Tensor, block_size: int, max_model_len: int
    ) -> None:
        """Allocate.

        Args:
            max_requests: M.
            block_table: `[…, blocks]`, like those to come.
            block_size: B.
            max_model_len: drafts beyond it are not stored.
        """
        device = block_table.device
        self._block_size, self._most = block_size, max_model_len
        self._next, self.positions, self.slots, self.nowhere = (
            torch.zeros(max_requests, dtype=torch.int64, device=device) for _ in range(4)
        )
        self.seq_lens = torch.zeros(max_requests, dtype=torch.int32, device=device)
        self._table = block_table.new_zeros(max_requests, block_table.shape[-1])
        self._starts = torch.arange(max_requests + 1, dtype=torch.int32)
        self._starts_there = self._starts.to(device)

    def begin(
        self,
        virtual: torch.Tensor,
        block_table: torch.Tensor,
        prompts: Sequence[MemberPrompts | None] | None,
        rows: int,
    ) -> None:
        """Start before the first draft of R requests.

        Args:
            virtual: `[R]`, virtual positions of the next tokens.
            block_table: `[R, blocks]`.
            prompts: `[R]`; None if no request has different prompts.
            rows: R, or more. Requests that pad read and store in vLLM's null block.
        """
        requests = len(virtual)
        self.begin_nowhere(rows)
        if prompts is not None:
            offsets = np.array([p.offsets["expert"] if p else 0 for p in prompts])
            there = async_tensor_h2d(offsets, virtual.device)
            # Tokens before the expert's prompt are not part of its sequence. Nobody uses the drafts
            # there, and keys and values go to block 0, vLLM's null block.
            is_before = virtual < there
            block_table = blocks_from(block_table, there, self._block_size)
            block_table = block_table.masked_fill(is_before[:, None], 0)
            virtual = (virtual - there).clamp(min=0)
        self._next[:requests] = virtual
        self._table[:requests] = block_table
        self._refresh(rows)

    def begin_nowhere(self, rows: int) -> None:
        """Start with *rows* requests that read and store in vLLM's null block."""
        self._next[:rows] = 0
        self._table[:rows] = 0
        self._refresh(rows)

    def _refresh(self, rows: int) -> None:
        size, next_ = self._block_size, self._next[:rows]
        positions = torch.clamp(next_, max=self._most - 1, out=self.positions[:rows])
        self.seq_lens[:rows] = positions + 1
        blocks = self._table[:rows].gather(1, (positions // size)[:, None])[:, 0]
        slots = blocks.long() * size + positions % size
        self.slots[:rows] = slots.masked_fill(next_ >= self._most, _NOWHERE)

    def advance(self, rows: int) -> None:
        """Continue with the token after this one. The host computes nothing that depends on it."""
        self._next[:rows] += 1
        self._refresh(rows)

    def common(self, rows: int, longest: int) -> CommonAttentionMetadata:
        """Return the metadata for attention to run the next token of each sequence.

        Args:
            rows: number of sequences.
            longest: an upper bound of their lengths with this token.
        """
        longest = min(longest, self._most)
        return CommonAttentionMetadata(
            query_start_loc=self._starts_there[: rows + 1],
            query_start_loc_cpu=self._starts[: rows + 1],
            seq_lens=self.seq_lens[:rows],
            seq_lens_cpu_upper_bound=torch.full((rows,), longest, dtype=torch.int32),
            num_reqs=rows,
            num_actual_tokens=rows,
            max_query_len=1,
            max_seq_len=longest,
            block_table_tensor=self._table[:rows],
            slot_mapping=self.slots[:rows],
            positions=self.positions[:rows],
            is_prefilling=torch.zeros(rows, dtype=torch.bool),
        )


def metadata_of(
    groups: Iterable[AttentionGroup], common: CommonAttentionMetadata, *, for_capture: bool = False
) -> dict[str, Any]:
    """Build the metadata of each attention layer of *groups*."""
    metadata: dict[str, Any] = {}
    for group in groups:
        build = group.build_metadata_for_cudagraph_capture if for_capture else group.build_metadata
        metadata |= dict.fromkeys(group.layer_names, build(common))
    return metadata


def forward_context(
    vllm_config: VllmConfig, metadata: dict[str, Any], sequences: Sequences, rows: int
) -> AbstractContextManager[None]:
    """Make the expert's attention layers see *sequences*.

    In a paired model the antiexpert's layers run too. They see the same and store nothing, since
    the antiexpert may have a different prompt. The expert replays no piecewise CUDA graphs: those
    were captured with the addresses of whole passes.
    """
    slots = {
        name: (sequences.slots if role_of(name) == "expert" else sequences.nowhere)[:rows]
        for name in metadata
    }
    return set_forward_context(
        metadata,
        vllm_config,
        num_tokens=rows,
        cudagraph_runtime_mode=CUDAGraphMode.NONE,
        slot_mapping=slots,
    )
