"""All members' heads as one product."""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import nn
from torch.nn.functional import linear
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.platforms import current_platform

from vllm_proxy.model.products import (
    MM_TO_FLOAT32,
    PackedProduct,
    cast_and_multiply,
    compiled_product,
    compiled_row_product,
    has_bfloat16_tiles,
    multiply_to_float32,
)
from vllm_proxy.model.projection import Projection, owners_of_weight

SPLIT_ROWS = 512
"""Most rows whose halves are multiplied at once: bounds the memory of prompt logprobs."""

FEW_ROWS = 2
"""Rows for which the compiled product of a row, where there is one, beats casting the weight."""


class FusedProduct(nn.Module):
    """One product over the hidden states of all members, in float32.

    Its weight `[V/T, H]` is the only copy: the members' head weights are made column slices of it
    before they are loaded, and so is an embedding that is tied to a head. On a CPU in float32,
    vLLM's GEMM keeps the weight in a layout of its own, and this one is let go.

    In bfloat16 (or float16) the weighted hidden states are multiplied as a sum of two halves, high
    and low: the weight is exact to 16 bits, and a strength costs no precision. Weights that are
    powers of two need no low half.

    On a CPU in those dtypes, code is compiled if *may_compile*: where there are bfloat16 tiles
    (AMX), for the same product, with the weight in a layout of its own; elsewhere for few rows,
    widening the weight on the way. Without it the weight is cast piece by piece.

    Members with one head share its columns: their weighted hidden states are added before. The sum
    takes both halves, whatever the weights.

    A weight in a layout of its own is all or nothing. So if a member is to be multiplied *apart*,
    each member's columns are packed for themselves, and their products are added.
    """

    def __init__(
        self,
        projections: Sequence[Projection],
        heads: Sequence[int],
        coefficients: Sequence[float],
        *,
        apart: bool = False,
        may_compile: bool = False,
    ) -> None:
        super().__init__()
        self.apart, self.may_compile = apart, may_compile
        weights = [projection.layer.weight for projection in projections]
        sizes = [weight.shape[1] for weight in weights]
        self.heads, self.is_shared = heads, len(heads) > len(sizes)
        self.sizes = [sizes[head] for head in heads]
        is_exact = all(c == 0 or abs(math.frexp(c)[0]) == 0.5 for c in coefficients)
        self.exact = is_exact and not self.is_shared
        member_of_column = torch.arange(len(heads)).repeat_interleave(torch.tensor(self.sizes))
        self.register_buffer("member_of_column", member_of_column, persistent=False)
        scale = torch.tensor(coefficients, dtype=torch.float32)[member_of_column]
        self.register_buffer("scale", scale, persistent=False)
        self.weight = nn.Parameter(
            weights[0].new_empty(weights[0].shape[0], sum(sizes)), requires_grad=False
        )
        self.is_narrow = self.weight.dtype != torch.float32
        self.size = self.weight.shape[0]
        ends = list(accumulate(sizes))
        self.heads_columns = [slice(e - size, e) for e, size in zip(ends, sizes, strict=True)]
        self.packed_columns = self.heads_columns if apart else [slice(0, ends[-1])]
        self.packed: list[Callable[[torch.Tensor], torch.Tensor]] = []
        self.row_product = None
        self.quant_method = _FusedMethod()
        self.columns = tuple(
            _Columns(weight, columns, owners_of_weight(projection.member, weight))
            for projection, weight, columns in zip(
                projections, weights, self.weight.data.split(sizes, dim=1), strict=True
            )
        )

    def forward(
        self, hidden_states: torch.Tensor, coefficients: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return `[R, V/T]`, float32, of `[R, H]`; *coefficients*: `[R, M]`, or the engine's."""
        if coefficients is None:
            return self._multiply(self._by_head(hidden_states * self.scale), exact=self.exact)
        weighted = hidden_states * coefficients[:, self.member_of_column]
        return self._multiply(self._by_head(weighted), exact=False)

    def _by_head(self, rows: torch.Tensor) -> torch.Tensor:
        """Return `[R, columns of the weight]` of `[R, H]`, members with one head added."""
        if not self.is_shared:
            return rows
        sums: dict[int, torch.Tensor] = {}
        for head, part in zip(self.heads, rows.split(self.sizes, dim=1), strict=True):
            sums[head] = sums[head] + part if head in sums else part
        return torch.cat([sums[head] for head in sorted(sums)], dim=1)

    def members(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the members' own logits, `[M, R, V/T]`, float32, of `[R, H]`.

        A member alone is a weighted sum as well, so these are rows of the one product, which reads
        every weight once. (A packed weight cannot be multiplied by columns, unless they were packed
        apart.)
        """
        if self.apart and self.packed:
            parts = hidden_states.split(self.sizes, dim=1)
            return torch.stack([self.member_logits(i, part) for i, part in enumerate(parts)])
        members = torch.arange(len(self.heads), device=hidden_states.device)
        is_own = members[:, None, None] == self.member_of_column  # [M, 1, H]
        rows = self._by_head((hidden_states.float() * is_own).flatten(0, 1))
        return self._multiply(rows, exact=True).unflatten(0, (len(self.heads), -1))

    def _multiply(self, rows: torch.Tensor, *, exact: bool) -> torch.Tensor:
        """Return `[R, V/T]` of `[R, H]`; *exact*: whether the weight's dtype holds these values."""
        if not self.is_narrow:
            return self._multiply_packed(rows) if self.packed else linear(rows, self.weight)
        if not self.packed and not MM_TO_FLOAT32:
            if self.row_product is not None and len(rows) <= FEW_ROWS:
                return torch.stack([self.row_product(row, self.weight) for row in rows])
            return cast_and_multiply(rows, self.weight)
        excess = self._excess(rows)
        if excess is not None:
            rows = rows.ldexp(-excess)
        if exact:
            product = self._multiply_narrow(rows.to(self.weight.dtype))
        else:
            product = self._multiply_halves(rows)
        return product if excess is None else product.ldexp_(excess)

    def _excess(self, rows: torch.Tensor) -> torch.Tensor | None:
        """Return by which powers of two, `[R, 1]`, rows are too large for the weight's dtype.

        None in bfloat16, which ends where float32 does. float16 ends at 65504, which a strength of
        a thousand may exceed.
        """
        if self.weight.dtype != torch.float16:
            return None
        exponents = rows.abs().amax(-1, keepdim=True).float().frexp().exponent
        return (exponents - 15).clamp_(min=0)

    def _multiply_narrow(self, rows: torch.Tensor) -> torch.Tensor:
        """Return `[R, V/T]`, as it leaves the accumulator, of rows in the weight's dtype."""
        if self.packed:
            return self._multiply_packed(rows)
        return multiply_to_float32(rows, self.weight)

    def _multiply_packed(self, rows: torch.Tensor) -> torch.Tensor:
        first, *others = (
            product(rows[:, columns])
            for product, columns in zip(self.packed, self.packed_columns, strict=True)
        )
        for other in others:
            first += other
        return first

    def member_logits(self, member: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return one member's logits, `[R, V/T]`, of its own hidden states; see *apart*."""
        if self.packed:
            return self.packed[self.heads[member]](hidden_states)
        weight = self.weight[:, self.heads_columns[self.heads[member]]]
        if not self.is_narrow:
            return linear(hidden_states, weight)
        if MM_TO_FLOAT32:
            return multiply_to_float32(hidden_states, weight)
        return cast_and_multiply(hidden_states.float(), weight)

    def _multiply_halves(self, rows: torch.Tensor) -> torch.Tensor:
        """Return `[R, V/T]` of float32 rows and a bfloat16 or float16 weight.

        A row is the sum of two halves of the weight's dtype, which keep 16 of its 24 bits (22, in
        float16). The halves are rows of one product, so the weight is read once.
        """
        product = rows.new_empty(rows.shape[0], self.size)
        for part, out in zip(rows.split(SPLIT_ROWS), product.split(SPLIT_ROWS), strict=True):
            high = part.to(self.weight.dtype)
            low = (part - high).to(self.weight.dtype)
            halves = self._multiply_narrow(torch.cat([high, low]))
            torch.add(*halves.chunk(2), out=out)
        return product

    def finish(self) -> None:
        """Get ready to multiply as fast as the platform can, once the weight is loaded."""
        if not current_platform.is_cpu():
            return
        pack = None
        if not self.is_narrow:
            pack = PackedProduct
        elif self.may_compile and self.weight.dtype == torch.bfloat16 and has_bfloat16_tiles():
            pack = compiled_product
        elif self.may_compile:
            self.row_product = compiled_row_product(self.weight)
        if pack is None:
            return
        for columns in self.packed_columns:
            own = self.weight[:, columns].contiguous()
            self.packed.append(pack(nn.Parameter(own, requires_grad=False)))
        self.weight.data = self.weight.new_empty(0)
        for columns in self.columns:
            columns.keep_embedding_only()

    def give_back(self) -> None:
        """Let the members compute their logits themselves, with weights of their own again."""
        for columns in self.columns:
            columns.give_back()


class _Columns:
    """One member's part of the fused weight, in the place of its own."""

    def __init__(
        self, weight: nn.Parameter, columns: torch.Tensor, owners: list[VocabParallelEmbedding]
    ) -> None:
        self.weight = weight
        self.methods = [(owner, owner.quant_method) for owner in owners]
        weight.data = columns
        for owner in owners:
            owner.quant_method = _ColumnsMethod()
            owner.use_fused_embedding = False  # its kernel wants rows without gaps

    def keep_embedding_only(self) -> None:
        if all(isinstance(owner, ParallelLMHead) for owner, _ in self.methods):
            self.weight.data = self.weight.new_empty(0)
        else:
            self.weight.data = self.weight.data.clone(memory_format=torch.contiguous_format)

    def give_back(self) -> None:
        self.weight.data = self.weight.data.clone(memory_format=torch.contiguous_format)
        for owner, method in self.methods:
            owner.quant_method = method


class _FusedMethod(UnquantizedEmbeddingMethod):
    """Tells vLLM, which calls this on every layer once all weights are there, to finish ours."""

    def process_weights_after_loading(self, layer: FusedProduct) -> None:
        layer.finish()


class _ColumnsMethod(UnquantizedEmbeddingMethod):
    """Keeps vLLM from making a copy of a head for a product that will not be asked for."""

    def process_weights_after_loading(self, layer: VocabParallelEmbedding) -> None:
        pass
