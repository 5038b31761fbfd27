"""The forward pass of all members without an engine: what a CPU run of vLLM cannot show."""

import pytest
import torch
from vllm.forward_context import ForwardContext, override_forward_context
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import _get_padding_mask

from support.proxy_models import SIZES, VALUES, make_model
from vllm_proxy.config.roles import ROLES
from vllm_proxy.model.side_by_side import SideBySide


def assert_side_by_side(output: torch.Tensor, at: torch.Tensor, model: SideBySide):
    """Each member's hidden states, and the bits of its row's controls."""
    rows = len(at)
    parts = [(at + VALUES[role]).expand(rows, SIZES[role]) for role in model.roles]
    torch.testing.assert_close(output, torch.cat([*parts, model.columns[:rows]], dim=-1))


@pytest.mark.parametrize("roles", [ROLES, ("base", "expert"), ("base", "antiexpert")])
def test_members_may_write_their_outputs_to_the_same_memory(roles):
    ids, positions = torch.tensor([3, 7, 11]), torch.tensor([0, 1, 0])
    model = make_model(roles=roles)
    assert_side_by_side(model(ids, positions), (ids + 1000 * positions)[:, None].float(), model)


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


@pytest.fixture
def in_step():
    """A forward context, as in every step: of as many rows as the runner's batch may have."""
    mask = torch.tensor([False, False, True, True])
    context = ForwardContext(
        no_compile_layers={}, attn_metadata={}, slot_mapping={}, is_padding=mask
    )
    with override_forward_context(context):
        yield context


def test_a_paired_model_skips_no_row_as_padding(in_step):
    """vLLM's routers of experts skip rows by a mask of the batch, of which this model runs two."""
    model, masks = make_model(paired=True), []
    model.antiexpert.register_forward_pre_hook(
        lambda _, inputs: masks.append(_get_padding_mask(len(inputs[0])))
    )
    ids = torch.zeros(4, dtype=torch.int32)
    model(ids, torch.zeros(4, dtype=torch.long))
    assert masks == [None]
    assert _get_padding_mask(4).tolist() == in_step.is_padding.tolist()  # the base's, again


def test_a_paired_model_reads_ids_that_it_knows_from_one_address(in_step):
    model, ids = make_model(paired=True), torch.tensor([3, 45, 49], dtype=torch.int32)
    for rows in (3, 1, 2):
        hidden_states = model(ids[:rows], torch.zeros(rows, dtype=torch.long))
        known = ids[:rows, None].clamp(max=39) + VALUES["antiexpert"]
        torch.testing.assert_close(hidden_states[:, 4:8], known.expand(rows, 4))
    assert model.antiexpert.addresses == {model.twice_ids.data_ptr()}
    assert ids.tolist() == [3, 45, 49]  # the base's, and the runner's


@pytest.mark.parametrize("paired", [False, True])
def test_the_last_pipeline_rank_runs_a_member_whole(in_step, paired):
    """From the batch's ids, which vLLM's runner does not pass to it; other ranks do not have it."""
    whole = frozenset(("expert", "antiexpert") if paired else ("expert",))
    before = [role for role in ROLES if role not in whole]
    ids, positions = torch.tensor([3, 7, 11], dtype=torch.int32), torch.tensor([0, 1, 0])
    handed_over = make_model(last_rank=False, roles=before)(ids, positions)
    model = make_model(paired=paired, whole=whole)
    model.batch_ids = torch.cat([ids, torch.tensor([99], dtype=torch.int32)])
    hidden_states = model(None, positions, handed_over)
    at = (ids + 1000 * positions)[:, None].float()
    starts = {"base": 0, "expert": 4, "antiexpert": 6}
    for role, start in starts.items():
        value = VALUES["antiexpert" if paired and role == "expert" else role]
        found = hidden_states[:, start : start + SIZES[role]]
        expected = at + value + (role not in whole)
        torch.testing.assert_close(found, expected.expand_as(found))


@pytest.mark.parametrize("roles", [ROLES, ("base", "expert"), ("base", "antiexpert")])
def test_pipeline_ranks_hand_over_each_members_tensors(roles):
    ids, positions = torch.tensor([3, 7, 11]), torch.tensor([0, 1, 0])
    handed_over = make_model(last_rank=False, roles=roles)(ids, positions)
    assert set(handed_over.tensors) == {f"{role}.hidden_states" for role in roles}
    model = make_model(roles=roles)
    at = 1 + (ids + 1000 * positions)[:, None].float()
    assert_side_by_side(model(ids, positions, handed_over), at, model)
