"""vLLM's int4 CPU kernel in plain torch, for CPUs that it is not compiled for.

vLLM compiles `cpu_gemm_wna16` for AVX512 (with or without AMX) only, and for float16 and bfloat16
only. On an older CPU everything of vLLM's is there but this one operator: configuration, loading,
repacking. This one takes its place, and computes in float32 whatever the dtype.
"""

import torch

SCHEMA = (
    "cpu_gemm_wna16(Tensor input, Tensor q_weight, Tensor(a2!) output, Tensor scales, "
    "Tensor? zeros, Tensor? bias, SymInt pack_factor, str isa_hint) -> ()"
)
BITS = 4
BLOCK = 16
"""Output channels that lie together in a packed weight."""
SYMMETRIC_ZERO = 8
"""Zero point of weights that come without."""


def register() -> None:
    """Make up for the operator, where it is missing, and for the dtype. A second call is a no-op.

    vLLM's GPTQ and AWQ configurations refuse float32, for the sake of the real kernels. Without it
    a test could not ask for exactness.
    """
    from vllm import _custom_ops  # noqa: F401 - loads what is compiled

    if hasattr(torch.ops._C, "cpu_gemm_wna16"):
        return
    library = torch.library.Library("_C", "FRAGMENT")
    library.define(SCHEMA)
    library.impl("cpu_gemm_wna16", cpu_gemm_wna16, "CPU")
    register.library = library  # unregisters its operators when it is collected

    from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig
    from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig

    for config in (AutoAWQConfig, AutoGPTQConfig):
        dtypes = [torch.float32, *config.get_supported_act_dtypes()]
        config.get_supported_act_dtypes = classmethod(lambda _, dtypes=dtypes: dtypes)


def cpu_gemm_wna16(
    input: torch.Tensor,
    q_weight: torch.Tensor,
    output: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    pack_factor: int,
    isa_hint: str,
) -> None:
    """Multiply by an int4 weight: `output = input @ ((q - zero) * scale) + bias`.

    K and N are the layer's input and output sizes, G its number of groups, of K / G inputs each.

    Args:
        input: `[tokens, K]`.
        q_weight: `[N / 16, K * 2]` int32: blocks of 16 outputs; a row of a block is the 16 nibbles
            of one input.
        output: `[tokens, N]`, written.
        scales: `[G, N]`.
        zeros: `[G, N / 8]` int32, outputs packed; None: 8.
        bias: `[N]` or None.
        pack_factor: nibbles an int32, 8.
        isa_hint: of the real kernel.
    """
    size_k, size_n = input.shape[1], scales.shape[1]
    rows = q_weight.view(size_n // BLOCK, size_k, BLOCK // pack_factor).permute(1, 0, 2)
    q = unpack(rows.reshape(size_k, size_n // pack_factor), pack_factor)
    zero = SYMMETRIC_ZERO if zeros is None else spread(unpack(zeros, pack_factor), size_k)
    weight = (q - zero).float() * spread(scales, size_k).float()
    product = input.float() @ weight
    output.copy_(product if bias is None else product + bias.float())


def unpack(packed: torch.Tensor, pack_factor: int) -> torch.Tensor:
    """`[rows, columns]` int32 to `[rows, columns * pack_factor]` nibbles, lowest bits first."""
    shifts = torch.arange(pack_factor) * BITS
    return ((packed.unsqueeze(-1) >> shifts) & (2**BITS - 1)).flatten(1)


def spread(groups: torch.Tensor, size_k: int) -> torch.Tensor:
    """`[G, N]` to `[K, N]`: a group's value for each of its inputs."""
    return groups.repeat_interleave(size_k // groups.shape[0], dim=0)
