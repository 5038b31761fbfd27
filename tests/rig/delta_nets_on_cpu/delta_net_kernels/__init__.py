"""vLLM's kernels for gated delta nets on a CPU, in plain torch, where tensors are in float32.

vLLM's (0.32) compute in bfloat16 only, so that no test could ask for exactness. In float32 the
three products are replaced; the convolution before them, the states and their blocks are vLLM's.
"""

from collections.abc import Callable
from functools import wraps
from types import ModuleType

import torch
from torch.nn.functional import softplus
from vllm.utils.torch_utils import LayerNameType


def register() -> None:
    """Replace the kernels, and let vLLM and `check` accept float32."""
    from vllm import _custom_ops
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention

    from vllm_proxy.model import kernels

    replace(_custom_ops, "fused_gdn_gating_cpu", gates, "a")
    replace(_custom_ops, "chunk_gated_delta_rule_cpu", prefill, "value")
    replace(_custom_ops, "fused_sigmoid_gating_delta_rule_update_cpu", decode, "v")
    gdn_attention.cpu_gdn_attention_core = core
    kernels.BFLOAT16_ON_CPU = frozenset()


def replace(module: ModuleType, name: str, ours: Callable, argument: str) -> None:
    """Have *ours* called instead of vLLM's where the argument of this name is in float32."""
    real = getattr(module, name)

    @wraps(real)
    def chosen(**arguments: object) -> object:
        return (ours if arguments[argument].dtype == torch.float32 else real)(**arguments)

    setattr(module, name, chosen)


def core(
    mixed_qkv: torch.Tensor,
    b: torch.Tensor,
    a: torch.Tensor,
    core_attn_out: torch.Tensor,
    layer_name: LayerNameType,
) -> None:
    """Run a layer as vLLM's operator does, without its refusal of float32."""
    from vllm.forward_context import get_forward_context
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention

    context = get_forward_context()
    layer = context.no_compile_layers[gdn_attention._resolve_layer_name(layer_name)]
    if not isinstance(context.attn_metadata, dict):
        return
    metadata = context.attn_metadata[layer.prefix]
    if metadata is not None and metadata.num_actual_tokens:
        gdn_attention._cpu_gdn_attention_nonspec(layer, metadata, mixed_qkv, b, a, core_attn_out)


def gates(
    A_log: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each token's decay and strength, `[tokens, heads]`: exp(g) and beta of the paper."""
    decay = (-A_log.float().exp() * softplus(a.float() + dt_bias.float())).exp()
    return decay, b.float().sigmoid()


def prefill(
    *,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    initial_state_indices: torch.Tensor,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Run chunks of prompts, token by token; `[1, tokens, heads, value size]`."""
    out = torch.empty_like(value)
    for i, slot in enumerate(initial_state_indices.tolist()):
        state = initial_state[slot : slot + 1]
        for t in range(int(cu_seqlens[i]), int(cu_seqlens[i + 1])):
            token = (x[:, t] for x in (query, key, value))
            out[:, t], state = delta_rule(state, *token, g[t : t + 1], beta[t : t + 1])
        initial_state[slot] = state[0]
    return out, None


def decode(
    *,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    initial_state_source: torch.Tensor,
    initial_state_indices: torch.Tensor,
    **_: object,
) -> torch.Tensor:
    """Run one token of each request; `[tokens, 1, heads, value size]`. Fit for a CUDA graph."""
    slots = initial_state_indices.long()
    token = q[0], k[0], v[0], *gates(A_log, a, b, dt_bias)
    out, states = delta_rule(initial_state_source[slots], *token)
    initial_state_source[slots] = states
    return out[:, None]


def delta_rule(
    state: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    strength: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what R requests read at one token, and their states after it.

    Yang et al. 2024 (Gated Delta Networks), equation 10.

    Args:
        state: `[R, heads, key size, value size]`.
        query: `[R, key heads, key size]`.
        key: as *query*.
        value: `[R, heads, value size]`.
        decay: `[R, heads]`.
        strength: `[R, heads]`.
    """
    times = value.shape[1] // key.shape[1]
    query, key = (
        (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)).repeat_interleave(times, dim=1)
        for x in (query, key)
    )
    state = state * decay[..., None, None]
    known = torch.einsum("rhkv,rhk->rhv", state, key)
    change = (value - known) * strength[..., None]
    state = state + key[..., None] * change[..., None, :]
    return torch.einsum("rhkv,rhk->rhv", state, query * query.shape[-1] ** -0.5), state
