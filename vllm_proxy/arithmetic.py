"""The formulas, once. Every other path that fuses logits is tested against these functions.

Proxy tuning (Liu et al. 2024, arXiv 2401.08565, section 2):

    base + alpha * (expert - antiexpert)

*alpha* is the strength: 1.0 is the paper's, 0.0 gives the base. The softmax of the result is
`p_base * (p_expert / p_antiexpert) ** alpha`, normalised.

Symbols: R rows, V ids that all members have.
"""

import torch

CONTROLS = 6
"""How many numbers say how a row is fused: the weights of base, expert and antiexpert; whether
alpha is adaptive; the base's nucleus; the base's plausibility bound."""


def controls_at(rows: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Return how logits are fused at the given steps.

    A request's strength is `start + slope * t` for its first tokens and 0 afterwards, which is
    constant, kept for the first k tokens, or falling linearly to 0 over k tokens.

    Args:
        rows: `[R, len(control.Row)]`, float32: `control.Row`s.
        steps: `[R]`: t, the number of tokens generated before the one that a row is for.

    Returns:
        `[R, CONTROLS]`, float32.
    """
    fixed, schedule, others = rows.split([3, 3, 3], dim=-1)
    start, slope, last = schedule.unbind(-1)
    alpha = torch.where(steps < last, start + slope * steps, 0)
    direction = torch.tensor([0.0, 1.0, -1.0], device=rows.device)
    return torch.cat([fixed + alpha[:, None] * direction, others], dim=-1)


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


def controlled_logits(
    base: torch.Tensor, expert: torch.Tensor, antiexpert: torch.Tensor, controls: torch.Tensor
) -> torch.Tensor:
    """TODO(helper)."""
    raise NotImplementedError
