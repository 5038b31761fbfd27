"""All members' heads as one product: the fast form of `fusion.fuse` for plain LM heads."""

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
"""Most rows whose halves are multiplied at once, to bound the memory of prompt logprobs."""

FEW_ROWS = 2
"""Up to this many rows, the compiled product of one row, if there is one, is faster than casting
the weight."""


class FusedProduct(nn.Module):
    """One product over the hidden states of all members, in float32.

    Its weight `[V/T, H]` is the only copy. The members' head weights become column slices of it
    before they are loaded, and so does an embedding that is tied to a head. On a CPU in float32,
    vLLM's GEMM packs the weight into its own layout, and this copy is freed.

    In bfloat16 (or float16) the weighted hidden states are multiplied as the sum of two halves, a
    high and a low one. They keep 16 bits, so the weights do not cost precision. Weights that are
    powers of two need no low half.

    On a CPU in those dtypes, *may_compile* allows compiled code. With bfloat16 tiles (AMX) the same
    product is compiled, and its weight is packed. On other CPUs a product for few rows is compiled,
    which widens the weight in registers. Without it, the weight is cast piece by piece.

    Members that share a head share its columns: their weighted hidden states are added first. The
    sum needs both halves for any weights.

    A packed weight can only be multiplied whole. If one member must also be computed separately
    (drafting), each head's columns are packed on their own and the products are added.

    Args:
        projections: the distinct heads, in the order of their columns.
        heads: for each member, the index of its head.
        coefficients: for each member, its weight in the engine's default sum.
        packs_separately: whether to pack each head's columns on their own.
        may_compile: see above.
    """

    def __init__(
        self,
        projections: Sequence[Projection],
        heads: Sequence[int],
        coefficients: Sequence[float],
        *,
        packs_separately: bool = False,
        may_compile: bool = False,
    ) -> None:
        super().__init__()
        self.packs_separately = packs_separately
        self.may_compile = may_compile
        weights = [projection.layer.weight for projection in projections]
        sizes = [weight.shape[1] for weight in weights]  # H of each head
        self.heads = heads
        self.is_shared = len(heads) > len(sizes)
        self.sizes = [sizes[head] for head in heads]  # H of each member
        # frexp's mantissa is 0.5 for powers of two, which only change an exponent.
        is_exact = all(c == 0 or abs(math.frexp(c)[0]) == 0.5 for c in coefficients)
        self.exact = is_exact and not self.is_shared
        # Each hidden unit's member, and from it the weight that it is multiplied by.
        member_of_column = torch.arange(len(heads)).repeat_interleave(torch.tensor(self.sizes))
        self.register_buffer("member_of_column", member_of_column, persistent=False)
        scale = torch.tensor(coefficients, dtype=torch.float32)[member_of_column]
        self.register_buffer("scale", scale, persistent=False)
        # A slice of columns for each head: the heads' weights are loaded into it.
        self.weight = nn.Parameter(
            weights[0].new_empty(weights[0].shape[0], sum(sizes)), requires_grad=False
        )
        self.is_narrow = self.weight.dtype != torch.float32
        self.size = self.weight.shape[0]
        ends = list(accumulate(sizes))
        self.heads_columns = [slice(e - size, e) for e, size in zip(ends, sizes, strict=True)]
        self.packed_columns = self.heads_columns if packs_separately else [slice(0, ends[-1])]
        # `finish` sets these once the weights are loaded: packed columns, and a product of one row.
        self.packed: list[Callable[[torch.Tensor], torch.Tensor]] = []
        self.row_product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
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
        """Return `[R, V/T]`, float32, of `[R, H]`; *coefficients*: `[R, M]`, or the default sum."""
        if coefficients is None:
            return self._multiply(self._by_head(hidden_states * self.scale), exact=self.exact)
        weighted = hidden_states * coefficients[:, self.member_of_column]
        return self._multiply(self._by_head(weighted), exact=False)

    def _by_head(self, rows: torch.Tensor) -> torch.Tensor:
        """Return `[R, columns of the weight]` of `[R, H]`: members that share a head are added."""
        if not self.is_shared:
            return rows
        sums: dict[int, torch.Tensor] = {}
        for head, part in zip(self.heads, rows.split(self.sizes, dim=1), strict=True):
            sums[head] = sums[head] + part if head in sums else part
        return torch.cat([sums[head] for head in sorted(sums)], dim=1)

    def members(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the logits of each member, `[M, R, V/T]`, float32, of `[R, H]`.

        One member's logits are a weighted sum too, so these are further rows of the one product,
        which reads every weight once. If the columns were packed separately, they are multiplied
        separately.
        """
        if self.packs_separately and self.packed:
            parts = hidden_states.split(self.sizes, dim=1)
            return torch.stack([self.member_logits(i, part) for i, part in enumerate(parts)])
        members = torch.arange(len(self.heads), device=hidden_states.device)
        selects = members[:, None, None] == self.member_of_column  # [M, 1, H]
        rows = self._by_head((hidden_states.float() * selects).flatten(0, 1))
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
        """Return the powers of two, `[R, 1]`, by which rows are too large for the weight's dtype.

        None in bfloat16, which has the range of float32. float16 ends at 65504, which hidden states
        times an alpha of a thousand may exceed.
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
        """Return one member's logits, `[R, V/T]`, of the hidden states of that member only."""
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
        pack: Callable[[nn.Parameter], Callable[[torch.Tensor], torch.Tensor]] | None = None
        if not self.is_narrow:
            pack = PackedProduct
        elif self.may_compile and self.weight.dtype == torch.bfloat16 and has_bfloat16_tiles():
            pack = compiled_product
        elif self.may_compile and self.row_product is None:
            self.row_product = compiled_row_product(self.weight)
        if pack is None:
            return
        for columns in self.packed_columns:
            part = self.weight[:, columns].contiguous()
            self.packed.append(pack(nn.Parameter(part, requires_grad=False)))
        self.weight.data = self.weight.new_empty(0)
        for head in self.columns:
            head.keep_embedding_only()

    def unpack(self) -> None:
        """Undo `finish`, so that the members' loaders can write to the weight again.

        A packed product with the identity is the weight, exactly: each sum has one term that is not
        zero.
        """
        if not self.packed:
            return
        sizes = [columns.stop - columns.start for columns in self.heads_columns]
        weight = self.weight.new_empty(self.size, sum(sizes))
        for product, columns in zip(self.packed, self.packed_columns, strict=True):
            part = weight[:, columns]
            units = torch.eye(part.shape[1], dtype=weight.dtype)
            for rows, out in zip(
                units.split(SPLIT_ROWS), part.split(SPLIT_ROWS, dim=1), strict=True
            ):
                out.copy_(product(rows).t())
        self.packed.clear()
        self.weight.data = weight
        for head, its_columns in zip(self.columns, weight.split(sizes, dim=1), strict=True):
            head.weight.data = its_columns

    def give_back(self) -> None:
        """Return the weights to the members, which compute their own logits again."""
        for columns in self.columns:
            columns.give_back()


class _Columns:
    """One head's columns of the fused weight, which replace the head's own weight."""

    def __init__(
        self, weight: nn.Parameter, columns: torch.Tensor, owners: list[VocabParallelEmbedding]
    ) -> None:
        self.weight = weight
        self.embedding: torch.Tensor | None = None
        self.methods = [(owner, owner.quant_method) for owner in owners]
        weight.data = columns
        for owner in owners:
            owner.quant_method = _ColumnsMethod()
            owner.use_fused_embedding = False  # its kernel needs contiguous rows

    def keep_embedding_only(self) -> None:
        if all(isinstance(owner, ParallelLMHead) for owner, _ in self.methods):
            self.weight.data = self.weight.new_empty(0)
            return
        if self.embedding is None:
            self.embedding = self.weight.data.clone(memory_format=torch.contiguous_format)
        else:  # loaded again: captured graphs read this memory
            self.embedding.copy_(self.weight.data)
        self.weight.data = self.embedding

    def give_back(self) -> None:
        self.weight.data = self.weight.data.clone(memory_format=torch.contiguous_format)
        for owner, method in self.methods:
            owner.quant_method = method


class _FusedMethod(UnquantizedEmbeddingMethod):
    """vLLM calls this for each layer after loading; it is how `finish` gets called."""

    def process_weights_after_loading(self, layer: FusedProduct) -> None:
        layer.finish()


class _ColumnsMethod(UnquantizedEmbeddingMethod):
    """Keeps vLLM from packing a copy of a head for a product that is never computed."""

    def process_weights_after_loading(self, layer: VocabParallelEmbedding) -> None:
        pass
