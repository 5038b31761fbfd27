"""`MemberShifts`: members with different prompts in a step that runs all of them on the same rows.

That is every step in which no request with different prompts has tokens of its prompt left. Then
only this differs between members (symbols of `alignment.py`): positions (v - p), slots (v - r),
lengths of sequences (less p) and block tables (from column q; of recurrent layers, the block of the
state in every column). A CUDA graph reads all of it from
the addresses that it was captured with, so each member has tensors that stay where they are.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_proxy.config.roles import Role
from vllm_proxy.model.alignment import CacheGroup, MemberPrompts, changed_context, role_of


class MemberShifts:
    """What differs between members, per row and per request.

    M is the number of members, G that of KV cache groups.

    Attributes:
        offsets: `[M, max_tokens]`: p of each row; zero in ordinary steps.
        positions: `[M, max_tokens]`: written by `member_positions`.
        slots: `[M, G, max_tokens]`; like the following ones written by `share` or `shift`.
        seq_lens: `[M, max_requests]`, int32.
        tables: `[M, max_requests, blocks]`, int32, by group.
    """

    def __init__(
        self,
        roles: Sequence[Role],
        max_tokens: int,
        groups: Sequence[CacheGroup],
        group_of: Mapping[str, int],
    ) -> None:
        """Allocate for block tables like those of *groups*, `[max_requests, blocks]`.

        *group_of*: the number of each layer's group.
        """
        first, members = groups[0].block_table, len(roles)
        rows = {"dtype": torch.int64, "device": first.device}
        self.roles = tuple(roles)
        self.offsets, self.positions = (torch.zeros(members, max_tokens, **rows) for _ in range(2))
        self.slots = torch.zeros(members, len(groups), max_tokens, **rows)
        self.seq_lens = first.new_zeros(members, len(first), dtype=torch.int32)
        self.tables = [g.block_table.new_zeros(members, *g.block_table.shape) for g in groups]
        self._group_of = group_of
        self._is_shifted = False
        self._are_read = False

    def unused(self) -> None:
        """Let all members read the batch's own tensors in this step."""
        self._clear()
        self._are_read = False

    def share(
        self,
        seq_lens: torch.Tensor,
        groups: Sequence[CacheGroup],
        slots: torch.Tensor,
        longest: int,
    ) -> None:
        """Give all members the batch's `[R]`, tables and `[G, N]`: no prompts differ.

        *longest* is an upper bound of *seq_lens*: blocks behind it are not copied.
        """
        self._clear()
        self._are_read = True
        self.seq_lens[:, : len(seq_lens)] = seq_lens
        for tables, group in zip(self.tables, groups, strict=True):
            table = group.up_to(longest)
            tables[:, : len(table), : table.shape[1]] = table
        self.slots[:, :, : slots.shape[1]] = slots

    def shift(
        self,
        offsets: np.ndarray,
        scheduled: np.ndarray,
        positions: torch.Tensor,
        seq_lens: torch.Tensor,
        groups: Sequence[CacheGroup],
        slots: torch.Tensor,
        longest: int,
    ) -> None:
        """Shift each member's sequences. Does not wait for the device.

        Args:
            offsets: `[M, requests]`: p, on the host.
            scheduled: `[requests]`: tokens of this step, on the host.
            positions: `[N]`, virtual; N and R may count rows and requests that pad the batch.
            seq_lens: `[R]`, virtual.
            groups: the KV cache groups, with tables `[R, blocks]`.
            slots: `[G, N]`.
            longest: an upper bound of *seq_lens*, on the host.
        """
        self.share(seq_lens, groups, slots, longest)
        self._is_shifted = True
        requests, tokens = len(scheduled), int(scheduled.sum())
        device = positions.device
        of_row = async_tensor_h2d(np.repeat(np.arange(requests), scheduled), device)
        shift = async_tensor_h2d(offsets, device)
        by_row = shift[:, of_row]
        self.offsets[:, :tokens] = by_row
        self.seq_lens[:, :requests] -= shift
        for i, group in enumerate(groups):
            self.slots[:, i, :tokens] = group.slots(positions[:tokens], by_row, of_row)
            used = group.up_to(longest)[:requests]
            self.tables[i][:, :requests, : used.shape[1]] = group.moved(
                used, shift, seq_lens[:requests]
            )

    def _clear(self) -> None:
        if self._is_shifted:
            self.offsets.zero_()
            self._is_shifted = False

    def member_positions(self, positions: torch.Tensor) -> dict[Role, torch.Tensor]:
        """Return `[N]` by role: positions in the members' sequences, at addresses that stay."""
        tokens = len(positions)
        shifted = self.positions[:, :tokens]
        torch.sub(positions, self.offsets[:, :tokens], out=shifted)
        return dict(zip(self.roles, shifted, strict=True))

    def put(self, role: Role, positions: torch.Tensor) -> torch.Tensor:
        """Return *positions* at the address from which CUDA graphs read this member's."""
        return self.positions[self.roles.index(role), : len(positions)].copy_(positions)

    @contextmanager
    def slots_in_context(self, tokens: int) -> Iterator[None]:
        """Make attention layers store keys and values at their members' slots."""
        outer = get_forward_context()
        if not self._are_read or not outer.slot_mapping:
            yield  # shared by all members, or a run without a KV cache
            return
        slots = dict(zip(self.roles, self.slots[:, :, :tokens], strict=True))
        slot_mapping = {n: slots[role_of(n)][self._group_of[n]] for n in outer.slot_mapping}
        with changed_context(slot_mapping=slot_mapping):
            yield


def offsets_of(prompts: Sequence[MemberPrompts | None], roles: Sequence[Role]) -> np.ndarray:
    """Return `[M, requests]`: p; zero for a request whose members share one prompt."""
    return np.array([[p.offsets[role] if p else 0 for p in prompts] for role in roles])
