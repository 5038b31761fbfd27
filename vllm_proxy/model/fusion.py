"""The formulas, once. Every other path that fuses logits is tested against these functions.

Proxy tuning (Liu et al. 2024, arXiv 2401.08565, section 2):

    base + alpha * (expert - antiexpert)

*alpha* is the strength: 1.0 is the paper's, 0.0 gives the base. The softmax of the result is
`p_base * (p_expert / p_antiexpert) ** alpha`, normalised.

Symbols: R rows, V ids that all members have.
"""

import torch

from vllm_proxy.model.controls import ExtraOps

CONTROLS = 7
"""How many numbers say how a row is fused: the weights of base, expert and antiexpert; whether
alpha is adaptive; the base's nucleus; the base's plausibility bound; whether both are lenient."""
LAST = 1e4
"""How far below all other logits those are that a lenient filter removes: `exp(-LAST)` is 0."""
BISECTIONS = 22
"""Gives an adaptive alpha to 1e-6, which moves logits of 60 by less than 1e-4."""


def controls_at(rows: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Return how logits are fused at the given steps.

    A request's strength is `start + slope * t` for its first tokens and 0 afterwards, which is
    constant, kept for the first k tokens, or falling linearly to 0 over k tokens.

    Args:
        rows: `[R, len(LogitControls)]`, float32: `LogitControls`.
        steps: `[R]`: t, the number of tokens generated before the one that a row is for.

    Returns:
        `[R, CONTROLS]`, float32.
    """
    base, expert, antiexpert, start, slope, last, *others = rows.unbind(-1)
    alpha = torch.where(steps < last, start + slope * steps, 0)
    return torch.stack([base, expert + alpha, antiexpert - alpha, *others], dim=-1)


def proxy_logits(
    base: torch.Tensor,
    expert: torch.Tensor,
    antiexpert: torch.Tensor,
    coefficients: torch.Tensor,
) -> torch.Tensor:
    """Weigh and add the members' logits.

    Vocabularies are aligned by token id. Padding makes them unlike in size (Qwen2.5: 152064 for
    the large models, 151936 for the small ones). The result has the base's ids; one that the
    expert or the antiexpert lacks gets minus infinity, so that it is never generated: the formula
    has no value for it, and the member that lacks it could not read it back.

    Args:
        base: `[rows, base_vocab]`, any floating dtype.
        expert: `[rows, expert_vocab]`.
        antiexpert: `[rows, antiexpert_vocab]`.
        coefficients: `[3]`, or `[rows, 3]` where rows differ: the weights of base, expert and
            antiexpert.

    Returns:
        `[rows, base_vocab]`, float32: the sum is formed and kept there, whatever the inputs'
        dtype, because the small members' logits cancel most of each other.
    """
    shared = min(base.shape[-1], expert.shape[-1], antiexpert.shape[-1])
    logits = torch.full_like(base, float("-inf"), dtype=torch.float32)
    known = logits[..., :shared]
    w_base, w_expert, w_antiexpert = coefficients.float()[..., None].unbind(-2)
    torch.mul(expert[..., :shared], w_expert, out=known)
    known.addcmul_(antiexpert[..., :shared].float(), w_antiexpert)
    known.addcmul_(base[..., :shared].float(), w_base)
    return logits


def adaptive_alpha(
    base: torch.Tensor, expert: torch.Tensor, antiexpert: torch.Tensor
) -> torch.Tensor:
    """Find the strength that moves the base as far as fine-tuning moved the small model.

    Dynamic logit fusion (Fan et al. 2024, arXiv 2406.15480): the alpha in [0, 2] with

        KL(p_alpha ‖ p_base) = KL(p_expert ‖ p_antiexpert)
        p_alpha = softmax(base + alpha * (expert - antiexpert))

    and 2 where even that does not move the base as far. With d = expert - antiexpert, the left
    side is `alpha * E_alpha[d] - log E_base[exp(alpha * d)]`, which is 0 at alpha = 0 and has the
    derivative `alpha * Var_alpha[d]`, so it never falls, and bisection finds alpha. Newton's
    method does not take fewer passes: the left side is flat where one token has all of p_alpha.

    Where expert and antiexpert are equal, alpha is 0. Where they differ by a constant, or by KLs
    near float32's rounding (1e-6), alpha may come out as anything; then it hardly matters.

    Args:
        base: `[R, V]`, finite.
        expert: `[R, V]`.
        antiexpert: `[R, V]`.

    Returns:
        `[R]`, float32; below alpha by at most `2 ** (2 - BISECTIONS)`.
    """
    base, expert, antiexpert = map(log_softmax, (base, expert, antiexpert))
    shift = expert - antiexpert
    target = expert.exp_().mul_(shift).sum(-1)
    buffer = torch.empty_like(base)

    def log_z_and_mean_shift(alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = torch.addcmul(base, shift, alpha[:, None], out=buffer)
        highest = logits.amax(-1, keepdim=True)
        weights = logits.sub_(highest).exp_()
        z = weights.sum(-1)
        return highest.squeeze(-1) + z.log(), weights.mul_(shift).sum(-1) / z

    alpha = torch.zeros_like(target)
    log_z_base, _ = log_z_and_mean_shift(alpha)  # 0, but for rounding; cancels where shift is 0
    for step in range(BISECTIONS):
        higher = (alpha + 2.0 ** (1 - step)).clamp_(max=2.0)
        log_z, mean_shift = log_z_and_mean_shift(higher)
        divergence = higher * mean_shift - (log_z - log_z_base)
        alpha = torch.where(divergence < target, higher, alpha)
    return alpha


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Return what torch's gives, whose sum of 128k terms is off by up to 3e-5 on a CPU.

    Args:
        logits: `[R, V]`; minus infinity stays so.
    """
    logits = logits.float() - logits.amax(-1, keepdim=True)
    return logits.sub_(logits.exp().sum(-1, keepdim=True).log_())


def in_nucleus(base: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Find the base's likeliest tokens, as many as it takes to reach the probability *top_p*.

    The filter of DExperts (Liu et al. 2021, arXiv 2105.03023), by the nucleus of Holtzman et al.
    2020 (arXiv 1904.09751): the token that crosses the bound is kept, so at least
    one is. Tokens with the logit of the last one kept are all kept: equally likely tokens share
    their fate, whatever their ids and however a device sorts them.

    Args:
        base: `[R, V]`.
        top_p: `[R]`; 1 keeps every token.

    Returns:
        `[R, V]`, bool.
    """
    likeliest = base.sort(-1, descending=True).values
    probs = log_softmax(likeliest).exp_()
    before = probs.cumsum(-1).sub_(probs)  # of the tokens that are likelier
    count = (before < top_p[:, None]).sum(-1, keepdim=True).clamp_(min=1)
    bound = likeliest.gather(-1, count - 1)
    # By rounding, a sum may reach 1 before its last terms.
    return base >= bound.masked_fill_(top_p[:, None] >= 1, float("-inf"))


def is_plausible(base: torch.Tensor, plausibility: torch.Tensor) -> torch.Tensor:
    """Find the tokens with at least a part of the base's highest probability.

    The plausibility constraint of contrastive decoding (Li et al. 2023, arXiv 2210.15097):
    `p >= beta * max p`, in logits, since the normalisation cancels.

    Args:
        base: `[R, V]`.
        plausibility: `[R]`: beta, from 0, which keeps every token, to 1.

    Returns:
        `[R, V]`, bool.
    """
    return base >= base.amax(-1, keepdim=True) + plausibility.log()[:, None]


def controlled_logits(
    base: torch.Tensor,
    expert: torch.Tensor,
    antiexpert: torch.Tensor,
    controls: torch.Tensor,
    extra_ops: ExtraOps,
) -> torch.Tensor:
    """Fuse logits as each row's controls say.

    Args:
        base: `[R, V]`, finite.
        expert: `[R, V]`.
        antiexpert: `[R, V]`.
        controls: `[R, CONTROLS]`, float32: the members' weights, of which adaptive rows take no
            notice; 1 for adaptive, else 0; top_p, 1 for off; plausibility, 0 for off; 1 for
            lenient, else 0.
        extra_ops: which of these are on in any row; the others are not looked at.

    Returns:
        `[R, V]`, float32; minus infinity for tokens that a filter removes, or in lenient rows
        `LAST` below all others, in their own order: there vLLM may forbid, afterwards, all that
        the filter keeps. The base's likeliest token always stays.
    """
    coefficients, others = controls.split([3, CONTROLS - 3], dim=-1)
    adaptive, top_p, plausibility, lenient = others.unbind(-1)
    if extra_ops.adaptive:
        alpha = adaptive_alpha(base, expert, antiexpert)
        own = torch.stack([torch.ones_like(alpha), alpha, -alpha], dim=-1)
        coefficients = torch.where(adaptive[:, None] > 0, own, coefficients)
    logits = proxy_logits(base, expert, antiexpert, coefficients)
    if not (extra_ops.top_p or extra_ops.plausibility):
        return logits
    kept = in_nucleus(base, top_p) if extra_ops.top_p else torch.ones_like(base, dtype=torch.bool)
    if extra_ops.plausibility:
        kept &= is_plausible(base, plausibility)
    least, most = logits.aminmax(dim=-1)
    down = torch.where(lenient > 0, most - least + LAST, float("inf"))
    return torch.where(kept, logits, logits - down[:, None])
