"""What the members' layers store, as vLLM's KV cache manager is to see it."""

from dataclasses import replace
from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec

from vllm_proxy.engine.admission import admits_prompts
from vllm_proxy.model.kernels import joint_specs

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
else:
    GPUModelRunner = object  # a mixin: `ProxyWorkerMixin` adds the platform's runner class


class MemberCaches(GPUModelRunner):
    """Mixed into a runner class, which vLLM also asks while it measures memory for CUDA graphs."""

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
