"""A prompt per member: sequences of different lengths behind one scheduler and one block table.

The engine sees one *virtual* sequence per request, which is as long as the longest member's. The
members are aligned on the right: all of them predict the next token at the same virtual position.

    L    length of the virtual prompt, a multiple of the block size if possible
    P    length of a member's prompt
    p    its offset, L - P: virtual position v is the member's position v - p
    B    size of a KV cache block; p = q * B + r with 0 <= r < B

Tokens before p are not part of the member's sequence, and it does not run on them. Keys and values
of the token at virtual position v are stored in slot v - r of the request's block table. So for
attention, the member's sequence starts at block q of the table and is seq_len - p tokens long.

The sequence does not start at block 0, because requests with the same prompts share cached blocks.
A generated token (v >= L) lies at slot L - r or later, and r < B, so it lies in the last block of
the prompt or behind it. vLLM never shares the last block, so generated tokens of several requests
never collide.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.sequence import IntermediateTensors
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.utils import AttentionGroup

from vllm_proxy.config.request import BASE_LENGTH, PROMPT_KEYS
from vllm_proxy.config.roles import ROLES, Role


class MemberPrompts:
    """The members' prompts of one request.

    Args:
        virtual_prompt: `[L]`.
        extra_args: the request's, with the prompts and the base's length.
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
        given = {role: extra_args.get(key) or base for role, key in PROMPT_KEYS.items()}
        self.ids = {role: np.array(given.get(role, base), dtype=np.int32) for role in roles}
        self.offsets = {role: length - len(ids) for role, ids in self.ids.items()}


def rows_differ(prompts: Sequence[MemberPrompts | None], is_prefilling: Sequence[bool]) -> bool:
    """Whether members may have different rows in a step: some prompt is not at its end."""
    return any(p and prefills for p, prefills in zip(prompts, is_prefilling, strict=True))


@dataclass(frozen=True)
class StepBatch:
    """What a model runner knows about the R requests of one step and their N tokens.

    Attributes:
        prompts: `[R]`; None for a request whose members share one prompt.
        scheduled: `[R]`, tokens of this step, on the host.
        computed: `[R]`, tokens of earlier steps, on the host. May count rejected drafts, but is
            exact within a prompt.
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
        """Return the inputs of each member in this step."""
        roles = next(prompts.ids for prompts in self.prompts if prompts is not None)
        return {role: self._inputs(role) for role in roles}

    def _inputs(self, role: Role) -> "MemberInputs":
        offsets = np.array([p.offsets[role] if p else 0 for p in self.prompts])
        # Of each request's scheduled tokens, the first ones may lie before the member's prompt.
        before = np.clip(offsets - self.computed, 0, self.scheduled)
        kept = self.scheduled - before
        requests = np.flatnonzero(kept)  # [K']: the requests that this member runs on
        kept = kept[requests]
        of_request: np.ndarray = np.repeat(requests, kept)
        ends = np.cumsum(kept)
        # [K]: the rows of the batch, numbered from each request's first row that is kept.
        local = np.arange(len(of_request)) - np.repeat(ends - kept, kept)
        rows = (self.starts + before)[of_request] + local

        # From here on the device computes; the host only sends arrays, and never waits.
        device = self.positions.device
        rows_, of_row, requests_, shift = (
            async_tensor_h2d(array, device) for array in (rows, of_request, requests, offsets)
        )
        virtual = self.positions[rows_]
        positions = virtual - shift[of_row]
        # `common` is one sequence per request, as if it began at block q of its table.
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
            block_table_tensor=blocks_from(
                self.block_table[requests_], shift[requests_], self.block_size
            ),
            slot_mapping=slots_at(
                virtual, shift[of_row], self.block_table, of_row, self.block_size
            ),
            positions=positions,
            is_prefilling=torch.from_numpy(self.is_prefilling[requests]),
        )
        ids = None
        if self.input_ids is not None:
            ids = self.input_ids[rows_]
            if (prompt_ids := self._prompt_ids(role, requests, kept, before)) is not None:
                given = async_tensor_h2d(prompt_ids, device)
                ids = torch.where(given >= 0, given, ids)
        return MemberInputs(role, rows_, ids, positions, common, self.attn_groups)

    def _prompt_ids(
        self, role: Role, requests: np.ndarray, kept: np.ndarray, before: np.ndarray
    ) -> np.ndarray | None:
        """Return `[K]`: the ids of rows in the member's prompt, -1 elsewhere; None without any."""
        found, end = None, 0
        for request, count in zip(requests, kept, strict=True):
            start, end = end, end + count
            prompts = self.prompts[request]
            if prompts is None:
                continue
            position = self.computed[request] + before[request] - prompts.offsets[role]
            part = prompts.ids[role][position : position + count]
            if len(part):
                found = np.full(kept.sum(), -1, dtype=np.int32) if found is None else found
                found[start : start + len(part)] = part
        return found


@dataclass(frozen=True)
class MemberInputs:
    """The inputs of one member in one step: K of the batch's N tokens.

    Attributes:
        rows: `[K]`: which of the batch's tokens.
        input_ids: `[K]`; None on all pipeline ranks but the first.
        positions: `[K]`, in the member's sequence.
        common: the metadata for its attention.
        attn_groups: of all members.
    """

    role: Role
    rows: torch.Tensor
    input_ids: torch.Tensor | None
    positions: torch.Tensor
    common: CommonAttentionMetadata
    attn_groups: Sequence[AttentionGroup]

    def metadata(self) -> dict[str, Any]:
        """Return the metadata of each of this member's attention layers.

        To be called just before the member runs: a builder may keep its latest plan in buffers, and
        members of the same shape share a builder.
        """
        is_empty = self.common.num_reqs == 0  # its layers return zeros
        return {
            name: built
            for group in self.attn_groups
            if (names := [name for name in group.layer_names if role_of(name) == self.role])
            for built in [None if is_empty else group.build_metadata(self.common)]  # once a group
            for name in names
        }

    def padded(self, size: int) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Return ids, positions and slots of *size* rows.

        Rows that pad are id 0 at position 0, in a slot of vLLM's null block, which nobody reads.
        """
        more = 0, size - len(self.positions)
        ids = None if self.input_ids is None else pad(self.input_ids, more)
        return ids, pad(self.positions, more), pad(self.common.slot_mapping, more)

    def gather(
        self, tensors: IntermediateTensors | None, size: int | None = None
    ) -> IntermediateTensors | None:
        """Select this member's rows from the batch's, followed by zeros up to *size* rows."""
        if tensors is None:
            return None
        more = 0 if size is None else size - len(self.rows)
        return _map(tensors, lambda tensor: pad(tensor[self.rows], (0, 0, 0, more)))

    def scatter(
        self, output: torch.Tensor | IntermediateTensors, tokens: int
    ) -> torch.Tensor | IntermediateTensors:
        """Put the member's output at its rows among the batch's *tokens* rows; zeros elsewhere."""
        if isinstance(output, IntermediateTensors):
            return _map(output, lambda tensor: self._scattered(tensor, tokens))
        return self._scattered(output, tokens)

    def _scattered(self, output: torch.Tensor, tokens: int) -> torch.Tensor:
        kept = output[: len(self.rows)]  # the rest is padding
        return output.new_zeros(tokens, *output.shape[1:]).index_copy_(0, self.rows, kept)


def slots_at(
    virtual: torch.Tensor,
    offsets: torch.Tensor,
    block_table: torch.Tensor,
    of_row: torch.Tensor,
    block_size: int,
) -> torch.Tensor:
    """Return `[…, rows]`: the KV cache slots v - r of rows at virtual positions v.

    Args:
        virtual: `[rows]`.
        offsets: `[…, rows]`: p.
        block_table: `[requests, blocks]`.
        of_row: `[rows]`: each row's request.
        block_size: B.
    """
    slots = virtual - offsets % block_size
    blocks = block_table[of_row, slots // block_size].long()
    return blocks * block_size + slots % block_size


def blocks_from(block_table: torch.Tensor, offsets: torch.Tensor, block_size: int) -> torch.Tensor:
    """Return `[…, requests, blocks]`: the block table, each row shifted left by its q blocks.

    Args:
        block_table: `[requests, blocks]`.
        offsets: `[…, requests]`: p.
        block_size: B.
    """
    width = block_table.shape[1]
    columns = torch.arange(width, device=offsets.device)
    columns = columns + (offsets // block_size)[..., None]
    # Columns beyond the end repeat the last one. No sequence is long enough to read them.
    return block_table.expand_as(columns).gather(-1, columns.clamp_(max=width - 1))


@contextmanager
def changed_context(**changes: Any) -> Iterator[None]:
    """Change fields of vLLM's forward context for the body."""
    outer = get_forward_context()
    inner = replace(outer, **changes)
    with override_forward_context(inner):
        yield
    outer.moe_layer_index = inner.moe_layer_index  # counts the layers of all members


def _map(
    tensors: IntermediateTensors, function: Callable[[torch.Tensor], torch.Tensor]
) -> IntermediateTensors:
    return IntermediateTensors({name: function(tensor) for name, tensor in tensors.items()})


def role_of(name: str) -> Role:
    """Return whose layer or parameter has this name: the base's have no prefix."""
    root = name.partition(".")[0]
    return next((role for role in ROLES if role == root), "base")
