"""From the members' hidden states to fused logits.

LM heads are linear, so their weighted sum is one product:

    w_b W_b h_b + w_e W_e h_e + w_a W_a h_a  =  [W_b | W_e | W_a] · [w_b h_b ; w_e h_e ; w_a h_a]

Like three heads, it reads every weight once. But it forms the sum in the accumulator, rounds it
once, writes one `[rows, vocab]` tensor instead of three, and gathers one under tensor parallelism.

If a head is more than a product (it is quantized, or has a bias, a soft cap or a logit scale), each
member computes its own logits, and they are added in float32.

If the expert or the antiexpert is missing, the base is used in its place: the weight of that role
is added to the base's, and the product has the columns of two members.

Symbols: R rows; M members; H their hidden sizes added up; V the base's vocabulary size, padded; V/T
the part of it on one of T tensor-parallel ranks.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from vllm import envs
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.logger import init_logger

from vllm_proxy.config.roles import ROLES, Role
from vllm_proxy.model.controls import NO_EXTRA_OPS, ExtraOps, LogitControls
from vllm_proxy.model.fused_product import FusedProduct
from vllm_proxy.model.fusion import controlled_logits, proxy_logits
from vllm_proxy.model.projection import Projection, align_shard

logger = init_logger(f"vllm.{__name__}")

CONTROLLED_ROWS = 128
"""Most rows whose logits of all members are held at once, for controls that need them."""


class ProxyHead(nn.Module):
    """The fused logits of one tensor-parallel rank, and their gathering.

    Takes over the members' heads: their weights become columns of one weight, and their shards of
    the vocabulary become the base's. Members that are one module share one head.

    Args:
        members: the models, by role; the base first.
        hidden_sizes: of the members, in this order.
        vocab_sizes: how many ids each member has.
        default: the engine's controls, whose weights rows without controls use.
        separate_role: a member whose logits are also computed separately, for drafting.
        may_compile: whether `torch.compile` may be used.
    """

    def __init__(
        self,
        members: Mapping[Role, nn.Module],
        hidden_sizes: Sequence[int],
        vocab_sizes: Mapping[Role, int],
        default: LogitControls,
        *,
        separate_role: Role | None = None,
        may_compile: bool = False,
    ) -> None:
        super().__init__()
        projections: dict[nn.Module, Projection] = {}
        for (role, member), size in zip(members.items(), hidden_sizes, strict=True):
            if member not in projections:
                projections[member] = Projection(role, member, size)
        layer = projections[members["base"]].layer
        # For each member, which of the distinct heads is its head.
        self.heads = [list(projections).index(member) for member in members.values()]
        self.hidden_sizes = list(hidden_sizes)
        self.vocab_size = vocab_sizes["base"]
        self.tp_size = layer.tp_size
        self.rows = layer.num_embeddings_per_partition
        # Ids from here on are padding, or a member lacks them: they are never generated.
        self.shared = min(vocab_sizes.values())
        # This rank's first id, and how many of its ids can be generated.
        self.start = layer.shard_indices.padded_org_vocab_start_index
        self.known = min(max(self.shared - self.start, 0), self.rows)
        self.projections = tuple(projections.values())  # a tuple: these modules are the members'
        self.roles = roles = list(members)
        # For each of `ROLES`, the member that is used for it.
        self.member_of_role = [roles.index(role if role in roles else "base") for role in ROLES]
        coefficients = torch.tensor(default.coefficients, dtype=torch.float32)
        self.register_buffer("coefficients", coefficients, persistent=False)
        for projection in self.projections:
            align_shard(projection, layer)
        self.product = None
        if reasons := self._obstacles():
            logger.info_once("Logits: one head per member, combined in float32 (%s)", reasons)
        else:
            weights = self._by_member(coefficients).tolist()
            self.product = FusedProduct(
                self.projections,
                self.heads,
                weights,
                packs_separately=separate_role is not None,
                may_compile=may_compile,
            )
            logger.info_once("Logits: one product over %s hidden units", sum(hidden_sizes))

    def _obstacles(self) -> str:
        reasons = [reason for p in self.projections if (reason := p.obstacle())]
        if envs.VLLM_BATCH_INVARIANT:
            reasons.append("VLLM_BATCH_INVARIANT is set")
        if not reasons and len({p.layer.weight.dtype for p in self.projections}) > 1:
            reasons.append("heads of different dtypes")
        return "; ".join(reasons)

    @contextmanager
    def loading_again(self) -> Iterator[None]:
        """While new weights are loaded: give them the memory that they were first loaded to."""
        if self.product is not None:
            self.product.unpack()
        try:
            yield
        finally:
            if self.product is not None:
                self.product.finish()

    def weights_loaded(self) -> None:
        """Check the heads again after loading: some model classes add a bias only then."""
        if self.product is not None and (reasons := self._obstacles()):
            self.separate(reasons)

    def separate(self, reasons: str) -> None:
        """Stop using the fused product; combine the members' own logits from now on."""
        product, self.product = self.product, None
        if product is not None:
            product.give_back()
        logger.info("Logits: one head per member after all, combined in float32 (%s)", reasons)

    def forward(
        self,
        hidden_states: torch.Tensor,
        controls: torch.Tensor | None = None,
        extra_ops: ExtraOps = NO_EXTRA_OPS,
        *,
        gather: bool = True,
    ) -> torch.Tensor | None:
        """Fuse logits.

        Args:
            hidden_states: `[R, H]`, the members' side by side.
            controls: `[R, NUM_CONTROLS]`, float32, as in `fusion.controlled_logits`; None for the
                engine's constant weights in every row.
            extra_ops: what some row needs in addition to a weighted sum.
            gather: whether to put the ranks' parts of the vocabulary together.

        Returns:
            Float32: `[R, vocab]` if gathered (None on ranks to which vLLM does not gather), else
            `[R, V/T]`.
        """
        if controls is None or not any(extra_ops):
            coefficients = None if controls is None else controls[:, :3]
            logits = self._weighted(hidden_states, coefficients)
        else:
            logits = hidden_states.new_empty(len(hidden_states), self.rows, dtype=torch.float32)
            parts = (t.split(CONTROLLED_ROWS) for t in (hidden_states, controls, logits))
            for rows, row_controls, out in zip(*parts, strict=True):
                self._controlled(rows, row_controls, out, extra_ops)
        return self._finished(logits, gather=gather)

    def _finished(self, logits: torch.Tensor, *, gather: bool = True) -> torch.Tensor | None:
        """Exclude the ids that are never generated from `[R, V/T]`; *gather*: see `forward`."""
        logits[:, self.known :] = float("-inf")
        if not gather:
            return logits
        if self.tp_size > 1:
            logits = self.projections[0].processor._gather_logits(logits)
        return logits if logits is None else logits[:, : self.vocab_size]

    def member_logits(self, role: Role, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return one member's logits, `[R, vocab]` as `forward` does; for drafting.

        Args:
            role: the `separate_role` of this head.
            hidden_states: `[R, H_role]`, of that member only.
        """
        member = self.roles.index(role)
        if self.product is not None:
            logits = self.product.member_logits(member, hidden_states)
        else:
            logits = self.projections[self.heads[member]].member.compute_logits(hidden_states)
            logits = logits[:, : self.rows].float()
        return self._finished(logits)

    def _weighted(
        self, hidden_states: torch.Tensor, coefficients: torch.Tensor | None
    ) -> torch.Tensor:
        """Return `[R, V/T]`: the weighted sum of the members' logits."""
        if self.product is not None:
            if coefficients is not None:
                coefficients = self._by_member(coefficients)
            return self.product(hidden_states, coefficients)
        logits = self._of_heads(hidden_states)
        base, expert, antiexpert = (logits[member] for member in self.member_of_role)
        coefficients = self.coefficients if coefficients is None else coefficients
        return proxy_logits(base, expert, antiexpert, coefficients)

    def _of_heads(self, hidden_states: torch.Tensor) -> list[torch.Tensor]:
        """Return each member's logits by its own head, `[R, V/T]` (quantized: the head's width)."""
        parts = hidden_states.split(self.hidden_sizes, dim=-1)
        # Contiguous, as in a model served alone: some kernels of quantized heads (vLLM's
        # `gptq_gemm` and `awq_gemm`) ignore strides.
        return [
            self.projections[head].member.compute_logits(part.contiguous())
            for head, part in zip(self.heads, parts, strict=True)
        ]

    def _by_member(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Add the weights of roles, `[…, 3]`, to those of the members used for them, `[…, M]`."""
        if len(self.heads) == len(ROLES):
            return coefficients
        weights = [0.0] * len(self.heads)
        for member, weight in zip(self.member_of_role, coefficients.unbind(-1), strict=True):
            weights[member] = weights[member] + weight
        return torch.stack(weights, dim=-1)

    def _controlled(
        self,
        hidden_states: torch.Tensor,
        controls: torch.Tensor,
        out: torch.Tensor,
        extra_ops: ExtraOps,
    ) -> None:
        """Write fused rows that need sums over the whole vocabulary to *out*, `[R, V/T]`."""
        base, expert, antiexpert = self.by_role(hidden_states)
        logits = controlled_logits(base, expert, antiexpert, controls, extra_ops)
        out[:, : self.known] = logits[:, self.start : self.start + self.known]

    def by_role(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the logits of base, expert and antiexpert, on every tensor-parallel rank.

        Args:
            hidden_states: `[R, H]`, with R small enough that all logits fit in memory.

        Returns:
            Three tensors `[R, ids that all members have]`, float32; the base's for a missing role.
        """
        if self.product is not None:
            logits = self.product.members(hidden_states)
        else:
            width = self.known if self.tp_size == 1 else self.rows
            logits = torch.stack(
                [part[:, :width].float() for part in self._of_heads(hidden_states)]
            )
        if self.tp_size > 1:
            logits = tensor_model_parallel_all_gather(logits)
        logits = logits[:, :, : self.shared]
        base, expert, antiexpert = (logits[member] for member in self.member_of_role)
        return base, expert, antiexpert
