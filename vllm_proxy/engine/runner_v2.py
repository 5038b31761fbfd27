"""Model Runner V2: per-request values enter in the `ModelState` of our model."""

from typing import Any

import torch
from torch import nn
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from vllm_proxy.engine.requests import RequestOverrides
from vllm_proxy.model.alignment import StepBatch


class ProxyModelState(DefaultModelState):
    """Passes per-request controls and prompts from vLLM's batch to the model."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: nn.Module,
        encoder_cache: EncoderCache | None,
        device: torch.device,
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.overrides = RequestOverrides(model)
        self.block_size = 0
        self.batch: StepBatch | None = None

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, block_tables: BlockTables
    ) -> None:
        """Note the block size of the tables that `prepare_attn` gets."""
        super().initialize_kv_cache(kv_cache_config, block_tables)
        self.block_size = block_tables.block_sizes[0]

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Read the values of a request."""
        super().add_request(req_index, new_req_data)
        self.overrides.add(new_req_data)

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
        """Build vLLM's metadata, and note the batch if members have different prompts."""
        prompts = self.overrides.prompts_of(input_batch.req_ids)
        self.batch = None
        if prompts is not None:
            self.batch = StepBatch(
                prompts=prompts,
                scheduled=input_batch.num_scheduled_tokens,
                computed=input_batch.num_computed_tokens_np,
                is_prefilling=input_batch.is_prefilling_np,
                input_ids=input_batch.input_ids,
                positions=input_batch.positions,
                seq_lens=input_batch.seq_lens,
                block_table=block_tables[0],
                block_size=self.block_size,
                attn_groups=attn_groups[0],
            )
        return super().prepare_attn(
            input_batch,
            cudagraph_mode,
            block_tables,
            slot_mappings,
            attn_groups,
            kv_cache_config,
            for_capture,
            **kwargs,
        )

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """Return vLLM's model arguments and ours, and set the controls of the step's logits."""
        if (rows := self.overrides.rows_of(input_batch.req_ids)) is None:
            self.model.use_default_controls()
        else:
            self.model.use_controls(
                rows,
                input_batch.query_start_loc[: input_batch.num_reqs + 1],
                input_batch.positions,
                req_states.prompt_len.gpu[input_batch.idx_mapping],
                self.overrides.probes_of(input_batch.req_ids),
            )
        inputs = super().prepare_inputs(input_batch, req_states)
        batch, self.batch = self.batch, None
        return inputs if batch is None else {**inputs, "members": batch.members()}
