"""Products of hidden states and a head's weight in float32: the fastest per platform and dtype."""

from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.platforms import current_platform

CAST_BYTES = 2**22
"""How much of a weight is cast to float32 at a time, where no product of narrow operands returns
float32. Small enough to stay in cache, large enough to hide the loop (measured on two cores)."""

# Where `torch.mm` has `out_dtype`; vLLM's own float32 head depends on it as well.
MM_TO_FLOAT32 = current_platform.is_cuda() or current_platform.is_rocm()


def multiply_to_float32(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return `rows · weightᵀ` of bfloat16 or float16 operands in float32, without rounding."""
    return torch.mm(rows, weight.t(), out_dtype=torch.float32)


def has_bfloat16_tiles() -> bool:
    """Return whether this CPU multiplies tiles of bfloat16 into float32 (AMX)."""
    return torch.cpu._is_amx_tile_supported()


class PackedProduct:
    """`rows · weightᵀ` in float32 by vLLM's GEMM for CPUs, which keeps only a packed weight."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.layer = nn.Module()
        self.layer.weight = weight
        dispatch_cpu_unquantized_gemm(self.layer, remove_weight=True)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return `[R, V/T]` of `[R, H]`."""
        return self.layer.cpu_linear(rows, self.layer.weight, None)


_PRODUCTS = count()


def compiled_product(weight: nn.Parameter) -> Callable[[torch.Tensor], torch.Tensor]:
    """Compile `multiply_to_float32` for this weight; returns a function of rows, `[R, H]`.

    No library for CPUs has a bfloat16 product that returns float32, but Inductor's template of one
    does not round before its epilogue. It keeps a packed weight and no longer needs *weight*.
    """
    from torch._inductor import config

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return linear(rows, self.weight).float()

        # Dynamo caches compiled code by code object. Without guards it would reuse this one, with
        # this weight, for the next weight; so each code object gets a name that no other has.
        forward.__code__ = forward.__code__.replace(co_name=f"product_{next(_PRODUCTS)}")

    # No guards: they would refer to the weight, which is freed, and would compile again for one row
    # and for inference mode, which run the same code.
    options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    product = torch.compile(Product(), dynamic=True, fullgraph=True, options=options)
    template: dict[str, Any] = {
        "max_autotune": True,
        "max_autotune_gemm_backends": "CPP",
        "freezing": True,
    }
    with torch.no_grad(), config.patch(**template):
        product(weight.new_zeros(2, weight.shape[1]))
    return lambda rows: product(rows.contiguous())  # the layout that it was compiled for


def compiled_row_product(
    weight: torch.Tensor,
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Compile `row · weightᵀ` in float32; returns a function of a float32 row and this weight.

    It reads the narrow weight once and widens it in registers. No library for CPUs without bfloat16
    instructions has this product, and a cast would write the weight and read it again.
    """

    def multiply(row: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (weight.float() * row).sum(-1)

    compiled = torch.compile(multiply, dynamic=False, fullgraph=True)
    compiled(weight.new_zeros(weight.shape[1], dtype=torch.float32), weight)
    return compiled


def cast_and_multiply(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return `rows · weightᵀ` of float32 rows and a narrower weight.

    The weight is cast, a few vocabulary rows at a time. On a CPU without bfloat16 instructions this
    is also faster than a bfloat16 product of more than a few rows.
    """
    product = rows.new_empty(rows.shape[0], weight.shape[0])
    step = max(1, CAST_BYTES // (rows.element_size() * weight.shape[1]))
    buffer = rows.new_empty(min(step, weight.shape[0]), weight.shape[1])
    for part, out in zip(weight.split(step), product.split(step, dim=1), strict=True):
        cast = buffer[: part.shape[0]].copy_(part)
        torch.mm(rows, cast.t(), out=out)
    return product
