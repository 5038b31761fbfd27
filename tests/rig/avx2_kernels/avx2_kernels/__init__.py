"""The same kernels of vLLM's on every x86 machine: those for AVX2.

On a CPU with AVX512 or AMX vLLM (0.32) loads others. Those for quantized weights refuse float32,
so that no test could ask for exactness, and those for several ranks gather no int64, which Model
Runner V2 needs.
"""

import torch


def activate() -> None:
    """Hide what a newer CPU has, before vLLM picks its kernels. No platform of its own."""
    for name in ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        setattr(torch.cpu, name, lambda: False)
