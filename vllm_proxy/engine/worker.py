"""Our worker: vLLM's, with our runner, drafts and live weights.

Under Model Runner V2 most per-request values need no worker, see `runner_v2.py`.
"""

from typing import TYPE_CHECKING

from vllm.distributed import get_pp_group
from vllm.v1.worker.gpu_worker import Worker

from vllm_proxy.engine.admission import without_ours
from vllm_proxy.engine.cache_specs import MemberCaches
from vllm_proxy.engine.compatibility import require_part
from vllm_proxy.engine.live_weights import LiveWeightsMixin
from vllm_proxy.engine.runner_v1 import ProxyRunner
from vllm_proxy.members.vllm_configs import proxy_section

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class ProxyWorkerMixin(LiveWeightsMixin):
    """Gives a platform's worker our runner, our drafter, and live weights."""

    def init_device(self) -> None:
        """Make vLLM's runner, and mix ours into its class."""
        # vLLM rejects logits processors with speculation. Ours only checks requests, at admission.
        with without_ours(self.model_config):
            super().init_device()
        runner: GPUModelRunner = self.model_runner
        is_v2 = self.vllm_config.use_v2_model_runner
        mixin = ProxyRunner
        if is_v2:
            from vllm_proxy.engine.runner_v2 import ProxyRunnerV2 as mixin
        cls = type(runner)
        runner.__class__ = type(f"Proxy{cls.__name__}", (mixin, MemberCaches, cls), {})
        if proxy_section(self.model_config).speculate is not None:
            require_part("drafts of V2" if is_v2 else "drafts of V1")
            if is_v2:
                from vllm_proxy.engine.drafting.v2 import ExpertSpeculator as Ours
            else:
                from vllm_proxy.engine.drafting.v1 import ExpertProposer as Ours
            if get_pp_group().is_last_rank:
                Ours.take_over(runner)


class ProxyWorker(ProxyWorkerMixin, Worker):
    """vLLM's GPU worker with our runner."""
