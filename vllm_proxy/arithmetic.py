"""The formula, once. Every other path that fuses logits is tested against these functions."""

import torch


def proxy_coefficients(alpha: float) -> tuple[float, float, float]:
    """Return the weights of base, expert and antiexpert: `base + alpha * (expert - antiexpert)`.

    Proxy tuning (Liu et al. 2024, section 2). *alpha* is the strength: 1.0 is the paper's, 0.0
    gives the base. The softmax of the result is `p_base * (p_expert / p_antiexpert) ** alpha`,
    normalised.
    """
    return 1.0, alpha, -alpha


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
            antiexpert (`proxy_coefficients`).

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
