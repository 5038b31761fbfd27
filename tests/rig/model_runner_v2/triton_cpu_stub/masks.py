"""Make up for one gap in Triton's interpreter.

`(a < b) & c` is an `int1` to Triton's compiler; the interpreter leaves it as wide as `c` and then
refuses it as a mask ("mask has unsupported dtype"). vLLM's n-gram kernels mask that way.
"""

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def accept_integer_masks() -> None:
    builder = InterpreterBuilder
    if getattr(builder, "accepts_integer_masks", False):
        return
    builder.accepts_integer_masks = True
    load, store = builder.create_masked_load, builder.create_masked_store
    builder.create_masked_load = lambda self, ptrs, mask, *rest: load(
        self, ptrs, _as_bool(mask), *rest
    )
    builder.create_masked_store = lambda self, ptrs, value, mask, *rest: store(
        self, ptrs, value, _as_bool(mask), *rest
    )


def _as_bool(mask: TensorHandle) -> TensorHandle:
    return TensorHandle(mask.data.astype(np.bool_), mask.dtype.scalar)
