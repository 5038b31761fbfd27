"""What inspection measures per row: the probability and rank of a token in four distributions.

Symbols: R rows; V ids that all members have; D the four distributions of base, expert, antiexpert
and proxy, in this order; k the number of most likely tokens to keep.
"""

from typing import NamedTuple

import torch

from vllm_proxy.model.fusion import log_softmax


class Measured(NamedTuple):
    """The measurements of R rows, on the device.

    Attributes:
        logprobs: `[R, D]`, float32: of the row's token; minus infinity if it is filtered out.
        ranks: `[R, D]`, int64: 1 + the number of more likely tokens.
        top_ids: `[R, D, k]`, int64, the most likely first.
        top_logprobs: `[R, D, k]`, float32.
        kl: `[R]`, float32: KL(proxy ‖ base), in nats.
    """

    logprobs: torch.Tensor
    ranks: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor
    kl: torch.Tensor


def measured(
    base: torch.Tensor,
    expert: torch.Tensor,
    antiexpert: torch.Tensor,
    proxy: torch.Tensor,
    tokens: torch.Tensor,
    k: int,
) -> Measured:
    """Measure R rows.

    Args:
        base: logits, `[R, V]`, finite.
        expert: the same of the expert.
        antiexpert: the same of the antiexpert.
        proxy: the fused logits; minus infinity for tokens that a filter removed.
        tokens: `[R]`, int64; a token beyond V has no probability.
        k: at most V.
    """
    known = tokens.clamp(max=base.shape[-1] - 1)[:, None]
    is_unknown = (tokens >= base.shape[-1])[:, None]
    logprobs, ranks, top_ids, top_logprobs = [], [], [], []
    base_logprobs = every = log_softmax(base)
    for index, logits in enumerate((base, expert, antiexpert, proxy)):
        every = log_softmax(logits) if index else every
        of_token = every.gather(-1, known).masked_fill_(is_unknown, float("-inf"))
        top = every.topk(k, dim=-1)
        logprobs.append(of_token.squeeze(-1))
        ranks.append((every > of_token).sum(-1) + 1)
        top_ids.append(top.indices)
        top_logprobs.append(top.values)
    proxy_logprobs = every
    shift = torch.where(proxy_logprobs.isfinite(), proxy_logprobs - base_logprobs, 0)
    kl = shift.mul_(proxy_logprobs.exp()).sum(-1).clamp_(min=0)  # only rounding makes it negative
    return Measured(
        torch.stack(logprobs, 1),
        torch.stack(ranks, 1),
        torch.stack(top_ids, 1),
        torch.stack(top_logprobs, 1),
        kl,
    )
