"""Gives vLLM's CPU platform and worker what they lack to capture and replay graphs."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from vllm.config import CUDAGraphMode

from graphs_on_cpu import recorder

BACKEND = "graphs_on_cpu.attention.GraphAttention"
PIECE = "vllm.compilation.cuda_graph.CUDAGraphWrapper"  # as on GPUs
steps: Counter[str] = Counter()
"""Steps by the kind of graph that they replayed: `FULL`, `PIECEWISE` or `NONE`; with ` own` behind
it, those in which a request had different prompts for members."""


def register() -> None:
    """Patch vLLM and torch where `GRAPHS_ON_CPU` is set; a second call is a no-op."""
    if "GRAPHS_ON_CPU" not in os.environ or torch.cuda.CUDAGraph is recorder.CPUGraph:
        return
    stand_in_for_cuda()
    let_the_platform_have_graphs()
    let_the_worker_capture()
    count_steps()
    compile_without_kernels()
    record_launches()


def stand_in_for_cuda() -> None:
    torch.cuda.CUDAGraph = recorder.CPUGraph
    torch.cuda.graph = recorder.graph
    torch.accelerator.empty_cache = lambda: None
    torch.accelerator.synchronize = lambda *_: None
    torch.accelerator.get_memory_info = lambda *_: (0, 0)

    from vllm.compilation import breakable_cudagraph, cuda_graph
    from vllm.v1.worker.gpu import cudagraph_utils

    @contextmanager
    def capture_pool(pool: Any, _: Any) -> Iterator[Any]:
        yield pool

    cudagraph_utils.graph_capture = lambda device: nullcontext()
    for module in (cudagraph_utils, cuda_graph, breakable_cudagraph):
        module.capture_pool = capture_pool
    for module in (cuda_graph, breakable_cudagraph):
        module.weak_ref_tensors = lambda tensors: torch.utils._pytree.tree_map(
            recorder.weak_ref, tensors
        )
    breakable_cudagraph.weak_ref_tensor = recorder.weak_ref


def let_the_platform_have_graphs() -> None:
    from vllm.platforms.cpu import CpuPlatform

    configure = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        """As the CPU's, which leaves out graphs, vLLM's own compilation and async scheduling."""
        ours, scheduler = vllm_config.compilation_config, vllm_config.scheduler_config
        is_async = scheduler.async_scheduling
        names = "mode", "backend", "cudagraph_mode", "cudagraph_capture_sizes"
        before = {name: getattr(ours, name) for name in names}
        configure(cls, vllm_config)
        if "ASYNC_ON_CPU" in os.environ:
            scheduler.async_scheduling = is_async
        if before["cudagraph_mode"] != CUDAGraphMode.NONE:
            for name, value in before.items():
                setattr(ours, name, value)

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    CpuPlatform.support_static_graph_mode = classmethod(lambda _: True)
    CpuPlatform.graph_pool_handle = classmethod(lambda _: (0, 1))
    CpuPlatform.get_static_graph_wrapper_cls = classmethod(lambda _: PIECE)
    CpuPlatform.get_attn_backend_cls = classmethod(lambda *_, **__: BACKEND)


def let_the_worker_capture() -> None:
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.workspace import init_workspace_manager

    warm_up = CPUWorker.compile_or_warm_up_model

    def compile_or_warm_up_model(self: Any) -> Any:
        """As the CPU's, and then what the GPU's does last."""
        result = warm_up(self)
        if self.compilation_config.cudagraph_mode != CUDAGraphMode.NONE:
            init_workspace_manager(self.device, 1)
            self.model_runner.capture_model()
        steps.clear()
        return result

    CPUWorker.compile_or_warm_up_model = compile_or_warm_up_model
    CPUWorker.graph_steps = lambda self: dict(steps)  # for `collective_rpc`


def count_steps() -> None:
    from vllm.v1.worker.gpu import model_runner

    dispatch = model_runner.dispatch_cg_and_sync_dp

    def dispatch_cg_and_sync_dp(manager: Any, *args: Any, **kwargs: Any) -> Any:
        found, sync = dispatch(manager, *args, **kwargs)
        steps[found.cg_mode.name + " own" * getattr(manager, "prompts_differ", False)] += 1
        return found, sync

    model_runner.dispatch_cg_and_sync_dp = dispatch_cg_and_sync_dp


def compile_without_kernels() -> None:
    """vLLM's passes fuse kernels for GPUs. Pieces of a model that run eagerly need none."""
    from vllm.compilation.backends import VllmBackend

    VllmBackend.configure_post_pass = lambda self: None


def record_launches() -> None:
    from triton.runtime.interpreter import GridExecutor

    call = GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        recording = recorder.Recording.current
        if recording is None:
            return call(self, *args, **kwargs)
        with torch.utils._python_dispatch._disable_current_modes():
            result = call(self, *args, **kwargs)
        recording.record_launch(lambda *a, **k: call(self, *a, **k), args, kwargs)
        return result

    GridExecutor.__call__ = launch
