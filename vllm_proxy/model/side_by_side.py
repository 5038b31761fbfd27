"""`SideBySide`: one forward pass of all members on the tokens of one batch."""

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.sequence import IntermediateTensors

from vllm_proxy.config.roles import Role
from vllm_proxy.model.alignment import MemberInputs, changed_context
from vllm_proxy.model.images import Sight
from vllm_proxy.model.shifts import MemberShifts

PAIR: tuple[Role, Role] = ("expert", "antiexpert")
"""The halves of the rows of a model that runs for both."""


class SideBySide(nn.Module):
    """Base, expert and antiexpert, or the base and one of them, on the same tokens.

    All members see the same ids at the same positions and share one block table: a block id stands
    for the same positions in the KV cache of each member. Requests whose members have different
    prompts are the exception: see `alignment.py`.

    The output is the members' hidden states side by side, and after them the extra columns of each
    row. Under pipeline parallelism every rank holds some layers of each member; if the expert
    drafts, the last rank holds all of the expert's (`stages.py`).

    Symbols: H_b, H_e, H_a are the members' hidden sizes, H is their sum. W extra columns of the
    hidden states' dtype hold the bits of `columns`.

    Args:
        modules: the members' models. If the expert has none, the antiexpert's is *paired*: it runs
            for both, on twice the rows (`one_pass.py`).
        roles: the members that there are on this rank, in the order of their columns.
        hidden_sizes: of the members, in this order.
        vocab_sizes: how many ids each member can read.
        max_tokens: of a batch.
        num_columns: float32 columns to add to each row.
        dtype: of the members' hidden states.
        is_last_rank: whether this pipeline rank returns hidden states.
        whole: members that the last of several pipeline ranks holds whole.
        slots: how many adapters a paired model has.

    Attributes:
        columns: `[max_tokens, num_columns]`, float32: written before a step, for its rows.
        batch_ids: `[max_tokens]`, where the runner of such a rank has the batch's ids: it passes
            none to the model.
        choice: `[max_tokens, slots]`, 1 in the slot of the adapter of each of the expert's rows, 0
            in the others; None if there is one slot.
        sight: the towers of members that see images; None if there are none.
    """

    batch_ids: torch.Tensor | None = None

    def __init__(
        self,
        modules: Mapping[Role, nn.Module],
        *,
        roles: Sequence[Role],
        hidden_sizes: Sequence[int],
        vocab_sizes: Mapping[Role, int],
        max_tokens: int,
        num_columns: int,
        dtype: torch.dtype,
        is_last_rank: bool,
        whole: Set[Role] = frozenset(),
        slots: int = 1,
    ) -> None:
        super().__init__()
        for role, module in modules.items():
            self.add_module(role, module)
        self.roles = tuple(roles)
        self.modules_of = tuple(role for role in roles if role in modules)
        self.is_paired = "expert" in self.roles and "expert" not in modules
        self.hidden_sizes = list(hidden_sizes)
        self.vocab_sizes = dict(vocab_sizes)
        self.dtype = dtype
        self.is_last_rank = is_last_rank
        self.whole = whole
        self.columns = torch.zeros(max_tokens, num_columns, dtype=torch.float32)
        # Inputs that differ from the batch's. They keep their addresses, from which CUDA graphs
        # read: see `known_ids`.
        self._ids: dict[Role, torch.Tensor] = {}
        self.shifts: MemberShifts | None = None
        self.sight: Sight | None = None
        self.choice: torch.Tensor | None = None
        self.slots_of_rows: torch.Tensor | None = None  # `[tokens]`, of the batch; None: all 0
        if slots > 1:
            self.choice = torch.zeros(max_tokens, slots, dtype=dtype)
            self.choice[:, 0] = 1
        if self.is_paired:
            self.twice_ids = torch.zeros(2 * max_tokens, dtype=torch.int32)
            self.twice_positions = torch.zeros(2 * max_tokens, dtype=torch.int64)
        else:
            for role in filter(self._knows_fewer_ids, self.roles):
                self._ids[role] = torch.zeros(max_tokens, dtype=torch.int32)

    def allow_shifts(self, shifts: MemberShifts) -> None:
        """Let CUDA graphs run members with different prompts; to be called before any is made."""
        self.shifts = shifts
        for role in () if self.is_paired else self.roles:
            if role not in self._ids:
                self._ids[role] = torch.zeros(
                    len(self.columns), dtype=torch.int32, device=self.columns.device
                )

    def choose(self, slots: torch.Tensor) -> None:
        """Let the expert's next rows use these adapters.

        Args:
            slots: `[rows]`.
        """
        assert self.choice is not None  # there are several adapters
        every = torch.arange(self.choice.shape[1], device=slots.device)
        self.choice[: len(slots)] = slots[:, None] == every

    def member(self, role: Role) -> nn.Module:
        """Return the model that runs for *role*."""
        return getattr(self, role if role in self.modules_of else "antiexpert")

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: Sequence[torch.Tensor] | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Part of vLLM's model interface. Members embed ids themselves, unless they see images.

        Args:
            input_ids: `[N]`.
            multimodal_embeddings: rows of the images that this step has; see `Sight.embed`.
            is_multimodal: `[N]`, where they belong.
        """
        if self.sight is None:
            return self.member("base").embed_input_ids(input_ids)
        texts = {
            role: self.member(role).embed_input_ids(self.known_ids(role, input_ids))
            for role in self.sight.sizes
        }
        return self.sight.embed(texts, multimodal_embeddings, is_multimodal)

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        """Return what `forward` takes on every pipeline rank but the first, as zeros."""
        return _side_by_side(
            {
                role: self.member(role).make_empty_intermediate_tensors(batch_size, dtype, device)
                for role in self.roles
                if role not in self.whole
            }
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        members: Mapping[Role, MemberInputs] | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """Run the members.

        Args:
            input_ids: `[tokens]`, the scheduled tokens of the whole batch.
            positions: `[tokens]`; with M-RoPE `[3, tokens]`.
            intermediate_tensors: what the previous pipeline rank returned; None on the first.
                Nothing of whole members.
            inputs_embeds: of members that see images, what `embed_input_ids` returned; else None.
            members: each member's inputs, in a batch with different prompts for members.

        Returns:
            `[tokens, H + W]` on the last pipeline rank; on others each member's intermediate
            tensors, named `role.name`.
        """
        at: Mapping[Role, torch.Tensor] = dict.fromkeys(self.roles, positions)
        context: AbstractContextManager[None] = nullcontext()
        if self.sight is not None:
            at = {role: self.sight.positions(role, positions) for role in self.roles}
        elif members is None and self.shifts is not None:
            at = self.shifts.member_positions(positions)
            context = self.shifts.slots_in_context(len(positions))
        with context:
            outputs = self._outputs(input_ids, at, intermediate_tensors, inputs_embeds, members)
            return self._joined(outputs)

    def _joined(
        self, outputs: Iterator[tuple[Role, torch.Tensor | IntermediateTensors]]
    ) -> torch.Tensor | IntermediateTensors:
        """Return what `forward` returns, of each member's output."""
        if not self.is_last_rank:
            # Copied at once, for the reason below.
            return _side_by_side({role: _copied(output) for role, output in outputs})
        hidden_states, total = None, sum(self.hidden_sizes)
        ends = accumulate(self.hidden_sizes)
        for (_, output), size, end in zip(outputs, self.hidden_sizes, ends, strict=True):
            if hidden_states is None:
                width = self.columns[0].nbytes // output.element_size()
                hidden_states = output.new_empty(output.shape[0], total + width)
            # Copied before the next member runs, not concatenated after the last one. Members
            # replay piecewise CUDA graphs from one memory pool, and vLLM returns the memory of a
            # model's output to that pool, so the next graph may overwrite it.
            hidden_states[:, end - size : end] = output
        assert hidden_states is not None  # there is a base
        columns = self.columns[: hidden_states.shape[0]]
        hidden_states[:, total:] = columns.view(hidden_states.dtype)
        return hidden_states

    def _outputs(
        self,
        input_ids: torch.Tensor,
        positions: Mapping[Role, torch.Tensor],
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None,
        members: Mapping[Role, MemberInputs] | None,
    ) -> Iterator[tuple[Role, torch.Tensor | IntermediateTensors]]:
        """Yield each member's output, before the next one runs."""
        for role in self.modules_of:
            if self.is_paired and role == "antiexpert":
                both = self._run_pair(input_ids, positions, intermediate_tensors, members)
                yield from zip(PAIR, both, strict=True)
            elif self.sight is not None and role in self.sight.sizes:
                assert inputs_embeds is not None  # vLLM passes them to a model with images
                yield role, self._see(self.sight, role, positions[role], inputs_embeds)
            else:
                yield (
                    role,
                    self._run(role, input_ids, positions[role], intermediate_tensors, members),
                )

    def _see(
        self, sight: Sight, role: Role, positions: torch.Tensor, inputs_embeds: torch.Tensor
    ) -> torch.Tensor:
        """Run a member on embeddings, some of them of images."""
        embeddings, added = sight.part(role, inputs_embeds)
        model = self.member(role).model  # the classes around it do not pass on what is added
        more = {} if added is None else {"deepstack_input_embeds": added}
        with self.running(role):
            return model(None, positions, None, embeddings, **more)

    def run_pair(
        self, input_ids: torch.Tensor, positions: torch.Tensor
    ) -> list[torch.Tensor | IntermediateTensors]:
        """Return the outputs of expert and antiexpert on the same tokens, from one run."""
        return self._call_pair([input_ids] * 2, [positions] * 2, None)

    def _run_pair(
        self,
        input_ids: torch.Tensor,
        positions: Mapping[Role, torch.Tensor],
        intermediate_tensors: IntermediateTensors | None,
        members: Mapping[Role, MemberInputs] | None,
    ) -> list[torch.Tensor | IntermediateTensors]:
        """Return the outputs of expert and antiexpert, from one run of the paired model."""
        tensors = None
        if "antiexpert" in self.whole:
            input_ids = self._batch_ids(positions["antiexpert"])
        elif intermediate_tensors is not None:
            tensors = [_of(role, intermediate_tensors) for role in PAIR]
        if members is None:
            return self._call_pair([input_ids] * 2, [positions[role] for role in PAIR], tensors)
        inputs, tokens = [members[role] for role in PAIR], positions["expert"].shape[0]
        in_graphs = self._runs_in_graphs(tensors)
        # Both halves need as many rows, or as many as the graphs have.
        size = tokens if in_graphs else max(1, *(one.rows.numel() for one in inputs))
        ids, places = zip(*(one.padded(size) for one in inputs), strict=True)
        if self.slots_of_rows is not None:
            self.choose(self.slots_of_rows[inputs[0].rows])
        metadata: dict[str, Any] = {}
        slot_mapping: dict[str, torch.Tensor] = {}
        for one in inputs:
            metadata |= one.metadata()
            slot_mapping |= one.slots(size)
        if tensors is not None:
            tensors = [one.gather(t, size) for one, t in zip(inputs, tensors, strict=True)]
        with _member_context(metadata, slot_mapping, in_graphs):
            outputs = self._call_pair(ids, places, tensors)
        return [one.scatter(output, tokens) for one, output in zip(inputs, outputs, strict=True)]

    def _call_pair(
        self,
        ids: Sequence[torch.Tensor | None],
        positions: Sequence[torch.Tensor],
        tensors: Sequence[IntermediateTensors] | None,
    ) -> list[torch.Tensor | IntermediateTensors]:
        """Run the paired model on the expert's rows and, after them, the antiexpert's."""
        model, rows = self.member("antiexpert"), 2 * len(positions[0])
        places = torch.cat(list(positions), out=self.twice_positions[:rows])
        if tensors is None:
            known = torch.cat(list(ids), out=self.twice_ids[:rows])
            if self._knows_fewer_ids("antiexpert"):  # see `known_ids`
                known.clamp_(max=self.vocab_sizes["antiexpert"] - 1)
            arguments = [known, places]
        else:
            names = tensors[0].tensors
            both = {name: torch.cat([t[name] for t in tensors]) for name in names}
            arguments = [None, places, IntermediateTensors(both)]
        # Routers of experts skip the rows that pad the batch, by a mask of half as many rows.
        with self.running("antiexpert"), changed_context(is_padding=None):
            return _halves(model(*arguments))

    def _run(
        self,
        role: Role,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        members: Mapping[Role, MemberInputs] | None,
    ) -> torch.Tensor | IntermediateTensors:
        """Run one member, on its part of the batch if *members* has one."""
        tensors = None
        if role in self.whole:
            input_ids = self._batch_ids(positions)
        elif intermediate_tensors is not None:
            tensors = _of(role, intermediate_tensors)
        if members is None:
            return self.call(role, input_ids, positions, tensors)
        inputs, tokens = members[role], positions.shape[0]
        if inputs.rows.numel() == 0:  # all tokens lie before this member's prompt
            if not self.is_last_rank:
                member = self.member(role)
                return member.make_empty_intermediate_tensors(tokens, self.dtype, positions.device)
            size = self.hidden_sizes[self.roles.index(role)]
            return torch.zeros(tokens, size, dtype=self.dtype, device=positions.device)
        in_graphs = self._runs_in_graphs(tensors)
        rows = tokens if in_graphs else inputs.rows.numel()
        ids, places = inputs.padded(rows)
        if self.shifts is not None:
            places = self.shifts.put(role, places)
        with _member_context(inputs.metadata(), inputs.slots(rows), in_graphs):
            output = self.call(role, ids, places, inputs.gather(tensors, rows))
        return inputs.scatter(output, tokens)

    def _batch_ids(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the batch's ids, for a member that begins on a later pipeline rank."""
        assert self.batch_ids is not None  # the runner has set it
        return self.batch_ids[: len(positions)]

    def _runs_in_graphs(self, tensors: Any) -> bool:
        """Whether members whose rows are not the batch's replay its piecewise graphs.

        They need inputs at the graphs' addresses: not under Model Runner V1, nor on a pipeline rank
        that gets *tensors*.
        """
        mode = get_forward_context().cudagraph_runtime_mode
        return self.shifts is not None and tensors is None and mode == CUDAGraphMode.PIECEWISE

    def call(
        self,
        role: Role,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        tensors: IntermediateTensors | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """Run a member that is not paired on these tokens; *tensors*: of the previous rank."""
        with self.running(role):
            if tensors is None:
                return self.member(role)(self.known_ids(role, input_ids), positions)
            return self.member(role)(input_ids, positions, tensors)

    def running(self, role: Role) -> AbstractContextManager[None]:
        """Return a context for each run of *role*'s model."""
        return nullcontext()

    def _knows_fewer_ids(self, role: Role) -> bool:
        return self.vocab_sizes[role] < self.vocab_sizes["base"]

    def known_ids(self, role: Role, input_ids: torch.Tensor | None) -> torch.Tensor | None:
        """Return a member's ids: those beyond its vocabulary are replaced by its last id.

        Such ids are padding of the base, or a prompt's where this member has no weight (see
        `_Validator.validate_request`). They do not matter, but reading beyond an embedding is
        undefined behaviour on a GPU. The result has the same address in every step, because a CUDA
        graph reads its inputs from the addresses that it was captured with.
        """
        if input_ids is None or role not in self._ids:
            return input_ids
        ids = self._ids[role][: input_ids.shape[0]].copy_(input_ids)
        return ids.clamp_(max=self.vocab_sizes[role] - 1) if self._knows_fewer_ids(role) else ids


def _member_context(
    metadata: dict[str, Any], slot_mapping: dict[str, torch.Tensor], in_graphs: bool
) -> AbstractContextManager[None]:
    """Make attention layers see sequences whose rows are not those of the batch."""
    changes: dict[str, Any] = {"attn_metadata": metadata, "slot_mapping": slot_mapping}
    if not in_graphs:
        changes |= {"cudagraph_runtime_mode": CUDAGraphMode.NONE, "batch_descriptor": None}
    return changed_context(**changes, is_padding=None)


def _halves(
    output: torch.Tensor | IntermediateTensors,
) -> list[torch.Tensor | IntermediateTensors]:
    """Return the first half of the rows, and the second."""
    if isinstance(output, torch.Tensor):
        return list(output.chunk(2))
    halves = {name: tensor.chunk(2) for name, tensor in output.items()}
    return [IntermediateTensors({name: both[i] for name, both in halves.items()}) for i in (0, 1)]


def _side_by_side(tensors: dict[Role, IntermediateTensors]) -> IntermediateTensors:
    return IntermediateTensors(
        {
            f"{role}.{name}": tensor
            for role, of_role in tensors.items()
            for name, tensor in of_role.items()
        }
    )


def _of(role: Role, tensors: IntermediateTensors) -> IntermediateTensors:
    prefix = f"{role}."
    return IntermediateTensors(
        {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
    )


def _copied(tensors: IntermediateTensors) -> IntermediateTensors:
    return IntermediateTensors({name: tensor.clone() for name, tensor in tensors.items()})
