"""The largest logits stages that requests can cause, run once while vLLM measures memory.

vLLM sizes the KV cache by what a first run of the model leaves free. That run has no requests, so
it would not have the memory of per-request controls, inspections and drafts.
"""

import torch

from vllm_proxy.config.schema import Speculate
from vllm_proxy.model.controls import ExtraOps, LogitControls
from vllm_proxy.model.fusion import controlled_logits, controls_at
from vllm_proxy.model.head import ProxyHead
from vllm_proxy.model.measure import measured

PROMPT_ROWS = 1024
"""Most rows whose prompt logprobs vLLM computes at once."""
_WEIGHTED = LogitControls(1.0, 0.0, 0.0, start=0.3)  # not a power of two: see `FusedProduct`
_CONTROLLED = LogitControls(1.0, 0.0, 0.0, adaptive=1.0, top_p=0.9, plausibility=0.1)


def most_rows(requests: int, tokens: int, speculate: Speculate | None) -> int:
    """Return the most rows for which logits are computed at once.

    Args:
        requests: the most in a batch.
        tokens: the most in a batch.
        speculate: the engine's drafts.
    """
    drafts = 0
    if speculate is not None:
        drafts = speculate.tokens * min(requests, speculate.requests or requests)
    return max(min(requests + drafts, tokens), min(PROMPT_ROWS, tokens))


def rehearse(
    head: ProxyHead, hidden_states: torch.Tensor, rows: int, inspected: int, top_k: int
) -> None:
    """Compute logits in every way, and discard them.

    Args:
        head: whose weights are loaded.
        hidden_states: `[R, H]`, of any R > 0.
        rows: what `most_rows` returned.
        inspected: the most rows that are inspected at once.
        top_k: the most likely tokens that an inspection keeps, at most.
    """
    hidden_states = _repeated(hidden_states, rows)
    head(hidden_states, _rows_of(_WEIGHTED, hidden_states))
    extra_ops = ExtraOps.of([_CONTROLLED])
    head(hidden_states, _rows_of(_CONTROLLED, hidden_states), extra_ops)
    picked = _repeated(hidden_states, inspected)
    base, expert, antiexpert = head.by_role(picked)
    controls = _rows_of(_CONTROLLED, picked)
    proxy = controlled_logits(base, expert, antiexpert, controls, extra_ops)
    tokens = torch.zeros(inspected, dtype=torch.int64, device=picked.device)
    measured(base, expert, antiexpert, proxy, tokens, min(top_k, proxy.shape[-1]))


def _repeated(hidden_states: torch.Tensor, rows: int) -> torch.Tensor:
    every = torch.arange(rows, device=hidden_states.device)
    return hidden_states[every % len(hidden_states)]


def _rows_of(control: LogitControls, hidden_states: torch.Tensor) -> torch.Tensor:
    """Return a row of controls for each of *hidden_states*, `[rows, NUM_CONTROLS]`."""
    rows = len(hidden_states)
    table = torch.tensor([control] * rows, dtype=torch.float32, device=hidden_states.device)
    return controls_at(table, table.new_zeros(rows))
