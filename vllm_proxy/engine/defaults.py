"""What vLLM on a CPU reads from the environment, where the user has not set it."""

import os

FEW_CORES = 4
"""So many CPU cores are all given to workers, unless `VLLM_CPU_NUM_OF_RESERVED_CPU` is set. vLLM
leaves one to its scheduler, which needs little of it: on two cores, a batch takes 1.3 to 1.6 times
as long with one left idle (`benchmarks/LOG.md`)."""


def set_cpu_defaults() -> None:
    """Set what vLLM on a CPU reads from the environment, where the user has not."""
    # vLLM (0.32) saves what it compiled ahead of time there but cannot load it back, and compiles
    # every model again at every start. Inductor's own cache does its work.
    os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
    if (os.cpu_count() or 1) <= FEW_CORES:
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
