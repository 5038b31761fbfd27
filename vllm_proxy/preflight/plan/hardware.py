"""Memory and speed of GPUs: from the vendor's data sheets, or measured on this machine."""

from dataclasses import dataclass
from typing import NamedTuple

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.preflight.plan.roofline import Roofline, measure

HERE = "here"
"""The name of this machine's device."""
_GIB = 2**30
_WORKSPACE = 3 * _GIB


class BatchLimits(NamedTuple):
    """Limits of one step: `max_num_batched_tokens` and `max_num_seqs`."""

    tokens: int
    requests: int


NO_BATCH = BatchLimits(0, 0)
_SMALL, _LARGE, _LARGEST = BatchLimits(2048, 256), BatchLimits(8192, 1024), BatchLimits(16384, 1024)
"""The defaults of vLLM's server by the GPU's memory (`EngineArgs.get_batch_defaults`)."""


@dataclass(frozen=True, slots=True)
class Link:
    """The connection between the GPUs of one machine.

    Attributes:
        kind: NVLink or PCIe.
        bytes_per_second: of one GPU, in one direction.
        latency: seconds that a collective takes even for little data: our assumption, not from the
            data sheet.
    """

    kind: str
    bytes_per_second: float
    latency: float


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device.

    Attributes:
        name: the value of `--gpu`.
        memory: bytes.
        roofline: memory bandwidth, and dense 16-bit arithmetic with float32 accumulators.
        link: connection to other GPUs of its kind; None if there is none, or it is not known.
        workspace: bytes set aside for CUDA graphs and libraries: our assumption.
        batch: most tokens and requests per step by default, as in vLLM's server.
        launches: whether a host launches the device's work, unless it is in a CUDA graph.
    """

    name: str
    memory: float
    roofline: Roofline
    link: Link | None
    workspace: float = _WORKSPACE
    batch: BatchLimits = _SMALL
    launches: bool = True


def _nvlink(gigabytes: float) -> Link:
    return Link("NVLink", gigabytes * 1e9, latency=10e-6)


_PCIE = Link("PCIe", 32e9, latency=30e-6)  # generation 4, 16 lanes
_ECC = 15 / 16  # the part of GDDR6 that is left: its check bits are in the same memory


def _gpu(
    name: str,
    gib: float,
    gigabytes: float,
    teraflops: float,
    link: Link,
    batch: BatchLimits = _SMALL,
) -> Hardware:
    roofline = Roofline(gigabytes * 1e9, teraflops * 1e12)
    return Hardware(name, gib * _GIB, roofline, link, batch=batch)


GPUS: dict[str, Hardware] = {
    gpu.name: gpu
    for gpu in (
        # memory (GiB), bandwidth (GB/s), dense bfloat16 (TFLOP/s), link in one direction (GB/s)
        _gpu("A100-40G", 40, 1555, 312, _nvlink(300)),
        _gpu("A100-80G", 80, 2039, 312, _nvlink(300)),
        _gpu("H100-80G", 80, 3350, 989, _nvlink(450), _LARGE),
        _gpu("H200-141G", 141, 4800, 989, _nvlink(450), _LARGE),
        _gpu("B200-180G", 180, 8000, 2250, _nvlink(900), _LARGEST),
        _gpu("L40S-48G", 48 * _ECC, 864, 362, _PCIE),
        _gpu("L4-24G", 24 * _ECC, 300, 121, _PCIE),
        _gpu("A10G-24G", 24 * _ECC, 600, 70, _PCIE),
        _gpu("RTX4090-24G", 24, 1008, 165, _PCIE),
    )
}
"""Figures from NVIDIA's data sheets; SXM modules for A100, H100, H200 and B200. Figures given with
sparsity are halved, and so are links given for both directions."""


def require_known(name: str) -> None:
    """Raise `ProxyConfigError` if no device has that name."""
    if name != HERE and name not in GPUS:
        raise ProxyConfigError(
            field="--gpu", value=name, remedy=f"use one of {', '.join((*GPUS, HERE))}"
        )


def find_hardware(name: str, dtype: str) -> Hardware:
    """Return the GPU with a known name; `here` is measured in *dtype*, which takes seconds."""
    return _here(dtype) if name == HERE else GPUS[name]


def _here(dtype: str) -> Hardware:
    import psutil
    import torch

    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return Hardware(HERE, free, measure("cuda", dtype), link=None)
    free = psutil.virtual_memory().available
    measured = measure("cpu", dtype)
    return Hardware(HERE, free, measured, link=None, workspace=_GIB, launches=False)
