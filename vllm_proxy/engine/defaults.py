"""Environment variables that vLLM reads on a CPU: our defaults for those that are not set."""

import os

FEW_CORES = 4
"""Up to this many CPU cores, workers get all of them, unless `VLLM_CPU_NUM_OF_RESERVED_CPU` is set.
vLLM reserves one for its scheduler, which hardly uses it: on two cores, a batch takes 1.3 to 1.6
times as long with one core idle (`benchmarks/LOG.md`)."""


def set_cpu_defaults() -> None:
    """Set the variables that the user has not set."""
    # On a CPU, where torch compiles the whole model instead of vLLM its pieces, vLLM (0.32, 0.33)
    # saves what was compiled ahead of time but cannot load it ("'function' object has no attribute
    # 'finalize_loading'"), and compiles every model again at every start. Inductor's cache works.
    os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
    if (os.cpu_count() or 1) <= FEW_CORES:
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
