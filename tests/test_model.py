"""`ProxyTunedForCausalLM` beside the engine: what a CPU run of vLLM cannot show."""

import pytest
import torch
from torch import nn
from vllm.sequence import IntermediateTensors

from vllm_proxy.config import ROLES
from vllm_proxy.model import ProxyTunedForCausalLM


class MemberOnAPool(nn.Module):
    """Stands for a member whose CUDA graphs write their output where every other member's do.

    A mock, because it takes a GPU to share a graph pool.
    """

    def __init__(self, value: float, size: int, vocab_size: int, pool: torch.Tensor) -> None:
        super().__init__()
        self.value, self.size, self.vocab_size, self.pool = value, size, vocab_size, pool
        self.addresses: set[int] = set()

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        output = self.pool[: len(input_ids) * self.size].view(len(input_ids), self.size)
        if intermediate_tensors is not None:
            return output.copy_(intermediate_tensors["hidden_states"] + 1)
        assert input_ids.max() < self.vocab_size
        self.addresses.add(input_ids.data_ptr())
        output.copy_(self.value + input_ids[:, None] + 1000 * positions[:, None])
        return output if self.last_rank else IntermediateTensors({"hidden_states": output})


def make_model(*, last_rank: bool = True) -> ProxyTunedForCausalLM:
    model = ProxyTunedForCausalLM.__new__(ProxyTunedForCausalLM)
    nn.Module.__init__(model)
    pool = torch.empty(100)
    model.base = MemberOnAPool(0.1, 4, 50, pool)
    model.expert = MemberOnAPool(0.2, 2, 40, pool)
    model.antiexpert = MemberOnAPool(0.3, 2, 60, pool)
    model.hidden_sizes = [4, 2, 2]
    model.vocab_sizes = {"base": 50, "expert": 40, "antiexpert": 60}
    model.head = nn.Identity() if last_rank else None
    for role in ROLES:
        model.member(role).last_rank = last_rank
    model.own_ids = {"expert": torch.zeros(8, dtype=torch.int32)}
    return model


def test_members_may_write_their_outputs_to_the_same_memory():
    ids, positions = torch.tensor([3, 7, 11]), torch.tensor([0, 1, 0])
    hidden_states = make_model()(ids, positions)
    at = (ids + 1000 * positions)[:, None].float()
    parts = [(at + value).expand(3, size) for value, size in ((0.1, 4), (0.2, 2), (0.3, 2))]
    torch.testing.assert_close(hidden_states, torch.cat(parts, dim=-1))


def test_ids_beyond_a_members_vocabulary_are_its_last():
    ids, positions = torch.tensor([39, 40, 49]), torch.zeros(3, dtype=torch.long)
    hidden_states = make_model()(ids, positions)
    torch.testing.assert_close(hidden_states[:, 0], ids + 0.1)
    torch.testing.assert_close(hidden_states[:, 4], torch.tensor([39.2, 39.2, 39.2]))
    torch.testing.assert_close(hidden_states[:, 6], ids + 0.3)


def test_members_read_ids_from_one_address():
    """A CUDA graph is replayed on the addresses of its capture: the runner's buffer, or ours."""
    model, buffer = make_model(), torch.zeros(8, dtype=torch.int32)
    kept = []
    for step in ([3, 45], [7, 8, 9], [49]):
        ids = buffer[: len(step)]
        ids.copy_(torch.tensor(step))
        kept.append(model(ids, torch.zeros_like(ids)).clone())
    assert [len(member.addresses) for member in (model.base, model.expert, model.antiexpert)] == [
        1,
        1,
        1,
    ]
    assert kept[0][:, 4].tolist() == pytest.approx([3.2, 39.2])


def test_pipeline_ranks_hand_over_each_members_tensors():
    ids, positions = torch.tensor([3, 7, 11]), torch.tensor([0, 1, 0])
    handed_over = make_model(last_rank=False)(ids, positions)
    assert set(handed_over.tensors) == {f"{role}.hidden_states" for role in ROLES}
    hidden_states = make_model()(ids, positions, handed_over)
    at = 1 + (ids + 1000 * positions)[:, None].float()
    parts = [(at + value).expand(3, size) for value, size in ((0.1, 4), (0.2, 2), (0.3, 2))]
    torch.testing.assert_close(hidden_states, torch.cat(parts, dim=-1))
