"""The formula, once. Every other path that fuses logits is tested against these functions."""

import torch


def proxy_logits(
    base: torch.Tensor, expert: torch.Tensor, antiexpert: torch.Tensor, alpha: float
) -> torch.Tensor:
    """Proxy-tuned logits, `base + alpha * (expert - antiexpert)` (Liu et al. 2024, section 2).

    The softmax of the result is `p_base * (p_expert / p_antiexpert) ** alpha`, normalised.

    Vocabularies are aligned by token id. Padding makes them unlike in size (Qwen2.5: 152064 for
    the large models, 151936 for the small ones). The result has the base's ids; one that the
    expert or the antiexpert lacks gets minus infinity, so that it is never generated: the formula
    has no value for it, and the member that lacks it could not read it back.

    Args:
        base: `[rows, base_vocab]`, any floating dtype.
        expert: `[rows, expert_vocab]`.
        antiexpert: `[rows, antiexpert_vocab]`.
        alpha: strength; 1.0 is the paper's, 0.0 gives the base.

    Returns:
        `[rows, base_vocab]`, float32: the sum is formed and kept there, whatever the inputs'
        dtype, because `expert - antiexpert` cancels most of both.
    """
    shared = min(base.shape[-1], expert.shape[-1], antiexpert.shape[-1])
    logits = torch.full_like(base, float("-inf"), dtype=torch.float32)
    known = logits[..., :shared]
    torch.sub(expert[..., :shared].float(), antiexpert[..., :shared].float(), out=known)
    known.mul_(alpha).add_(base[..., :shared])
    return logits
