"""A prompt for each member: sequences of unlike length behind one scheduler and one block table.

The engine knows a request by one *virtual* sequence, as long as the longest member's, and members
are aligned at the right: all of them predict the next token at the same virtual position.

    L    length of the virtual prompt, a multiple of the block size where it can be
    P    length of a member's own prompt
    p    its offset, L - P: virtual position v is the member's own position v - p
    B    size of a KV cache block; p = q * B + r with 0 <= r < B

Tokens before p are no part of the member's sequence: it does not run on them. A member keeps its
keys and values q blocks further on in the request's block table, where virtual position v has slot
v - r. To attention, its sequence starts at block q of the table and is seq_len - p long.

Why not at block 0: a generated token (v >= L) then lies at slot L - r at least, which is behind all
blocks that another request may share with this one, since r < B and the last block of a prompt is
never shared. Requests with the same prompts share cached blocks, and still generate what they like.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.sequence import IntermediateTensors
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.utils import AttentionGroup

from vllm_proxy.config.request import BASE_LENGTH, PROMPT_KEYS
from vllm_proxy.config.roles import Role


class MemberPrompts:
    """The members' prompts of one request.

    Args:
        virtual_prompt: `[L]`.
        extra_args: the request's own values.
        roles: the members that there are.

    Attributes:
        ids: `[P]`, int32, by role.
        offsets: p, by role.
    """

    def __init__(
        self,
        virtual_prompt: Sequence[int],
        extra_args: Mapping[str, Any],
        roles: Sequence[Role],
    ) -> None:
        length = len(virtual_prompt)
        base = virtual_prompt[length - extra_args[BASE_LENGTH] :]
        own = {role: extra_args.get(key) or base for role, key in PROMPT_KEYS.items()}
        self.ids = {role: np.array(own.get(role, base), dtype=np.int32) for role in roles}
        self.offsets = {role: length - len(ids) for role, ids in self.ids.items()}


@dataclass(frozen=True)
class StepBatch:
    """What a model runner knows of the requests of one step, R of them with N tokens.

    Attributes:
        prompts: `[R]`; None for a request whose members share one prompt.
        scheduled: `[R]`, tokens of this step, on the host.
        computed: `[R]`, tokens of earlier steps, on the host; may be too many once drafts were
            rejected, but not within a prompt.
        is_prefilling: `[R]`, whether tokens of the prompt are left, on the host.
        input_ids: `[N]` or longer, int32.
        positions: `[N]` or longer, virtual.
        seq_lens: `[R]` or longer, virtual.
        block_table: `[R, blocks]` or longer, int32.
        block_size: B.
        attn_groups: the attention groups of the one KV cache group.
    """

    prompts: Sequence[MemberPrompts | None]
    scheduled: np.ndarray
    computed: np.ndarray
    is_prefilling: np.ndarray
    input_ids: torch.Tensor | None
    positions: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    block_size: int
    attn_groups: Sequence[AttentionGroup]

    @cached_property
    def starts(self) -> np.ndarray:
        """`[R]`: where each request's tokens begin in the batch."""
        return np.cumsum(self.scheduled) - self.scheduled

    def members(self) -> dict[Role, "MemberInputs"]:
        """Return what each member runs on in this step."""
        roles = next(own.ids for own in self.prompts if own is not None)
        return {role: self._inputs(role) for role in roles}

    def _inputs(self, role: Role) -> "MemberInputs":
        offsets = np.array([p.offsets[role] if p else 0 for p in self.prompts])
        before = np.clip(offsets - self.computed, 0, self.scheduled)
        kept = self.scheduled - before
        requests = np.flatnonzero(kept)
        of_request, kept = np.repeat(requests, kept[requests]), kept[requests]
        ends = np.cumsum(kept)
        local = np.arange(len(of_request)) - np.repeat(ends - kept, kept)
        rows = (self.starts + before)[of_request] + local

        device = self.positions.device
        rows, of_row, requests_, shift = (
            async_tensor_h2d(array, device) for array in (rows, of_request, requests, offsets)
        )
        virtual = self.positions[rows]
        slots = virtual - shift[of_row] % self.block_size
        blocks = self.block_table[of_row, slots // self.block_size].long()
        slot_mapping = blocks * self.block_size + slots % self.block_size
        # Shifted by q blocks; what comes in beyond the end is not read.
        width = self.block_table.shape[1]
        columns = torch.arange(width, device=device)
        columns = columns + (shift[requests_] // self.block_size)[:, None]
        own_table = self.block_table[requests_[:, None], columns.clamp_(max=width - 1)]

        ids = None
        if self.input_ids is not None:
            ids = self.input_ids[rows]
            if (own := self._own_ids(role, requests, kept, before)) is not None:
                own = async_tensor_h2d(own, device)
                ids = torch.where(own >= 0, own, ids)
        positions = virtual - shift[of_row]
        seq_lens = (self.computed + self.scheduled - offsets)[requests].astype(np.int32)
        query_start_loc = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32))
        common = CommonAttentionMetadata(
            query_start_loc=async_tensor_h2d(query_start_loc, device),
            query_start_loc_cpu=query_start_loc,
            seq_lens=(self.seq_lens[requests_] - shift[requests_]).int(),
            seq_lens_cpu_upper_bound=torch.from_numpy(seq_lens),
            num_reqs=len(requests),
            num_actual_tokens=len(of_request),
            max_query_len=int(kept.max(initial=0)),
            max_seq_len=int(seq_lens.max(initial=0)),
            block_table_tensor=own_table,
            slot_mapping=slot_mapping,
            positions=positions,
            is_prefilling=torch.from_numpy(self.is_prefilling[requests]),
        )
        return MemberInputs(role, rows, ids, positions, common, self.attn_groups)

    def _own_ids(
        self, role: Role, requests: np.ndarray, kept: np.ndarray, before: np.ndarray
    ) -> np.ndarray | None:
        """Return `[rows]`: the member's own prompt where a row lies in it, and -1 elsewhere."""
        own, end = None, 0
        for request, count in zip(requests, kept, strict=True):
            start, end = end, end + count
            prompts = self.prompts[request]
            if prompts is None:
                continue
            position = self.computed[request] + before[request] - prompts.offsets[role]
            part = prompts.ids[role][position : position + count]
            if len(part):
                own = np.full(kept.sum(), -1, dtype=np.int32) if own is None else own
                own[start : start + len(part)] = part
        return own


@dataclass(frozen=True)
class MemberInputs:
    """What one member runs on in one step, with K of the batch's N tokens.

    Attributes:
        rows: `[K]`: which of the batch's tokens.
        input_ids: `[K]`; None on all pipeline ranks but the first.
        positions: `[K]`, the member's own.
        common: what its attention needs to know.
        attn_groups: of all members.
    """

    role: Role
    rows: torch.Tensor
    input_ids: torch.Tensor | None
    positions: torch.Tensor
    common: CommonAttentionMetadata
    attn_groups: Sequence[AttentionGroup]

    def metadata(self) -> dict[str, Any]:
        """Return what each of this member's attention layers needs to know.

        Built only before it runs: a builder may keep what it planned last in buffers of its own,
        and members of one shape share it.
        """
        is_empty = self.common.num_reqs == 0  # its layers return zeros
        return {
            name: built
            for group in self.attn_groups
            if (names := [name for name in group.layer_names if role_of(name) == self.role])
            for built in [None if is_empty else group.build_metadata(self.common)]
            for name in names
        }

    def padded(self, size: int) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Return ids, positions and slots of as many rows.

        Further ones are id 0 at position 0, in a slot of vLLM's null block, which nobody reads.
        """
        columns = self.input_ids, self.positions, self.common.slot_mapping
        more = size - len(self.positions)
        return tuple(c if c is None else pad(c, (0, more)) for c in columns)

    def gather(
        self, tensors: IntermediateTensors | None, size: int | None = None
    ) -> IntermediateTensors | None:
        """Pick this member's tokens from those of the batch, and zeros up to *size*."""
        if tensors is None:
            return None
        more = 0 if size is None else size - len(self.rows)
        return _map(tensors, lambda tensor: pad(tensor[self.rows], (0, 0, 0, more)))

    def scatter(
        self, output: torch.Tensor | IntermediateTensors, tokens: int
    ) -> torch.Tensor | IntermediateTensors:
        """Put the member's output where its tokens are among *tokens* of the batch."""
        if isinstance(output, IntermediateTensors):
            return _map(output, lambda tensor: self.scatter(tensor, tokens))
        own = output[: len(self.rows)]  # others are padding
        return output.new_zeros(tokens, *output.shape[1:]).index_copy_(0, self.rows, own)


@contextmanager
def forward_context(
    metadata: Mapping[str, Any], slot_mapping: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    """Let attention layers see these sequences. CUDA graphs were captured with other addresses."""
    outer = get_forward_context()
    own = replace(
        outer,
        attn_metadata=metadata,
        slot_mapping=slot_mapping,
        cudagraph_runtime_mode=CUDAGraphMode.NONE,
        batch_descriptor=None,
        is_padding=None,
    )
    with override_forward_context(own):
        yield
    outer.moe_layer_index = own.moe_layer_index  # counts the layers of all members


def _map(
    tensors: IntermediateTensors, function: Callable[[torch.Tensor], torch.Tensor]
) -> IntermediateTensors:
    return IntermediateTensors({name: function(tensor) for name, tensor in tensors.items()})


def role_of(name: str) -> Role:
    """Return whose layer or parameter this is: the base's bear no prefix."""
    root = name.partition(".")[0]
    return root if root in ("expert", "antiexpert") else "base"
