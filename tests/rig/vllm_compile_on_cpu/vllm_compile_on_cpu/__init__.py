"""vLLM's own compilation, piece by piece and saved ahead of time, as on GPUs."""

from typing import Any


def register() -> None:
    """Patch vLLM; a second call is a no-op."""
    from vllm.compilation.backends import VllmBackend
    from vllm.platforms.cpu import CpuPlatform

    configure = CpuPlatform.check_and_update_config.__func__
    if configure.__module__ == __name__:
        return

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        """As the CPU's, which replaces vLLM's compilation by torch's."""
        ours = vllm_config.compilation_config
        chosen = ours.mode, ours.backend
        configure(cls, vllm_config)
        ours.mode, ours.backend = chosen
        ours.compile_sizes = ours.compile_sizes or []  # set where graphs are captured

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    # The passes fuse kernels for GPUs.
    VllmBackend.configure_post_pass = lambda self: None
