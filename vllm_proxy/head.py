"""From the members' hidden states to fused logits.

LM heads are linear, so their weighted sum is one product:

    w_b W_b h_b + w_e W_e h_e + w_a W_a h_a  =  [W_b | W_e | W_a] · [w_b h_b ; w_e h_e ; w_a h_a]

It reads every weight once, as three heads do, but forms the sum in the accumulator, rounds it once,
writes one `[rows, vocab]` tensor instead of three, and gathers one under tensor parallelism.

A head that is more than a product (quantized, with a bias, a soft cap, a logit scale) is computed
by its member, and the members' logits are added in float32.

Where the expert or the antiexpert is missing, the base plays its part: its weight is added to the
base's, and there are two members' columns.

Symbols: R rows; M members; H their hidden sizes added up; V the base's vocabulary size, padded; V/T
the part of it on one of T tensor-parallel ranks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, count

import torch
from torch import nn
from torch.nn.functional import linear
from vllm import envs
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
    VocabParallelEmbeddingShardIndices,
)
from vllm.platforms import current_platform

from vllm_proxy.arithmetic import controlled_logits, proxy_logits
from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.request import NO_DEMANDS, Demands, Row
from vllm_proxy.config.roles import ROLES, Role

logger = init_logger(f"vllm.{__name__}")

SPLIT_ROWS = 512
"""Most rows whose halves are multiplied at once: bounds the memory of prompt logprobs."""
CONTROLLED_ROWS = 128
"""Most rows whose members' logits are held at once, where a weighted sum is not enough."""
FEW_ROWS = 2
"""Rows for which the compiled product of a row, where there is one, beats casting the weight."""
CAST_BYTES = 2**22
"""How much of a weight is cast to float32 at a time where no product leaves in float32 by itself:
little enough to stay in cache, enough to hide the loop (found by trying on a CPU of two cores)."""


class ProxyHead(nn.Module):
    """Fused logits of one tensor-parallel rank, and their gathering.

    Takes over the members' own heads: their weights become columns of one, and their shards of the
    vocabulary become the base's. Members that are one module have one head.
    """

    def __init__(
        self,
        members: Mapping[Role, nn.Module],
        hidden_sizes: Sequence[int],
        vocab_sizes: Mapping[Role, int],
        default: Row,
        *,
        apart: Role | None = None,
        may_compile: bool = False,
    ) -> None:
        super().__init__()
        projections: dict[nn.Module, Projection] = {}
        for (role, member), size in zip(members.items(), hidden_sizes, strict=True):
            if member not in projections:
                projections[member] = Projection(role, member, size)
        layer = projections[members["base"]].layer
        self.heads = [list(projections).index(member) for member in members.values()]
        self.hidden_sizes = list(hidden_sizes)
        self.vocab_size = vocab_sizes["base"]
        self.tp_size = layer.tp_size
        self.rows = layer.num_embeddings_per_partition
        # Ids from here on are padding, or unknown to a member: never generated.
        self.shared = min(vocab_sizes.values())
        self.start = layer.shard_indices.padded_org_vocab_start_index
        self.known = min(max(self.shared - self.start, 0), self.rows)
        self.projections = tuple(projections.values())  # a tuple: these modules are the members'
        self.roles = roles = list(members)
        # Which of the members plays each of `ROLES`.
        self.players = [roles.index(role if role in roles else "base") for role in ROLES]
        coefficients = torch.tensor(default.coefficients, dtype=torch.float32)
        self.register_buffer("coefficients", coefficients, persistent=False)
        for projection in self.projections:
            align_shard(projection, layer)
        self.product = None
        if reasons := self._obstacles():
            logger.info_once("Logits: one head a member, combined in float32 (%s)", reasons)
        else:
            weights = self._by_member(coefficients).tolist()
            self.product = FusedProduct(
                self.projections,
                self.heads,
                weights,
                apart=apart is not None,
                may_compile=may_compile,
            )
            logger.info_once("Logits: one product over %s hidden units", sum(hidden_sizes))

    def _obstacles(self) -> str:
        reasons = [reason for p in self.projections if (reason := p.obstacle())]
        if envs.VLLM_BATCH_INVARIANT:
            reasons.append("VLLM_BATCH_INVARIANT is set")
        if not reasons and len({p.layer.weight.dtype for p in self.projections}) > 1:
            reasons.append("heads of unlike dtype")
        return "; ".join(reasons)

    def weights_loaded(self) -> None:
        """Take note of what only the checkpoints told: some model classes add a bias then."""
        if self.product is not None and (reasons := self._obstacles()):
            self.separate(reasons)

    def separate(self, reasons: str) -> None:
        """Leave the fused product, and combine the members' own logits from now on."""
        self.product.give_back()
        self.product = None
        logger.info("Logits: one head a member after all, combined in float32 (%s)", reasons)

    def forward(
        self,
        hidden_states: torch.Tensor,
        controls: torch.Tensor | None = None,
        demands: Demands = NO_DEMANDS,
        *,
        gather: bool = True,
    ) -> torch.Tensor | None:
        """Fuse logits.

        Args:
            hidden_states: `[R, H]`, the members' side by side.
            controls: `[R, CONTROLS]`, float32, as in `arithmetic.controlled_logits`; None for the
                engine's constant weights everywhere.
            demands: what some row asks for beside a weighted sum.
            gather: whether to put the ranks' parts of the vocabulary together.

        Returns:
            Float32: `[R, vocab]` if gathered (None on ranks that vLLM's gather leaves without),
            `[R, V/T]` if not.
        """
        if controls is None or not any(demands):
            coefficients = None if controls is None else controls[:, :3]
            logits = self._weighted(hidden_states, coefficients)
        else:
            logits = hidden_states.new_empty(len(hidden_states), self.rows, dtype=torch.float32)
            inputs_and_output = hidden_states, controls, logits
            for part in zip(*(t.split(CONTROLLED_ROWS) for t in inputs_and_output), strict=True):
                self._controlled(*part, demands)
        return self._finished(logits, gather=gather)

    def _finished(self, logits: torch.Tensor, *, gather: bool = True) -> torch.Tensor | None:
        """Leave out, of `[R, V/T]`, what is never generated; *gather*: see `forward`."""
        logits[:, self.known :] = float("-inf")
        if not gather:
            return logits
        if self.tp_size > 1:
            logits = self.projections[0].processor._gather_logits(logits)
        return logits if logits is None else logits[:, : self.vocab_size]

    def alone(self, role: Role, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return what *role* by itself gives, `[R, vocab]` as `forward` does; for drafting.

        Args:
            role: a member, the one that `apart` named when this was made.
            hidden_states: `[R, H]`, H that member's own.
        """
        member = self.roles.index(role)
        if self.product is not None:
            logits = self.product.alone(member, hidden_states)
        else:
            logits = self.projections[self.heads[member]].member.compute_logits(hidden_states)
            logits = logits[:, : self.rows].float()
        return self._finished(logits)

    def _weighted(
        self, hidden_states: torch.Tensor, coefficients: torch.Tensor | None
    ) -> torch.Tensor:
        """Return `[R, V/T]`: the members' logits, weighed and added."""
        if self.product is not None:
            if coefficients is not None:
                coefficients = self._by_member(coefficients)
            return self.product(hidden_states, coefficients)
        logits = self._of_heads(hidden_states)
        return proxy_logits(
            *(logits[member] for member in self.players),
            self.coefficients if coefficients is None else coefficients,
        )

    def _of_heads(self, hidden_states: torch.Tensor) -> list[torch.Tensor]:
        """Return what each member's own head gives, `[R, V/T]` (quantized heads: their width)."""
        parts = hidden_states.split(self.hidden_sizes, dim=-1)
        return [
            self.projections[head].member.compute_logits(part)
            for head, part in zip(self.heads, parts, strict=True)
        ]

    def _by_member(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Return `[…, M]` of `[…, 3]`: each member's weights in all the roles it plays, added."""
        if len(self.heads) == len(ROLES):
            return coefficients
        weights = [0.0] * len(self.heads)
        for member, weight in zip(self.players, coefficients.unbind(-1), strict=True):
            weights[member] = weights[member] + weight
        return torch.stack(weights, dim=-1)

    def _controlled(
        self,
        hidden_states: torch.Tensor,
        controls: torch.Tensor,
        out: torch.Tensor,
        demands: Demands,
    ) -> None:
        """Fuse, into *out* `[R, V/T]`, by what takes sums over the vocabulary of each member."""
        logits = controlled_logits(*self.by_role(hidden_states), controls, demands)
        out[:, : self.known] = logits[:, self.start : self.start + self.known]

    def by_role(self, hidden_states: torch.Tensor) -> list[torch.Tensor]:
        """Return the logits of base, expert and antiexpert, on every tensor-parallel rank.

        Args:
            hidden_states: `[R, H]`, of few enough rows that all of this fits.

        Returns:
            Three, each `[R, ids that all members have]`, float32; the base's for a missing one.
        """
        if self.product is not None:
            logits = self.product.members(hidden_states)
        else:
            width = self.known if self.tp_size == 1 else self.rows
            logits = torch.stack([own[:, :width].float() for own in self._of_heads(hidden_states)])
        if self.tp_size > 1:
            logits = tensor_model_parallel_all_gather(logits)
        return [logits[member, :, : self.shared] for member in self.players]


class Projection:
    """How one member gets from hidden states to logits.

    Found by asking the member: its `compute_logits` is run with a recorder in the place of its
    `LogitsProcessor`, so no model class needs to be known here.
    """

    def __init__(self, role: Role, member: nn.Module, hidden_size: int) -> None:
        self.role, self.member = role, member
        found = [
            (parent, name, child)
            for parent in member.modules()
            for name, child in parent.named_children()
            if isinstance(child, LogitsProcessor)
        ]
        if len(found) != 1:
            raise ProxyConfigError(
                f"{role}: {type(member).__name__} has {len(found)} logits processors, not one; "
                "use a model with one LM head"
            )
        parent, name, self.processor = found[0]
        recorder = _Recorder()
        setattr(parent, name, recorder)
        hidden_states = torch.empty(1, hidden_size)
        logits = member.compute_logits(hidden_states)
        self.layer, given, self.bias = recorder.arguments
        # Whether the member does nothing else before or after.
        self.is_direct = given is hidden_states and logits is recorder.logits
        setattr(parent, name, _LocalProcessor(self.processor))

    @property
    def is_quantized(self) -> bool:
        """Whether the head has something else than a plain weight."""
        plain = UnquantizedEmbeddingMethod | UnquantizedLinearMethod
        return not isinstance(self.layer.quant_method, plain)

    def obstacle(self) -> str | None:
        """Return why this is not a mere product with a weight, or None."""
        dtypes = None, torch.float32, self.layer.params_dtype  # the product leaves in float32
        for reason, found in {
            "quantized": self.is_quantized,
            "a bias": self.bias is not None or getattr(self.layer, "bias", None) is not None,
            "a soft cap": self.processor.soft_cap is not None,
            "a logit scale": self.processor.scale != 1.0,
            f"in {self.processor.head_dtype}": self.processor.head_dtype not in dtypes,
            "its model's own": not self.is_direct,
        }.items():
            if found:
                return f"{self.role}'s head: {reason}"
        return None


class _Recorder(nn.Module):
    def forward(
        self,
        lm_head: VocabParallelEmbedding,
        hidden_states: torch.Tensor,
        embedding_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.arguments = lm_head, hidden_states, embedding_bias
        self.logits = torch.empty(1, 1)
        return self.logits


class _LocalProcessor(nn.Module):
    """A member's `LogitsProcessor` that leaves gathering to `ProxyHead`, which does it once."""

    def __init__(self, processor: LogitsProcessor) -> None:
        super().__init__()
        self.processor = processor

    def forward(
        self,
        lm_head: VocabParallelEmbedding,
        hidden_states: torch.Tensor,
        embedding_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.processor(lm_head, hidden_states, embedding_bias, skip_gather=True)


def align_shard(projection: Projection, base: VocabParallelEmbedding) -> None:
    """Give a head the base's shard of the vocabulary, whatever its own size of it.

    Before weights are loaded: vLLM's loader reads by `shard_indices`, and so does the embedding
    that is tied to the head.

    Raises:
        ProxyConfigError: the head is quantized, and its rows cannot be moved.
    """
    layer, shard = projection.layer, base.shard_indices
    if layer.shard_indices == shard:
        return
    if projection.is_quantized:
        if layer.tp_size == 1:
            return  # combined by its first columns
        raise ProxyConfigError(
            f"{projection.role}: a quantized head of {layer.org_vocab_size} ids cannot be split "
            f"over ranks like the base's of {base.org_vocab_size}; use tensor_parallel_size 1, or "
            "a checkpoint whose head is not quantized"
        )
    size = layer.org_vocab_size
    start, end = shard.padded_org_vocab_start_index, shard.padded_org_vocab_end_index
    indices = VocabParallelEmbeddingShardIndices(
        padded_org_vocab_start_index=start,
        padded_org_vocab_end_index=end,
        padded_added_vocab_start_index=size,
        padded_added_vocab_end_index=size,
        org_vocab_start_index=min(start, size),
        org_vocab_end_index=min(end, size),
        added_vocab_start_index=size,
        added_vocab_end_index=size,
    )
    rows = base.num_embeddings_per_partition
    owners = _owners(projection.member, layer.weight)
    for parameter in layer.parameters(recurse=False):  # weight and bias
        parameter.data = parameter.new_empty(rows, *parameter.shape[1:])
    for owner in owners:
        owner.shard_indices = indices
        owner.num_embeddings_per_partition = rows


def _owners(member: nn.Module, weight: nn.Parameter) -> list[VocabParallelEmbedding]:
    """Return the layers with this weight: a head, and the embedding tied to it."""
    layers = (m for m in member.modules() if isinstance(m, VocabParallelEmbedding))
    return [layer for layer in layers if getattr(layer, "weight", None) is weight]


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
            _Columns(weight, columns, _owners(projection.member, weight))
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
            return torch.stack([self.alone(i, part) for i, part in enumerate(parts)])
        members = torch.arange(len(self.heads), device=hidden_states.device)
        is_own = members[:, None, None] == self.member_of_column  # [M, 1, H]
        rows = self._by_head((hidden_states.float() * is_own).flatten(0, 1))
        return self._multiply(rows, exact=True).unflatten(0, (len(self.heads), -1))

    def _multiply(self, rows: torch.Tensor, *, exact: bool) -> torch.Tensor:
        """Return `[R, V/T]` of `[R, H]`; *exact*: whether the weight's dtype holds these values."""
        if not self.is_narrow:
            return self._multiply_packed(rows) if self.packed else linear(rows, self.weight)
        if not self.packed and not _MM_TO_FLOAT32:
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

    def alone(self, member: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return one member's logits, `[R, V/T]`, of its own hidden states; see *apart*."""
        if self.packed:
            return self.packed[self.heads[member]](hidden_states)
        weight = self.weight[:, self.heads_columns[self.heads[member]]]
        if not self.is_narrow:
            return linear(hidden_states, weight)
        if _MM_TO_FLOAT32:
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


# What vLLM's own float32 head relies on.
_MM_TO_FLOAT32 = current_platform.is_cuda() or current_platform.is_rocm()


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
