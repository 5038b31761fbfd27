"""`SideBySide` over members that are mocks."""

from collections.abc import Sequence

import torch
from torch import nn
from vllm.sequence import IntermediateTensors

from vllm_proxy.config.roles import ROLES, Role
from vllm_proxy.model.proxy_model import NUM_EXTRA_COLUMNS
from vllm_proxy.model.side_by_side import SideBySide


class MemberOnAPool(nn.Module):
    """Stands for a member whose CUDA graphs write their output where every other member's do.

    A mock, because it takes a GPU to share a graph pool.
    """

    def __init__(
        self, value: float, size: int, vocab_size: int, pool: torch.Tensor, *, last_rank: bool
    ) -> None:
        super().__init__()
        self.last_rank = last_rank
        self.value, self.size, self.vocab_size, self.pool = value, size, vocab_size, pool
        self.addresses: set[int] = set()

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        output = self.pool[: len(positions) * self.size].view(len(positions), self.size)
        if intermediate_tensors is not None:
            return output.copy_(intermediate_tensors["hidden_states"] + 1)
        assert input_ids.max() < self.vocab_size
        self.addresses.add(input_ids.data_ptr())
        output.copy_(self.value + input_ids[:, None] + 1000 * positions[:, None])
        return output if self.last_rank else IntermediateTensors({"hidden_states": output})


SIZES = {"base": 4, "expert": 2, "antiexpert": 2}
VALUES = {"base": 0.1, "expert": 0.2, "antiexpert": 0.3}


def make_model(
    *,
    last_rank: bool = True,
    roles: Sequence[Role] = ROLES,
    paired: bool = False,
    whole: frozenset[Role] = frozenset(),
) -> SideBySide:
    """Return the forward pass of these members; *paired*: the antiexpert runs for the expert."""
    pool = torch.empty(100)
    vocab_sizes = {"base": 50, "expert": 40, "antiexpert": 40 if paired else 60}
    members = {
        role: MemberOnAPool(VALUES[role], SIZES[role], vocab_sizes[role], pool, last_rank=last_rank)
        for role in roles
        if not (paired and role == "expert")
    }
    model = SideBySide(
        members,
        roles=roles,
        hidden_sizes=[SIZES[role] for role in roles],
        vocab_sizes=vocab_sizes,
        max_tokens=8,
        num_columns=NUM_EXTRA_COLUMNS,
        dtype=torch.float32,
        is_last_rank=last_rank,
        whole=whole,
    )
    model.columns.uniform_()
    return model
