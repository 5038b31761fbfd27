"""Model Runner V1: per-request values enter in `_model_forward`, which vLLM has for overriding."""

from typing import TYPE_CHECKING, Any

import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_proxy.engine.requests import RequestOverrides
from vllm_proxy.model.alignment import CacheGroup, StepBatch

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
else:
    GPUModelRunner = object  # a mixin: `ProxyWorkerMixin` adds the platform's runner class


class ProxyRunner(GPUModelRunner):
    """Mixed into the platform's runner class: per-request controls and prompts."""

    overrides: RequestOverrides | None = None

    def _update_states(self, scheduler_output: "SchedulerOutput") -> Any:
        result = super()._update_states(scheduler_output)
        if self.overrides is None:
            self.overrides = RequestOverrides(self.get_model())
        for req_id in scheduler_output.finished_req_ids:
            self.overrides.remove(req_id)
        for request in scheduler_output.scheduled_new_reqs:
            self.overrides.add(request)
        return result

    def _model_forward(
        self,
        input_ids: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        overrides = self.overrides
        assert overrides is not None  # `_update_states` comes first
        assert positions is not None  # only models with prompt embeddings have none
        plain = positions
        if overrides.model.sight is not None:
            plain = self.positions[: positions.shape[-1]]
            overrides.model.sight.places[: len(plain)] = plain
        batch, requests = self.input_batch, self.input_batch.num_reqs
        req_ids = batch.req_ids[:requests]
        starts = self.query_start_loc.gpu[: requests + 1]
        if (rows := overrides.rows_of(req_ids)) is None:
            overrides.model.use_default_controls()
        else:
            overrides.model.use_controls(
                rows,
                starts,
                plain,
                async_tensor_h2d(batch.num_prompt_tokens_cpu_tensor[:requests], positions.device),
                overrides.probes_of(req_ids),
                overrides.unshifted_of(req_ids),
            )
        overrides.model.use_experts(overrides.slots_of(req_ids), starts, plain.shape[-1])
        if (prompts := overrides.prompts_of(req_ids)) is not None:
            begins = self.query_start_loc.np[: requests + 1]
            computed = batch.num_computed_tokens_cpu[:requests]
            kwargs["members"] = StepBatch(
                prompts=prompts,
                scheduled=begins[1:] - begins[:-1],
                computed=computed,
                is_prefilling=computed < batch.num_prompt_tokens_cpu_tensor[:requests].numpy(),
                input_ids=input_ids,
                positions=positions,
                seq_lens=self.seq_lens,
                groups=[
                    CacheGroup(
                        block_table=batch.block_table[0].get_device_tensor(requests),
                        block_size=batch.block_table[0].block_size,
                        attn_groups=self.attn_groups[0],
                    )
                ],
            ).members()
        return super()._model_forward(input_ids, positions, *args, **kwargs)
