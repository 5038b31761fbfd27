"""Model Runner V2: per-request values enter in the `ModelState` of our model."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig, MambaSpec
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, ModelCudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from vllm_proxy.engine.admission import admits_prompts
from vllm_proxy.engine.drafting.graphs import capture_every_length, most_requests
from vllm_proxy.engine.requests import RequestOverrides
from vllm_proxy.members.vllm_configs import proxy_section
from vllm_proxy.model.alignment import (
    CacheGroup,
    MemberPrompts,
    StepBatch,
    role_of,
    rows_differ,
)
from vllm_proxy.model.shifts import MemberShifts, offsets_of

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
else:
    GPUModelRunner = object  # a mixin: `ProxyWorkerMixin` adds the platform's runner class


class ProxyModelState(DefaultModelState):
    """Passes per-request controls and prompts from vLLM's batch to the model.

    Attributes:
        prompts: of the members, by request of this step; None if no request has different ones.
        rows_differ: whether one of them has tokens of its prompt left: `alignment.rows_differ`.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: nn.Module,
        encoder_cache: EncoderCache | None,
        device: torch.device,
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.overrides = RequestOverrides(model)
        self.prompts: list[MemberPrompts | None] | None = None
        self.rows_differ = False
        self._looked_at: Sequence[str] | None = None
        self.block_sizes: list[int] = []
        self.have_states: list[bool] = []
        self.batch: StepBatch | None = None
        self.shifts: MemberShifts | None = None

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, block_tables: BlockTables
    ) -> None:
        """Allocate what members with different prompts read in CUDA graphs."""
        super().initialize_kv_cache(kv_cache_config, block_tables)
        groups = kv_cache_config.kv_cache_groups
        self.block_sizes = block_tables.block_sizes
        self.have_states = [isinstance(group.kv_cache_spec, MambaSpec) for group in groups]
        if admits_prompts(self.model_config):
            self.shifts = MemberShifts(
                self.model.roles,
                self.max_num_tokens,
                self._cache_groups(block_tables.input_block_tables),
                {name: i for i, group in enumerate(groups) for name in group.layer_names},
            )
            self.model.allow_shifts(self.shifts)

    def _cache_groups(
        self,
        block_tables: Sequence[torch.Tensor],
        attn_groups: Sequence[Sequence[AttentionGroup]] | None = None,
    ) -> list[CacheGroup]:
        """Return the KV cache groups: of their block tables and attention groups in a step."""
        attn_groups = attn_groups or [()] * len(block_tables)
        facts = block_tables, self.block_sizes, attn_groups, self.have_states
        return [CacheGroup(*of_one) for of_one in zip(*facts, strict=True)]

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Read the values of a request."""
        super().add_request(req_index, new_req_data)
        self.overrides.add(new_req_data)

    def look_at(self, req_ids: Sequence[str], is_prefilling: Sequence[bool]) -> None:
        """Note the members' prompts in the step of these requests; the first time only.

        Args:
            req_ids: `[R]`: the step's own list.
            is_prefilling: `[R]`, whether tokens of the prompt are left.
        """
        if req_ids is not self._looked_at:
            self._looked_at = req_ids
            self.prompts = self.overrides.prompts_of(req_ids)
            self.rows_differ = self.prompts is not None and rows_differ(self.prompts, is_prefilling)

    def remove_request(self, req_id: str) -> None:
        """Forget a request that finished or was preempted."""
        super().remove_request(req_id)
        self.overrides.remove(req_id)

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        for_capture: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Build vLLM's metadata: for each member, where CUDA graphs or prompts need it."""
        self.look_at(input_batch.req_ids, input_batch.is_prefilling_np)
        self.batch, shifts, prompts = None, self.shifts, self.prompts
        if prompts is not None and self.rows_differ:
            self.batch = StepBatch(
                prompts=prompts,
                scheduled=input_batch.num_scheduled_tokens,
                computed=input_batch.num_computed_tokens_np,
                is_prefilling=input_batch.is_prefilling_np,
                input_ids=input_batch.input_ids,
                positions=input_batch.positions,
                seq_lens=input_batch.seq_lens,
                groups=self._cache_groups(block_tables, attn_groups),
            )
        arguments = attn_groups, kv_cache_config, for_capture
        in_graph = for_capture or cudagraph_mode == CUDAGraphMode.FULL
        if shifts is not None and self.batch is None and (prompts is not None or in_graph):
            return self._prepare_members(
                shifts,
                prompts,
                input_batch,
                cudagraph_mode,
                block_tables,
                slot_mappings,
                *arguments,
                **kwargs,
            )
        if shifts is not None:
            shifts.unused()
        return super().prepare_attn(
            input_batch, cudagraph_mode, block_tables, slot_mappings, *arguments, **kwargs
        )

    def _prepare_members(
        self,
        shifts: MemberShifts,
        prompts: list[MemberPrompts | None] | None,
        batch: InputBatch,
        mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slots: torch.Tensor,
        attn_groups: list[list[AttentionGroup]],
        *arguments: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Build each member's metadata from its own tensors; arguments as in `prepare_attn`."""
        requests, tokens = len(block_tables[0]), slots.shape[1]
        metadata: dict[str, Any] = {}
        bound, groups = batch.seq_lens_cpu_upper_bound, self._cache_groups(block_tables)
        shared = batch.seq_lens[:requests], groups, slots, int(bound[:requests].max())
        bounds = bound.expand(len(shifts.roles), -1)
        if prompts is None:
            shifts.share(*shared)
        else:
            offsets = offsets_of(prompts, shifts.roles)
            shifts.shift(offsets, batch.num_scheduled_tokens, batch.positions, *shared)
            bounds = bounds.clone()
            bounds[:, : batch.num_reqs] -= torch.from_numpy(offsets)
        for i, role in enumerate(shifts.roles):
            seq_lens = shifts.seq_lens[i, :requests]
            its_groups = [
                [group for group in groups if role_of(group.layer_names[0]) == role]
                for groups in attn_groups
            ]
            metadata |= super().prepare_attn(
                replace(batch, seq_lens=seq_lens, seq_lens_cpu_upper_bound=bounds[i]),
                mode,
                tuple(tables[i, :requests] for tables in shifts.tables),
                shifts.slots[i, :, :tokens],
                its_groups,
                *arguments,
                **kwargs,
            )
        return metadata

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """Return vLLM's model arguments and ours; set the step's controls and adapters."""
        if self.model.sight is not None:
            self.model.sight.places[: len(input_batch.positions)] = input_batch.positions
        starts = input_batch.query_start_loc[: input_batch.num_reqs + 1]
        if (rows := self.overrides.rows_of(input_batch.req_ids)) is None:
            self.model.use_default_controls()
        else:
            self.model.use_controls(
                rows,
                starts,
                input_batch.positions,
                req_states.prompt_len.gpu[input_batch.idx_mapping],
                self.overrides.probes_of(input_batch.req_ids),
                self.overrides.unshifted_of(input_batch.req_ids),
            )
        slots = self.overrides.slots_of(input_batch.req_ids)
        self.model.use_experts(slots, starts, len(input_batch.positions))
        inputs = super().prepare_inputs(input_batch, req_states)
        batch, self.batch = self.batch, None
        return inputs if batch is None else {**inputs, "members": batch.members()}


class ProxyHybridState(ProxyModelState, MambaHybridModelState):
    """The same for members of which some have recurrent layers."""


class ProxyRunnerV2(GPUModelRunner):
    """Mixed into the platform's runner class: chooses graphs by the members' prompts."""

    model_state: ProxyModelState

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        """Do what vLLM does. Let the manager of graphs see the batch, and capture for drafts."""
        super().initialize_kv_cache(*args, **kwargs)
        assert self.cudagraph_manager is not None
        self.cudagraph_manager.__class__ = MemberGraphs
        speculate = proxy_section(self.model_config).speculate
        if speculate is not None:  # on all pipeline ranks: they must pad batches equally
            requests = most_requests(self.vllm_config)
            capture_every_length(self.cudagraph_manager, speculate.tokens, requests)

    def gather_batch_req_state(
        self, scheduler_output: "SchedulerOutput", dummy_run: bool
    ) -> tuple[Any, int | None]:
        """Note whether members have different rows. vLLM chooses a graph next."""
        batch, uniform = super().gather_batch_req_state(scheduler_output, dummy_run)
        state = self.model_state
        if batch is None:
            state.look_at((), ())
        else:
            state.look_at(batch.req_ids, batch.is_prefilling_np)
        if isinstance(manager := self.cudagraph_manager, MemberGraphs):  # None in a profile run
            manager.prompts_differ = state.prompts is not None
            manager.rows_differ = state.rows_differ
        return batch, uniform


class MemberGraphs(ModelCudaGraphManager):
    """Does not replay a graph of all members where they have different rows.

    Attributes:
        prompts_differ: whether a request of this step has different prompts for members.
        rows_differ: whether one of them has tokens of its prompt left: `alignment.rows_differ`.
    """

    prompts_differ = rows_differ = False

    def dispatch(
        self,
        num_reqs: int,
        num_tokens: int,
        uniform_token_count: int | None,
        num_active_loras: int,
        *args: Any,
        **kwargs: Any,
    ) -> BatchExecutionDescriptor:
        """Find a graph for the step; arguments as in vLLM."""
        if self.rows_differ:
            uniform_token_count = None  # graphs for decoding need one
        found = super().dispatch(
            num_reqs, num_tokens, uniform_token_count, num_active_loras, *args, **kwargs
        )
        # Breakable graphs are piecewise, and contain what passes members their inputs.
        differ = self.prompts_differ if self.use_breakable_cg else self.rows_differ
        bad = CUDAGraphMode.PIECEWISE if self.use_breakable_cg else CUDAGraphMode.FULL
        if not differ or found.cg_mode != bad:
            return found
        return BatchExecutionDescriptor(
            cg_mode=CUDAGraphMode.NONE,
            num_tokens=num_tokens,
            num_reqs=num_reqs,
            num_active_loras=found.num_active_loras,
        )
