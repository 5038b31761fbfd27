"""Sliding windows of the members' layers, as vLLM's KV cache manager is to see them."""

from dataclasses import replace
from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec

from vllm_proxy.engine.admission import admits_prompts
from vllm_proxy.model.kernels import in_one_window

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
else:
    GPUModelRunner = object  # a mixin: `ProxyWorkerMixin` adds the platform's runner class


class MemberWindows(GPUModelRunner):
    """Mixed into a runner class, which vLLM also asks while it measures memory for CUDA graphs."""

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """Let layers share a window where they must, and widen it where prompts may differ.

        A member with a different prompt has tokens up to a block before their virtual positions, by
        which vLLM frees blocks (`alignment.py`). Its attention has its own window.
        """
        specs = in_one_window(self.vllm_config, super().get_kv_cache_spec())
        if not admits_prompts(self.model_config):
            return specs
        return {
            name: replace(spec, sliding_window=spec.sliding_window + spec.block_size)
            if isinstance(spec, SlidingWindowSpec)
            else spec
            for name, spec in specs.items()
        }
