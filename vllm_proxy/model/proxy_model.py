"""`ProxyModel`: its members behind the interface of one vLLM model."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, groupby
from typing import ClassVar, Literal

import torch
from torch import nn
from vllm.config import CompilationMode, VllmConfig
from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_proxy.config.roles import Role
from vllm_proxy.members.lora import LoraAdapter, shared_adapter
from vllm_proxy.members.vllm_configs import member_vllm_config, proxy_section
from vllm_proxy.model.alignment import MemberInputs, forward_context, role_of
from vllm_proxy.model.build import admit_twice_the_rows, build_member, load_member, member_weights
from vllm_proxy.model.controls import NO_EXTRA_OPS, ExtraOps, LogitControls
from vllm_proxy.model.fusion import NUM_CONTROLS, controlled_logits, controls_at
from vllm_proxy.model.head import ProxyHead
from vllm_proxy.model.kernels import require_attention_kernels, require_one_cache
from vllm_proxy.model.measure import measured
from vllm_proxy.model.one_pass import attach, can_pair, pair_up
from vllm_proxy.model.probe import InspectionRequest, ProbedStep

logger = init_logger(f"vllm.{__name__}")  # below vLLM's own logger, whose level and format it takes

NUM_EXTRA_COLUMNS = NUM_CONTROLS + 1
"""Of a row: its controls, and 1 and its place among the inspected tokens (`probe.ProbedStep`), or 0."""
PAIR: tuple[Role, Role] = ("expert", "antiexpert")
"""The halves of the rows of a model that runs for both."""
INSPECTED_ROWS = 64
"""Most rows that are inspected at once: several tensors of rows x vocabulary are held."""


class ProxyModel(nn.Module):
    """Base, expert and antiexpert, or the base and one of them, side by side on the same tokens.

    All see the same ids at the same positions and share one block table: a block id stands
    for the same positions in each member's own KV cache. To the engine it is one model with the
    attention layers of all, whose hidden state is theirs side by side. Requests whose members
    have prompts of their own are the exception: see `alignment.py`.

    Whatever makes logits of hidden states (sampling, prompt logprobs, a rank's share of the batch)
    picks rows in its own way, so what a row's request asks of the logits goes along with it: the
    last columns, W of them, are the bits of its `NUM_EXTRA_COLUMNS`.

    Under pipeline parallelism every rank holds some layers of each member.

    Symbols: H_b, H_e, H_a are the members' hidden sizes, H their sum; V is the base's vocabulary
    size.
    """

    supports_pp: ClassVar[Literal[True]] = True
    is_paired: bool = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.section = section = proxy_section(vllm_config.model_config)
        self.roles = section.roles
        configs = {role: member_vllm_config(vllm_config, role) for role in self.roles}
        self.hidden_sizes = [config.model_config.get_hidden_size() for config in configs.values()]
        for config in configs.values():
            # Part of the hash that names compiled graphs: an embedding tied to a head is read
            # from the fused head's weight, whose rows are as long as all members' together.
            config.model_config.hf_config.proxy_head_width = sum(self.hidden_sizes)
        dummy = vllm_config.load_config.load_format == "dummy"
        if (adapter := shared_adapter(section, dummy=dummy)) is not None:
            # Part of the hash that names compiled graphs: which layers have an adapter's part.
            configs["antiexpert"].model_config.hf_config.proxy_adapter = adapter.shapes
            for config in (vllm_config, *configs.values()):
                admit_twice_the_rows(config)
        for role, config in configs.items():
            self.add_module(role, build_member(config, role))
        self.models = {role: config.model_config.model for role, config in configs.items()}
        require_attention_kernels(vllm_config, self.models)
        if current_platform.is_cpu():  # elsewhere sizes of blocks are settled later
            require_one_cache(vllm_config)
        if adapter is not None and can_pair(adapter, self.antiexpert, must=section.one_pass):
            self.is_paired = True
            pair_up(self.expert, self.antiexpert)
            del self.expert  # but for its attention layers
            logger.info_once("The small members run in one pass: weights exist once")
        self.vocab_sizes = {
            role: config.model_config.get_vocab_size() for role, config in configs.items()
        }
        max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.own_ids = {
            role: torch.zeros(max_tokens, dtype=torch.int32)
            for role in self.roles
            if self._knows_fewer_ids(role) and not self.is_paired
        }
        if self.is_paired:  # in the place of `own_ids`, for the same reason
            self.twice_ids = torch.zeros(2 * max_tokens, dtype=torch.int32)
            self.twice_positions = torch.zeros(2 * max_tokens, dtype=torch.int64)
        self.dtype = vllm_config.model_config.dtype
        self.default = LogitControls.of(section.control)
        self.controls = torch.zeros(max_tokens, NUM_EXTRA_COLUMNS, dtype=torch.float32)
        self.has_own_controls = False
        self.extra_ops = NO_EXTRA_OPS
        self.inspecting: ProbedStep | None = None
        self.quantized = {role for role in self.roles if configs[role].quant_config is not None}
        logger.info_once(
            "Proxy tuning: base + %s * (%s - %s)",
            section.alpha,
            section.expert or "base",
            section.antiexpert or "base",
        )
        self.head = None
        if get_pp_group().is_last_rank:
            members = {role: self.member(role) for role in self.roles}
            self.head = ProxyHead(
                members,
                self.hidden_sizes,
                self.vocab_sizes,
                self.default,
                separate_role="expert" if section.speculate else None,
                may_compile=vllm_config.compilation_config.mode != CompilationMode.NONE,
            )
        self.adapters = {
            role: (lora, configs[role].model_config.hf_text_config)
            for role in self.modules_of
            if role != "base" and (lora := getattr(section, role).lora)
        }
        # vLLM's loader yields the base's checkpoint first, then these.
        self.secondary_weights = [
            member_weights(vllm_config, role) for role in self.modules_of if role != "base"
        ]

    @property
    def modules_of(self) -> tuple[Role, ...]:
        """The members that have a model of their own."""
        return tuple(r for r in self.roles if not (self.is_paired and r == "expert"))

    def member(self, role: Role) -> nn.Module:
        """Return the model of *role*."""
        return getattr(self, role if role in self.modules_of else "antiexpert")

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Part of vLLM's model interface; members embed ids themselves, in `forward`."""
        return self.base.embed_input_ids(input_ids)

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        """Return what `forward` takes on every pipeline rank but the first, as zeros."""
        return _side_by_side(
            {
                role: self.member(role).make_empty_intermediate_tensors(batch_size, dtype, device)
                for role in self.roles
            }
        )

    def use_default_controls(self) -> None:
        """Fuse the next logits by the engine's own strength, in every row."""
        self.has_own_controls, self.inspecting = False, None

    def use_controls(
        self,
        rows: Sequence[LogitControls],
        query_start_loc: torch.Tensor,
        positions: torch.Tensor,
        prompt_lens: torch.Tensor,
        probes: Sequence[InspectionRequest | None] | None = None,
    ) -> None:
        """Fuse the next logits as their requests want it. Without waiting for the device.

        A row at position p predicts token p + 1; those within a prompt are fused as the first
        generated token is. The tokens that a probe looks at, all but the last of which are the last
        of its request's prompt, count as generated.

        Args:
            rows: `[requests]`, on the host.
            query_start_loc: `[requests + 1]`: where each request's tokens begin in the batch.
            positions: `[tokens]`.
            prompt_lens: `[requests]`.
            probes: `[requests]`; None where no request is inspected.
        """
        self.inspecting = None if probes is None else ProbedStep(probes, positions.device)
        if self.inspecting is not None:
            prompt_lens = prompt_lens - (self.inspecting.counts - 1).clamp_(min=0)
        tokens = torch.arange(
            positions.shape[0], dtype=query_start_loc.dtype, device=positions.device
        )
        request = torch.searchsorted(query_start_loc[1:].contiguous(), tokens, right=True)
        request.clamp_(max=len(rows) - 1)  # of padding
        steps = positions + 1 - prompt_lens[request]
        table = async_tensor_h2d(rows, positions.device, torch.float32)
        columns = self.controls[: positions.shape[0]]
        columns[:, :NUM_CONTROLS] = controls_at(table[request], steps.clamp(min=0))
        if self.inspecting is not None:
            is_inspected = (steps >= 0) & (steps < self.inspecting.counts[request])
            places = (self.inspecting.starts[request] + steps + 1) * is_inspected
            columns[:, NUM_CONTROLS] = places.int().view(torch.float32)
        self.has_own_controls, self.extra_ops = True, ExtraOps.of(rows)

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
            positions: `[tokens]`.
            intermediate_tensors: what the pipeline rank before returned; None on the first.
            inputs_embeds: always None: prompt embeddings are refused at start.
            members: what each member runs on instead, where some request has a prompt for each.

        Returns:
            `[tokens, H + W]` on the last pipeline rank; on others each member's intermediate
            tensors, named `role.name`.
        """
        outputs = self._outputs(input_ids, positions, intermediate_tensors, members)
        if self.head is None:
            # Copied at once, for the reason below.
            return _side_by_side({role: _copied(output) for role, output in outputs})
        hidden_states, total = None, sum(self.hidden_sizes)
        ends = accumulate(self.hidden_sizes)
        for (_, own), size, end in zip(outputs, self.hidden_sizes, ends, strict=True):
            if hidden_states is None:
                width = NUM_EXTRA_COLUMNS * self.controls.element_size() // own.element_size()
                hidden_states = own.new_empty(own.shape[0], total + width)
            # Copied before the next member runs, not concatenated after the last: members replay
            # piecewise CUDA graphs from one memory pool, and vLLM gives the memory of a model's
            # output back to that pool, for the next graph to write on.
            hidden_states[:, end - size : end] = own
        controls = self.controls[: hidden_states.shape[0]]
        hidden_states[:, total:] = controls.view(hidden_states.dtype)
        return hidden_states

    def _outputs(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        members: Mapping[Role, MemberInputs] | None,
    ) -> Iterator[tuple[Role, torch.Tensor | IntermediateTensors]]:
        """Yield each member's output, before the next one runs."""
        for role in self.modules_of:
            if self.is_paired and role == "antiexpert":
                yield from zip(
                    PAIR,
                    self._run_pair(input_ids, positions, intermediate_tensors, members),
                    strict=True,
                )
            else:
                yield role, self._run(role, input_ids, positions, intermediate_tensors, members)

    def _run_pair(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        members: Mapping[Role, MemberInputs] | None,
    ) -> list[torch.Tensor | IntermediateTensors]:
        """Return the outputs of expert and antiexpert, by one run of the model of both."""
        tensors = None
        if intermediate_tensors is not None:
            tensors = [_of(role, intermediate_tensors) for role in PAIR]
        if members is None:
            return self._call_pair([input_ids] * 2, [positions] * 2, tensors)
        own, tokens = [members[role] for role in PAIR], positions.shape[0]
        size = max(1, *(inputs.rows.numel() for inputs in own))
        ids, places, slots = zip(*(inputs.padded(size) for inputs in own), strict=True)
        metadata, slot_mapping = {}, {}
        for inputs, own_slots in zip(own, slots, strict=True):
            metadata |= (layers := inputs.metadata())
            slot_mapping |= dict.fromkeys(layers, own_slots)
        if tensors is not None:
            tensors = [inputs.gather(t, size) for inputs, t in zip(own, tensors, strict=True)]
        with forward_context(metadata, slot_mapping):
            outputs = self._call_pair(ids, places, tensors)
        return [inputs.scatter(output, tokens) for inputs, output in zip(own, outputs, strict=True)]

    def _call_pair(
        self,
        ids: Sequence[torch.Tensor | None],
        positions: Sequence[torch.Tensor],
        tensors: Sequence[IntermediateTensors] | None,
    ) -> list[torch.Tensor | IntermediateTensors]:
        """Run the model of both on the expert's rows and, after them, as many of the other's."""
        rows = 2 * len(positions[0])
        places = torch.cat(list(positions), out=self.twice_positions[:rows])
        if tensors is None:
            known = torch.cat(list(ids), out=self.twice_ids[:rows])
            if self._knows_fewer_ids("antiexpert"):  # see `_known_ids`
                known.clamp_(max=self.vocab_sizes["antiexpert"] - 1)
            return _halves(self.antiexpert(known, places))
        both = IntermediateTensors(
            {name: torch.cat([t[name] for t in tensors]) for name in tensors[0].tensors}
        )
        return _halves(self.antiexpert(None, places, both))

    def _run(
        self,
        role: Role,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        members: Mapping[Role, MemberInputs] | None,
    ) -> torch.Tensor | IntermediateTensors:
        tensors = None if intermediate_tensors is None else _of(role, intermediate_tensors)
        if members is None:
            return self._call(role, input_ids, positions, tensors)
        own, tokens = members[role], positions.shape[0]
        if own.rows.numel() == 0:  # all tokens lie before this member's prompt
            if self.head is None:
                member = self.member(role)
                return member.make_empty_intermediate_tensors(tokens, self.dtype, positions.device)
            size = self.hidden_sizes[self.roles.index(role)]
            return torch.zeros(tokens, size, dtype=self.dtype, device=positions.device)
        slot_mapping = dict.fromkeys(metadata := own.metadata(), own.common.slot_mapping)
        with forward_context(metadata, slot_mapping):
            output = self._call(role, own.input_ids, own.positions, own.gather(tensors))
        return own.scatter(output, tokens)

    def _call(
        self,
        role: Role,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        tensors: IntermediateTensors | None,
    ) -> torch.Tensor | IntermediateTensors:
        if tensors is None:
            return self.member(role)(self._known_ids(role, input_ids), positions)
        return self.member(role)(input_ids, positions, tensors)

    def _knows_fewer_ids(self, role: Role) -> bool:
        return self.vocab_sizes[role] < self.vocab_sizes["base"]

    def _known_ids(self, role: Role, input_ids: torch.Tensor) -> torch.Tensor:
        """Replace ids beyond a member's vocabulary, the base's padding, by its last one.

        They are never generated, and a prompt may hold them only where this member has no weight
        (`_Validator.validate_request`); but reading beyond an embedding is undefined behaviour on a
        GPU. The result lies where it lay in the last step: a CUDA graph
        reads its inputs from the addresses it was captured with.
        """
        if role not in self.own_ids:
            return input_ids
        own_ids = self.own_ids[role][: input_ids.shape[0]]
        return own_ids.copy_(input_ids).clamp_(max=self.vocab_sizes[role] - 1)

    def draft(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Run the expert by itself, on its own KV cache; returns `[tokens, H_e]`."""
        if self.is_paired:
            return self._run_pair(input_ids, positions, None, None)[0]
        return self._call("expert", input_ids, positions, None)

    def draft_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return the expert's logits, `[rows, V]`, of rows that `draft` returned."""
        return self.head.member_logits("expert", hidden_states)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Fuse the members' logits; sampling and prompt logprobs both pass here.

        Args:
            hidden_states: `[rows, H + W]`, rows of what `forward` returned.

        Returns:
            `[rows, V]`, float32; None on ranks that vLLM's gather leaves without logits.
        """
        return self._logits(hidden_states, gather=True)

    def compute_logits_local(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Fuse the logits of this tensor-parallel rank's ids, for batch-sharded sampling.

        Returns:
            `[rows, V / ranks]` (V padded), float32.
        """
        return self._logits(hidden_states, gather=False)

    def _logits(self, hidden_states: torch.Tensor, *, gather: bool) -> torch.Tensor | None:
        total = sum(self.hidden_sizes)
        controls = None
        if self.has_own_controls:
            columns = hidden_states[:, total:].contiguous().view(torch.float32)
            controls = columns[:, :NUM_CONTROLS]
            if self.inspecting is not None:
                places = columns[:, NUM_CONTROLS].contiguous().view(torch.int32) - 1
                self._inspect(self.inspecting, hidden_states[:, :total], controls, places)
        return self.head(hidden_states[:, :total], controls, self.extra_ops, gather=gather)

    def _inspect(
        self,
        step: ProbedStep,
        hidden_states: torch.Tensor,
        controls: torch.Tensor,
        places: torch.Tensor,
    ) -> None:
        """Measure the rows that have a place among the inspected tokens. Waits for the device."""
        on_host = places.cpu().numpy()
        unmeasured = torch.from_numpy(step.unmeasured(on_host))
        for rows in unmeasured.split(INSPECTED_ROWS) if len(unmeasured) else ():
            picked = async_tensor_h2d(rows, places.device)
            by_role = self.head.by_role(hidden_states[picked])
            proxy = controlled_logits(*by_role, controls[picked], self.extra_ops)
            k = min(step.top_k, proxy.shape[-1])
            found = measured(*by_role, proxy, step.tokens[places[picked]], k)
            step.store(on_host[rows.numpy()], found)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the members' checkpoints.

        Args:
            weights: `(name, tensor)`; the base's under their own names, then the others' under
                `expert.` and `antiexpert.`.

        Returns:
            The names of the parameters that were set.

        Raises:
            ProxyConfigError: a checkpoint has a tensor too many or too few; names both.
        """
        loaded: set[str] = set()
        for role, group in groupby(weights, key=lambda item: role_of(item[0])):
            own_names = ((name.removeprefix(f"{role}."), tensor) for name, tensor in group)
            if role in self.adapters:
                location, hf_config = self.adapters[role]
                own_names = LoraAdapter.read(location).merge(own_names, hf_config)
            names = load_member(
                self.member(role),
                role,
                self.models[role],
                own_names,
                quantized=role in self.quantized,
            )
            loaded |= {f"{role}.{name}" for name in names}
            if self.is_paired and role == "antiexpert":
                attach(LoraAdapter.read(self.section.expert.lora), self.antiexpert)
        if self.head is not None:
            self.head.weights_loaded()
            loaded |= {f"head.{name}" for name, _ in self.head.named_parameters()}
        return loaded


def _halves(
    output: torch.Tensor | IntermediateTensors,
) -> list[torch.Tensor | IntermediateTensors]:
    """Return the first half of the rows, and the second."""
    if isinstance(output, torch.Tensor):
        return list(output.chunk(2))
    halves = {name: tensor.chunk(2) for name, tensor in output.items()}
    return [IntermediateTensors({name: own[i] for name, own in halves.items()}) for i in (0, 1)]


def _side_by_side(tensors: dict[Role, IntermediateTensors]) -> IntermediateTensors:
    return IntermediateTensors(
        {f"{role}.{name}": tensor for role, own in tensors.items() for name, tensor in own.items()}
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
