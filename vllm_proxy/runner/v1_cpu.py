"""Model Runner V1 on a CPU: apart, for vLLM's CPU worker is not to be imported elsewhere."""

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_proxy.runner.v1 import ProxyWorkerMixin


class ProxyCPUWorker(ProxyWorkerMixin, CPUWorker):
    """vLLM's CPU worker, with our runner."""
