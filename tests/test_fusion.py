"""The formulas against numpy, scipy and plain Python in float64."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.special import log_softmax, rel_entr, softmax

from vllm_proxy.config.request import RequestControl
from vllm_proxy.config.strength import Filters, Schedule
from vllm_proxy.model.controls import ExtraOps, LogitControls
from vllm_proxy.model.fusion import (
    adaptive_alpha,
    controlled_logits,
    controls_at,
    fuse,
    in_nucleus,
    is_plausible,
    proxy_logits,
)

ALL_EXTRA_OPS = ExtraOps(adaptive=True, top_p=True, plausibility=True)

INFINITY = float("inf")


def logits(rows: int, vocab: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 8).to(dtype)


def coefficients(alpha: float) -> torch.Tensor:
    return torch.tensor(LogitControls.of(RequestControl(alpha=alpha)).coefficients)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, -2.5])
def test_reference_reweighs_the_base_by_what_tuning_changed(alpha):
    """The paper's second form: `p_base * (p_expert / p_antiexpert) ** alpha`, normalised."""
    members = [logits(5, 40, seed).double() for seed in range(3)]
    base, expert, antiexpert = (softmax(member.numpy(), axis=-1) for member in members)
    weighed = base * (expert / antiexpert) ** alpha
    found = softmax(fuse(*members, alpha).numpy(), axis=-1)
    np.testing.assert_allclose(found, weighed / weighed.sum(-1, keepdims=True), rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, -2.5])
def test_sum_is_the_reference_formed_in_float32(dtype, alpha):
    """Logits of up to 200, in three roundings of float32: 2e-5 where they cancel."""
    members = [logits(5, 40, seed, dtype) for seed in range(3)]
    fused = proxy_logits(*members, coefficients(alpha))
    assert fused.dtype == torch.float32
    reference = fuse(*(member.double() for member in members), alpha)
    torch.testing.assert_close(fused.double(), reference, rtol=1e-6, atol=2e-5)


def test_controlled_rows_are_the_reference_at_their_own_alpha():
    alphas = [0.0, 0.3, 1.0, -2.5, 40.0]
    members = [logits(len(alphas), 40, seed) for seed in range(3)]
    rows = [LogitControls.of(RequestControl(alpha=alpha)) for alpha in alphas]
    controls = controls_at(torch.tensor(rows), torch.zeros(len(rows)))
    reference = fuse(
        *(member.double() for member in members), torch.tensor(alphas).double()[:, None]
    )
    for ops in (ExtraOps(), ALL_EXTRA_OPS):  # filters that are off change nothing
        fused = controlled_logits(*members, controls, ops)
        torch.testing.assert_close(fused.double(), reference, rtol=1e-6, atol=2e-4)


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


STRENGTHS = {
    "constant": (0.7, lambda t: 0.7),
    "first": (Schedule(alpha=1.5, schedule="first", steps=3), lambda t: 1.5 if t < 3 else 0),
    "linear": (Schedule(alpha=-2.0, schedule="linear", steps=5), lambda t: -2 * max(0, 1 - t / 5)),
    "one step": (Schedule(schedule="linear", steps=1), lambda t: 1.0 if t == 0 else 0),
}


@pytest.mark.parametrize(("strength", "alpha_at"), STRENGTHS.values(), ids=STRENGTHS)
def test_strength_changes_with_the_step(strength, alpha_at):
    steps = [0, 1, 2, 3, 4, 5, 6, 100_000]
    row = LogitControls.of(
        RequestControl(alpha=strength, filters=Filters(top_p=0.9, plausibility=0.1))
    )
    controls = controls_at(torch.tensor([row] * len(steps)), torch.tensor(steps))
    expected = [[1, alpha_at(t), -alpha_at(t), 0, 0.9, 0.1, 0] for t in steps]
    torch.testing.assert_close(controls, torch.tensor(expected, dtype=torch.float32))


def test_rows_have_steps_of_their_own():
    rows = [
        LogitControls.of(RequestControl(weights=(0.5, 2.0, -1.0))),
        LogitControls.of(RequestControl(alpha="adaptive")),
        LogitControls.of(RequestControl(alpha=Schedule(alpha=1.0, schedule="linear", steps=4))),
        LogitControls.of(RequestControl(alpha=Schedule(alpha=1.0, schedule="linear", steps=4))),
    ]
    controls = controls_at(torch.tensor(rows), torch.tensor([9, 0, 1, 4]))
    assert controls.tolist() == [
        [0.5, 2.0, -1.0, 0.0, 1.0, 0.0, 0.0],
        [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0],
        [1.0, 0.75, -0.75, 0.0, 1.0, 0.0, 0.0],
        [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0],
    ]


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return rel_entr(softmax(p), softmax(q)).sum()


def alpha_by_brentq(base: np.ndarray, expert: np.ndarray, antiexpert: np.ndarray) -> float:
    def excess(alpha: float) -> float:
        return kl(base + alpha * (expert - antiexpert), base) - kl(expert, antiexpert)

    if excess(2.0) <= 0:
        return 2.0
    return brentq(excess, 0.0, 2.0, xtol=1e-12)


def member_logits(kind: str, rows: int, vocab: int) -> list[torch.Tensor]:
    """Base, expert and antiexpert, `[rows, vocab]`: see `MEMBERS`."""
    scale, change, unlikeness, offset = MEMBERS[kind]
    common, *own = (logits(rows, vocab, seed) for seed in range(4))
    base = common * scale + own[0] * unlikeness
    antiexpert = common * scale + own[1] * unlikeness
    expert = antiexpert + own[2] * change + offset
    return [member.clamp(-60, 60) for member in (base, expert, antiexpert)]


# Standard deviations over 8: of what the members' logits share, of what fine-tuning changed, of
# what large and small differ in; and what was added to all logits of the expert.
MEMBERS = {
    "alike": (0.5, 0.1, 0.05, 0.0),
    "strongly tuned": (0.4, 0.4, 0.2, 0.0),
    "peaked, far apart": (1.5, 0.8, 0.8, 0.0),
    "shifted": (0.5, 0.1, 0.1, 30.0),
    "hardly tuned": (0.5, 0.003, 0.1, 0.0),
}


@pytest.mark.parametrize("vocab", [50, 128_256])
@pytest.mark.parametrize("kind", MEMBERS)
def test_adaptive_alpha_moves_the_base_as_far_as_the_expert_was_moved(kind, vocab):
    """Within 1e-4 of the root, or of the KL.

    Bisection stops at 1e-6. Float32 gives KLs to about 1e-6 of (1 + KL), which the slope of the
    left side, alpha * Var, turns into an error of alpha: more than 1e-4 of it only where the slope
    is below 0.01 and alpha hardly matters. There the KL itself has to be right.
    """
    members = member_logits(kind, 40 if vocab < 1000 else 3, vocab)
    found = adaptive_alpha(*members)
    assert found.dtype == torch.float32
    for alpha, *row in zip(found.tolist(), *(m.double().numpy() for m in members), strict=True):
        if abs(alpha - alpha_by_brentq(*row)) < 1e-4:
            continue
        base, expert, antiexpert = row
        target = kl(expert, antiexpert)
        assert kl(base + alpha * (expert - antiexpert), base) == pytest.approx(
            target, rel=1e-5, abs=2e-6
        )


def test_adaptive_alpha_is_the_root_where_it_is_well_defined():
    """The test above without its way out: all but a few roots must be had to 1e-4."""
    off, kinds = {}, [kind for kind in MEMBERS if kind != "hardly tuned"]
    for kind in kinds:
        members = member_logits(kind, 40, 500)
        rows = zip(*(m.double().numpy() for m in members), strict=True)
        roots = np.array([alpha_by_brentq(*row) for row in rows])
        assert ((roots > 0.05) & (roots < 1.95)).any()
        off[kind] = np.mean(abs(adaptive_alpha(*members).numpy() - roots) > 1e-4)
    assert max(off.values()) <= 0.05, off


def test_adaptive_alpha_is_at_most_two():
    base = torch.tensor([[3.0, 0.0, -1.0], [3.0, 0.0, -1.0]])
    antiexpert = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    # The base is sure of the first token, so one more reason for it, or a small one against it,
    # moves it less than the uniform antiexpert.
    expert = torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.0, 0.5]])
    rows = zip(*(m.double().numpy() for m in (base, expert, antiexpert)), strict=True)
    assert [alpha_by_brentq(*row) for row in rows] == [2.0, 2.0]
    assert adaptive_alpha(base, expert, antiexpert).tolist() == [2.0, 2.0]


def test_adaptive_alpha_is_zero_where_fine_tuning_changed_nothing():
    base, antiexpert = logits(200, 300, 0) / 4, logits(200, 300, 1) / 4
    assert adaptive_alpha(base, antiexpert, antiexpert).tolist() == [0.0] * 200


def test_adaptive_alpha_is_one_where_base_and_antiexpert_are_one_model():
    expert, antiexpert = logits(5, 1000, 0) / 4, logits(5, 1000, 1) / 4
    alpha = adaptive_alpha(antiexpert, expert, antiexpert)
    torch.testing.assert_close(alpha, torch.ones(5), rtol=0, atol=1e-5)


def nucleus_by_hand(base: np.ndarray, top_p: float, slack: float = 0.0) -> set[int]:
    """The smallest set of likeliest tokens that reach top_p, with all that tie with the last."""
    probs = softmax(base)
    kept, total, last = set(), 0.0, 0.0
    for token in np.argsort(-probs, kind="stable"):
        if kept and total >= top_p + slack and probs[token] < last:
            break
        kept.add(int(token))
        last, total = probs[token], total + probs[token]
    return kept


def tokens(mask: torch.Tensor) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in mask]


@pytest.mark.parametrize("vocab", [2, 50, 128_256])
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0])
def test_nucleus_is_the_smallest_set_that_reaches_top_p(spread, vocab):
    """Exactly, but for tokens at which the sum is within 1e-6 of top_p: float32's error."""
    top_p = torch.tensor([0.01, 0.1, 0.37, 0.5, 0.9, 0.95, 0.999, 1.0])
    base = logits(len(top_p), vocab, 0) * spread / 8
    found = tokens(in_nucleus(base, top_p))
    for row, p, kept in zip(base.double().numpy(), top_p.tolist(), found, strict=True):
        if p == 1:
            assert len(kept) == vocab
        else:
            assert nucleus_by_hand(row, p, -1e-6) <= kept <= nucleus_by_hand(row, p, 1e-6)


def test_nucleus_keeps_the_token_that_crosses_the_bound():
    base = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[[2, 0, 3, 1]]  # ids 1, 3, 0, 2 by likelihood
    for top_p, kept in [(0.4, {1}), (0.6, {1, 3}), (0.79, {1, 3}), (0.9, {0, 1, 3})]:
        assert tokens(in_nucleus(base[None], torch.tensor([top_p]))) == [kept]


def test_tokens_that_tie_share_their_fate():
    base = torch.tensor([[1.0, 3.0, 1.0, 0.0, 1.0, 3.0]])
    assert tokens(in_nucleus(base, torch.tensor([0.3]))) == [{1, 5}]
    assert tokens(in_nucleus(base, torch.tensor([0.9]))) == [{0, 1, 2, 4, 5}]


def test_nucleus_is_never_empty():
    """Rows that pad a batch have zeros for controls."""
    base = logits(3, 20, 0)
    kept = in_nucleus(base, torch.tensor([0.0, 1e-30, 0.0]))
    assert tokens(kept) == [{i} for i in base.argmax(-1).tolist()]


def test_plausible_is_a_part_of_the_highest_probability():
    """Exactly, but for tokens within 1e-5 of the bound."""
    beta = torch.tensor([0.0, 1e-30, 0.001, 0.1, 0.5, 1.0])
    base = (logits(len(beta), 5000, 0) / 3).clamp(-60, 60)
    probs = softmax(base.double().numpy(), axis=-1)
    parts = probs / probs.max(-1, keepdims=True)
    for part, b, kept in zip(parts, beta.tolist(), is_plausible(base, beta).numpy(), strict=True):
        assert kept[part >= b * (1 + 1e-5)].all()
        assert not kept[part < b * (1 - 1e-5)].any()
        assert kept[part.argmax()]
        assert kept.any()


ROWS = [
    LogitControls(1.0, 0.8, -0.8),
    LogitControls(1.0, 0.0, 0.0, adaptive=1.0),
    LogitControls(0.0, 1.0, 0.0, top_p=0.7),
    LogitControls(1.0, 0.0, 0.0, adaptive=1.0, top_p=0.9, plausibility=0.01),
    LogitControls(0.5, 2.0, -1.5, plausibility=0.1),
    LogitControls(1.0, 1.0, -1.0, top_p=0.5, plausibility=0.9),
]


def test_rows_of_all_kinds_are_fused_each_by_its_own_controls():
    members = member_logits("strongly tuned", len(ROWS), 300)
    controls = controls_at(torch.tensor(ROWS), torch.zeros(len(ROWS)))
    fused = controlled_logits(*members, controls, ALL_EXTRA_OPS)
    assert fused.dtype == torch.float32
    members_by_row = zip(*(m.double().numpy() for m in members), strict=True)
    for row, own, out in zip(ROWS, members_by_row, fused.numpy(), strict=True):
        alpha = alpha_by_brentq(*own)
        weights = (1, alpha, -alpha) if row.adaptive else row.coefficients
        expected = sum(w * member for w, member in zip(weights, own, strict=True))
        kept = np.zeros(300, dtype=bool)
        kept[list(nucleus_by_hand(own[0], row.top_p) if row.top_p < 1 else range(300))] = True
        if row.plausibility:
            kept &= log_softmax(own[0]) >= log_softmax(own[0]).max() + math.log(row.plausibility)
        assert (kept == np.isfinite(out)).all()
        assert (out[~kept] == -INFINITY).all()
        np.testing.assert_allclose(out[kept], expected[kept], rtol=0, atol=1e-3)


@pytest.mark.parametrize("alpha", [0.8, 500.0])
def test_lenient_filters_put_what_they_remove_last(alpha):
    """In its own order: a grammar may leave nothing else."""
    strict = LogitControls(1.0, alpha, -alpha, top_p=0.5, plausibility=0.1)
    rows = [strict, strict._replace(lenient=1.0), LogitControls(1.0, alpha, -alpha)]
    members = [m.expand(3, -1) for m in member_logits("strongly tuned", 1, 300)]
    controls = controls_at(torch.tensor(rows), torch.zeros(3))
    never, last, free = controlled_logits(*members, controls, ExtraOps.of(rows))
    kept = never.isfinite()
    assert 0 < kept.sum() < 300
    torch.testing.assert_close(last[kept], never[kept])
    assert last.isfinite().all()
    assert last[~kept].max() < last[kept].min() - 1e3
    assert (last.softmax(-1)[~kept] == 0).all()
    close = 2e-6 * free.abs().max().item() + 2e-3
    shift = (last - free)[~kept]
    torch.testing.assert_close(shift, shift[:1].expand_as(shift), rtol=0, atol=close)


def test_rows_do_not_depend_on_their_batch():
    members = member_logits("strongly tuned", len(ROWS), 300)
    controls = controls_at(torch.tensor(ROWS), torch.zeros(len(ROWS)))
    fused = controlled_logits(*members, controls, ALL_EXTRA_OPS)
    for i in range(len(ROWS)):
        row = slice(i, i + 1)
        alone = controlled_logits(*(m[row] for m in members), controls[row], ExtraOps.of([ROWS[i]]))
        torch.testing.assert_close(alone, fused[i : i + 1], rtol=0, atol=1e-4)


def test_controlled_inputs_are_left_alone():
    members = member_logits("alike", len(ROWS), 50)
    inputs = *members, controls_at(torch.tensor(ROWS), torch.zeros(len(ROWS)))
    before = [tensor.clone() for tensor in inputs]
    controlled_logits(*inputs, ALL_EXTRA_OPS)
    for tensor, kept in zip(inputs, before, strict=True):
        torch.testing.assert_close(tensor, kept, rtol=0, atol=0)
