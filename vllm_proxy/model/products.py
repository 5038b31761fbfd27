"""Products of hidden states and a head's weight, by platform and dtype."""

from collections.abc import Callable
from itertools import count

import torch
from torch import nn
from torch.nn.functional import linear
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.platforms import current_platform

CAST_BYTES = 2**22
"""How much of a weight is cast to float32 at a time where no product leaves in float32 by itself:
little enough to stay in cache, enough to hide the loop (found by trying on a CPU of two cores)."""

# What vLLM's own float32 head relies on.
MM_TO_FLOAT32 = current_platform.is_cuda() or current_platform.is_rocm()


def multiply_to_float32(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return `rows · weightᵀ` of bfloat16 or float16 operands as it leaves the accumulator."""
    return torch.mm(rows, weight.t(), out_dtype=torch.float32)


def has_bfloat16_tiles() -> bool:
    """Return whether this CPU multiplies tiles of bfloat16 into float32 (AMX)."""
    return torch.cpu._is_amx_tile_supported()


class PackedProduct:
    """`rows · weightᵀ` in float32 by vLLM's GEMM for CPUs, with the weight in its layout alone."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.layer = nn.Module()
        self.layer.weight = weight
        dispatch_cpu_unquantized_gemm(self.layer, remove_weight=True)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return `[R, V/T]` of `[R, H]`."""
        return self.layer.cpu_linear(rows, self.layer.weight, None)


_PRODUCTS = count()


def compiled_product(weight: nn.Parameter) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function of `[R, H]` and this weight, `multiply_to_float32`'s, compiled now.

    No library for CPUs has a bfloat16 product that leaves in float32, but Inductor's template of
    one does not round before its epilogue. It keeps the weight packed, and needs *weight* no more.
    """
    from torch._inductor import config

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return linear(rows, self.weight).float()

        # Dynamo keeps what it compiled by code: without guards, the next weight would get it.
        forward.__code__ = forward.__code__.replace(co_name=f"product_{next(_PRODUCTS)}")

    # Without guards: the weight is let go, one row is as good as many, and so is inference mode.
    options = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    product = torch.compile(Product(), dynamic=True, fullgraph=True, options=options)
    template = {"max_autotune": True, "max_autotune_gemm_backends": "CPP", "freezing": True}
    with torch.no_grad(), config.patch(**template):
        product(weight.new_zeros(2, weight.shape[1]))
    return lambda rows: product(rows.contiguous())  # as it was compiled


def compiled_row_product(
    weight: torch.Tensor,
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return a function of a float32 row and this weight, `row · weightᵀ` in float32, compiled now.

    One pass over a narrower weight, which is widened in registers: no library for CPUs without
    bfloat16 instructions has this product, and cast first, the weight is written and read again.
    """

    def multiply(row: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (weight.float() * row).sum(-1)

    compiled = torch.compile(multiply, dynamic=False, fullgraph=True)
    compiled(weight.new_zeros(weight.shape[1], dtype=torch.float32), weight)
    return compiled


def cast_and_multiply(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return `rows · weightᵀ` of float32 rows and a narrower weight, where hardware cannot mix.

    The weight is cast a few vocabulary rows at a time. On a CPU without bfloat16 instructions this
    is also faster than a bfloat16 product of more than a few rows.
    """
    product = rows.new_empty(rows.shape[0], weight.shape[0])
    step = max(1, CAST_BYTES // (rows.element_size() * weight.shape[1]))
    buffer = rows.new_empty(min(step, weight.shape[0]), weight.shape[1])
    for part, out in zip(weight.split(step), product.split(step, dim=1), strict=True):
        cast = buffer[: part.shape[0]].copy_(part)
        torch.mm(rows, cast.t(), out=out)
    return product
