"""The formula against numpy in float64."""

import numpy as np
import pytest
import torch

from vllm_proxy.arithmetic import proxy_coefficients, proxy_logits


def logits(rows: int, vocab: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 8).to(dtype)


def coefficients(alpha: float) -> torch.Tensor:
    return torch.tensor(proxy_coefficients(alpha))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, -2.5])
def test_sum_is_formed_in_float32(dtype, alpha):
    members = [logits(5, 40, seed, dtype) for seed in range(3)]
    base, expert, antiexpert = (member.double().numpy() for member in members)
    fused = proxy_logits(*members, coefficients(alpha))
    assert fused.dtype == torch.float32
    np.testing.assert_allclose(fused, base + alpha * (expert - antiexpert), rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize(("expert_vocab", "antiexpert_vocab"), [(30, 30), (30, 34), (50, 44)])
def test_ids_that_a_member_lacks_are_never_generated(expert_vocab, antiexpert_vocab):
    base = logits(4, 40, 0)
    expert, antiexpert = logits(4, expert_vocab, 1), logits(4, antiexpert_vocab, 2)
    fused = proxy_logits(base, expert, antiexpert, coefficients(1.5))
    shared = min(40, expert_vocab, antiexpert_vocab)
    assert fused.shape == (4, 40)
    assert (fused[:, shared:] == float("-inf")).all()
    shift = 1.5 * (expert[:, :shared] - antiexpert[:, :shared])
    torch.testing.assert_close(fused[:, :shared], base[:, :shared] + shift)


def test_rows_may_have_their_own_coefficients():
    members = [logits(3, 40, seed) for seed in range(3)]
    weights = [[1.0, 0.5, -0.5], [0.0, 1.0, 0.0], [1.0, 2.0, -1.0]]
    fused = proxy_logits(*members, torch.tensor(weights))
    base, expert, antiexpert = (member.double().numpy() for member in members)
    for i, (w_base, w_expert, w_antiexpert) in enumerate(weights):
        row = w_base * base[i] + w_expert * expert[i] + w_antiexpert * antiexpert[i]
        np.testing.assert_allclose(fused[i], row, rtol=1e-6, atol=2e-5)


def test_inputs_are_left_alone():
    members = [logits(2, 10, seed) for seed in range(3)]
    before = [member.clone() for member in members]
    proxy_logits(*members, coefficients(1.0))
    for member, kept in zip(members, before, strict=True):
        torch.testing.assert_close(member, kept, rtol=0, atol=0)
