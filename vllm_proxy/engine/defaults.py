"""What vLLM reads on a CPU: our defaults for what is not set."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm_proxy.members.recurrent import is_recurrent

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

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


def avoid_wrong_kernels(config: "VllmConfig", members: Iterable["ModelConfig"]) -> None:
    """Have rotary embeddings computed by torch where vLLM's kernel for CPUs (0.32) is wrong.

    It takes queries of three dimensions, as LFM2 and latent attention have them, for some of two:
    so vLLM alone is wrong.

    Args:
        config: the engine's, which is changed unless the user has chosen (`custom_ops`).
        members: all of them.
    """
    chosen = config.compilation_config.custom_ops
    is_open = not {"+rotary_embedding", "-rotary_embedding"} & {*chosen}
    if is_open and any(m.use_mla or m.architecture.startswith("Lfm2") for m in members):
        chosen.append("-rotary_embedding")


def caches_no_prefixes(base: "ModelConfig", members: Iterable["ModelConfig"]) -> bool:
    """Return whether no prefixes can be cached on a CPU: states beside a base's latent attention.

    vLLM forbids it for such a base, but only after it has set up states for it, which it then
    rejects (`mamba_block_size`).
    """
    return base.use_mla and any(map(is_recurrent, members))
