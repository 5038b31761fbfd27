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

Recurrent layers keep a state, not keys and values. After the token at v it lies in the block of v,
for all members: vLLM moves states from block to block by virtual positions. A member whose prompt
has not begun has a state there that nobody has written. Its layers do not read it: the sequence of
its first token has nothing before it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
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
class CacheGroup:
    """What a step knows about a KV cache group: layers with one block table.

    Attributes:
        block_table: `[R, blocks]` or longer, int32.
        block_size: B.
        attn_groups: the attention groups in it, of all members.
        has_states: whether its layers are recurrent.
    """

    block_table: torch.Tensor
    block_size: int
    attn_groups: Sequence[AttentionGroup]
    has_states: bool = False

    def up_to(self, tokens: int) -> torch.Tensor:
        """Return the columns of the table for sequences of at most *tokens*."""
        return self.block_table[:, : -(-tokens // self.block_size)]

    def moved(
        self, table: torch.Tensor, offsets: torch.Tensor, seq_lens: torch.Tensor
    ) -> torch.Tensor:
        """Return a member's table, `[…, requests, blocks]` or what can be expanded to it.

        Args:
            table: `[requests, blocks]`, of this group.
            offsets: `[…, requests]`: p.
            seq_lens: `[requests]`, virtual.
        """
        if self.has_states:
            return states_from(table, seq_lens, self.block_size)
        return blocks_from(table, offsets, self.block_size)

    def slots(
        self, virtual: torch.Tensor, offsets: torch.Tensor, of_row: torch.Tensor
    ) -> torch.Tensor:
        """Return `[…, rows]`: a member's slots. Recurrent layers read none, and get any.

        Args:
            virtual: `[rows]`: positions.
            offsets: `[…, rows]`: p.
            of_row: `[rows]`: each row's request.
        """
        if self.has_states:
            return virtual
        return slots_at(virtual, offsets, self.block_table, of_row, self.block_size)

    def names_of(self, role: Role) -> list[tuple[AttentionGroup, list[str]]]:
        """Return the attention groups that have layers of a member, and those layers."""
        named = ((g, [n for n in g.layer_names if role_of(n) == role]) for g in self.attn_groups)
        return [(group, names) for group, names in named if names]


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
        groups: the KV cache groups.
    """

    prompts: Sequence[MemberPrompts | None]
    scheduled: np.ndarray
    computed: np.ndarray
    is_prefilling: np.ndarray
    input_ids: torch.Tensor | None
    positions: torch.Tensor
    seq_lens: torch.Tensor
    groups: Sequence[CacheGroup]

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
        # `shared` is one sequence per request, as if it began at block q of its table.
        seq_lens = (self.computed + self.scheduled - offsets)[requests].astype(np.int32)
        query_start_loc = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32))
        shared = partial(
            CommonAttentionMetadata,
            query_start_loc=async_tensor_h2d(query_start_loc, device),
            query_start_loc_cpu=query_start_loc,
            seq_lens=(self.seq_lens[requests_] - shift[requests_]).int(),
            seq_lens_cpu_upper_bound=torch.from_numpy(seq_lens),
            num_reqs=len(requests),
            num_actual_tokens=len(of_request),
            max_query_len=int(kept.max(initial=0)),
            max_seq_len=int(seq_lens.max(initial=0)),
            positions=positions,
            is_prefilling=torch.from_numpy(self.is_prefilling[requests]),
        )
        commons = [
            shared(
                block_table_tensor=group.moved(
                    table, shift[requests_], self.seq_lens[requests_]
                ).expand_as(table),
                slot_mapping=group.slots(virtual, shift[of_row], of_row),
            )
            for group in self.groups
            for table in [group.block_table[requests_]]
        ]
        ids = None
        if self.input_ids is not None:
            ids = self.input_ids[rows_]
            if (prompt_ids := self._prompt_ids(role, requests, kept, before)) is not None:
                given = async_tensor_h2d(prompt_ids, device)
                ids = torch.where(given >= 0, given, ids)
        return MemberInputs(role, rows_, ids, positions, commons, self.groups)

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
        commons: the metadata for its layers, by KV cache group.
        groups: the KV cache groups, of all members.
    """

    role: Role
    rows: torch.Tensor
    input_ids: torch.Tensor | None
    positions: torch.Tensor
    commons: Sequence[CommonAttentionMetadata]
    groups: Sequence[CacheGroup]

    def metadata(self) -> dict[str, Any]:
        """Return the metadata of each of this member's attention layers.

        To be called just before the member runs: a builder may keep its latest plan in buffers, and
        members of the same shape share a builder.
        """
        return {
            name: built
            for group, common in zip(self.groups, self.commons, strict=True)
            for attention, names in group.names_of(self.role)
            # once for all of them; without requests its layers return zeros
            for built in [attention.build_metadata(common) if common.num_reqs else None]
            for name in names
        }

    def padded(self, size: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return ids and positions of *size* rows. Rows that pad are id 0 at position 0."""
        more = 0, size - len(self.positions)
        ids = None if self.input_ids is None else pad(self.input_ids, more)
        return ids, pad(self.positions, more)

    def slots(self, size: int) -> dict[str, torch.Tensor]:
        """Return the slots of *size* rows by layer.

        Rows that pad are in a slot of vLLM's null block, which nobody reads.
        """
        more = 0, size - len(self.positions)
        return {
            name: slots
            for group, common in zip(self.groups, self.commons, strict=True)
            for slots in [pad(common.slot_mapping, more)]
            for _, names in group.names_of(self.role)
            for name in names
        }

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


def states_from(block_table: torch.Tensor, seq_lens: torch.Tensor, block_size: int) -> torch.Tensor:
    """Return `[requests, 1]`: the block of each request's states, which all members share.

    Args:
        block_table: `[requests, blocks]`.
        seq_lens: `[requests]`, virtual.
        block_size: B.
    """
    last = (seq_lens[:, None].long() - 1).clamp_(min=0)
    return block_table.gather(1, last // block_size)


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
