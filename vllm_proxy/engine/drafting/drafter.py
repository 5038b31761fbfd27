"""The expert as the drafter of speculative decoding, with the weights and KV cache it has anyway.

A pass of all members verifies the drafts, and leaves keys and values of every accepted token in the
expert's cache. So the expert, different from vLLM's draft models, need not read accepted tokens
again. It continues from the last token, one token at a time. The next pass has the same tokens at
the same positions, and overwrites what the expert stored for them.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
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
    """R sequences that the expert extends token by token, as its attention sees them.

    For requests whose members have different prompts, positions and blocks are those of the expert.
    Symbols are those of `alignment.py`.

    Attributes:
        positions: `[R]`: of the next token of each, in the expert's sequence.
    """

    def __init__(
        self,
        virtual: torch.Tensor,
        longest: int,
        block_table: torch.Tensor,
        block_size: int,
        prompts: Sequence[MemberPrompts | None] | None,
        max_model_len: int,
    ) -> None:
        """Start before the first draft.

        Args:
            virtual: `[R]`, virtual positions of the next tokens.
            longest: an upper bound, on the host, of the number of tokens before any of them.
            block_table: `[R, blocks]`.
            block_size: B.
            prompts: `[R]`; None if no request has different prompts.
            max_model_len: drafts beyond it are not stored.
        """
        self.positions = virtual
        self._table = block_table
        self._block_size = block_size
        self._longest = longest
        self._most = max_model_len
        self._starts = torch.arange(len(virtual) + 1, dtype=torch.int32)
        self._starts_there = self._starts.to(virtual.device, non_blocking=True)
        if prompts is not None:
            offsets = np.array([p.offsets["expert"] if p else 0 for p in prompts])
            self._shift(async_tensor_h2d(offsets, virtual.device))

    def _shift(self, offsets: torch.Tensor) -> None:
        """Go from virtual positions to the expert's."""
        table = blocks_from(self._table, offsets, self._block_size)
        # Tokens before the expert's prompt are not part of its sequence. Nobody uses the drafts
        # there, and keys and values go to block 0, vLLM's null block.
        is_before = self.positions < offsets
        self._table = table.masked_fill(is_before[:, None], 0)
        self.positions = (self.positions - offsets).clamp_(min=0)

    def common(self) -> CommonAttentionMetadata:
        """Return the metadata for attention to run the next token of each sequence."""
        requests, size = len(self.positions), self._block_size
        beyond = self.positions >= self._most
        positions = self.positions.clamp(max=self._most - 1)
        blocks = self._table.gather(1, (positions // size)[:, None])[:, 0]
        slots = (blocks.long() * size + positions % size).masked_fill(beyond, _NOWHERE)
        longest = min(self._longest + 1, self._most)
        return CommonAttentionMetadata(
            query_start_loc=self._starts_there,
            query_start_loc_cpu=self._starts,
            seq_lens=(positions + 1).int(),
            seq_lens_cpu_upper_bound=torch.full((requests,), longest, dtype=torch.int32),
            num_reqs=requests,
            num_actual_tokens=requests,
            max_query_len=1,
            max_seq_len=longest,
            block_table_tensor=self._table,
            slot_mapping=slots,
            positions=positions,
            is_prefilling=torch.zeros(requests, dtype=torch.bool),
        )

    def advance(self) -> None:
        """Continue with the token after this one."""
        self.positions, self._longest = self.positions + 1, self._longest + 1


@contextmanager
def forward_context(
    vllm_config: VllmConfig,
    groups: Iterable[AttentionGroup],
    common: CommonAttentionMetadata,
    *,
    stores: bool = True,
) -> Iterator[None]:
    """Make the expert's attention layers see *common*; *stores*: whether they fill the KV cache.

    In a paired model the antiexpert's layers run too. They see the same and store nothing, since
    the antiexpert may have a different prompt. There is no CUDA graph: those of the expert were
    captured with the addresses of whole passes.
    """
    nowhere = torch.full_like(common.slot_mapping, _NOWHERE)
    metadata: dict[str, Any] = {}
    for group in groups:
        metadata |= dict.fromkeys(group.layer_names, group.build_metadata(common))
    slot_mapping = {
        name: common.slot_mapping if stores and role_of(name) == "expert" else nowhere
        for name in metadata
    }
    with set_forward_context(
        metadata,
        vllm_config,
        num_tokens=common.num_actual_tokens,
        cudagraph_runtime_mode=CUDAGraphMode.NONE,
        slot_mapping=slot_mapping,
    ):
        yield
