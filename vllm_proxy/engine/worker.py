"""Our worker: vLLM's, with our runner, drafts, live weights and windows of the KV cache.

Under Model Runner V2 most per-request values need no worker, see `runner_v2.py`.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from vllm.distributed import get_pp_group
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec
from vllm.v1.worker.gpu_worker import Worker

from vllm_proxy.engine.admission import admits_prompts, without_ours
from vllm_proxy.engine.compatibility import require_part
from vllm_proxy.engine.live_weights import LiveWeightsMixin
from vllm_proxy.engine.runner_v1 import ProxyRunner
from vllm_proxy.members.vllm_configs import proxy_section
from vllm_proxy.model.kernels import joint_specs

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
        runner.__class__ = type(f"Proxy{cls.__name__}", (mixin, cls), {})
        if proxy_section(self.model_config).speculate is not None:
            require_part("drafts of V2" if is_v2 else "drafts of V1")
            if is_v2:
                from vllm_proxy.engine.drafting.v2 import ExpertSpeculator as Ours
            else:
                from vllm_proxy.engine.drafting.v1 import ExpertProposer as Ours
            if get_pp_group().is_last_rank:
                Ours.take_over(runner)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """Return what each layer stores, as members need it together.

        Windows are wider by a block where members may have different prompts: such a member's
        tokens are up to a block before their virtual positions, by which vLLM frees blocks
        (`alignment.py`). Its attention has its own window.
        """
        specs = joint_specs(self.vllm_config, super().get_kv_cache_spec())
        if not admits_prompts(self.model_config):
            return specs
        return {
            name: replace(spec, sliding_window=spec.sliding_window + spec.block_size)
            if isinstance(spec, SlidingWindowSpec)
            else spec
            for name, spec in specs.items()
        }


class ProxyWorker(ProxyWorkerMixin, Worker):
    """vLLM's GPU worker with our runner."""
