"""Model Runner V1: per-request values enter by `_model_forward`, which is made for overriding.

The workers here carry V2 as well, where the expert drafts: nothing else of V2 needs one of ours.
"""

from typing import TYPE_CHECKING, Any

import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu_worker import Worker

from vllm_proxy.compatibility import require_part
from vllm_proxy.members.vllm_configs import proxy_section
from vllm_proxy.model.alignment import Batch
from vllm_proxy.runner.requests import OwnRequests
from vllm_proxy.runner.validation import without_ours

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class _Runner:
    """Mixed into the platform's runner class: requests' own controls and prompts."""

    own: OwnRequests | None = None

    def _update_states(self, scheduler_output: "SchedulerOutput") -> Any:
        result = super()._update_states(scheduler_output)
        if self.own is None:
            self.own = OwnRequests(self.get_model())
        for req_id in scheduler_output.finished_req_ids:
            self.own.remove(req_id)
        for request in scheduler_output.scheduled_new_reqs:
            self.own.add(request)
        return result

    def _model_forward(
        self,
        input_ids: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        batch, requests = self.input_batch, self.input_batch.num_reqs
        req_ids = batch.req_ids[:requests]
        if (rows := self.own.rows_of(req_ids)) is None:
            self.own.model.use_default_controls()
        else:
            self.own.model.use_controls(
                rows,
                self.query_start_loc.gpu[: requests + 1],
                positions,
                async_tensor_h2d(batch.num_prompt_tokens_cpu_tensor[:requests], positions.device),
                self.own.probes_of(req_ids),
            )
        if (prompts := self.own.prompts_of(req_ids)) is not None:
            starts = self.query_start_loc.np[: requests + 1]
            computed = batch.num_computed_tokens_cpu[:requests]
            kwargs["members"] = Batch(
                prompts=prompts,
                scheduled=starts[1:] - starts[:-1],
                computed=computed,
                is_prefilling=computed < batch.num_prompt_tokens_cpu_tensor[:requests].numpy(),
                input_ids=input_ids,
                positions=positions,
                seq_lens=self.seq_lens,
                block_table=batch.block_table[0].get_device_tensor(requests),
                block_size=batch.block_table[0].block_size,
                attn_groups=self.attn_groups[0],
            ).members()
        return super()._model_forward(input_ids, positions, *args, **kwargs)


class ProxyWorkerMixin:
    """Gives a platform's worker our runner, and our drafter."""

    def init_device(self) -> None:
        """Make the runner, and add ours to its class."""
        # vLLM refuses processors beside speculation; ours validates, before a request gets here.
        with without_ours(self.model_config):
            super().init_device()
        runner: GPUModelRunner = self.model_runner
        is_v2 = self.vllm_config.use_v2_model_runner
        if not is_v2:
            cls = type(runner)
            runner.__class__ = type(f"Proxy{cls.__name__}", (_Runner, cls), {})
        if proxy_section(self.model_config).speculate is not None:
            require_part("drafts of V2" if is_v2 else "drafts of V1")
            if is_v2:
                from vllm_proxy.runner.draft_v2 import ExpertSpeculator as Ours
            else:
                from vllm_proxy.runner.draft_v1 import ExpertProposer as Ours
            Ours.take_over(runner)


class ProxyWorker(ProxyWorkerMixin, Worker):
    """vLLM's GPU worker, with our runner."""
