"""What a GPU has and can do: the vendor's data sheets, or this machine, measured."""

from dataclasses import dataclass
from typing import NamedTuple

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.preflight.plan.roofline import Roofline, measure

HERE = "here"
"""The name of the device that this machine has."""
_GIB = 2**30
_WORKSPACE = 3 * _GIB


class Batch(NamedTuple):
    """Most that a step does: `max_num_batched_tokens` and `max_num_seqs`."""

    tokens: int
    requests: int


NO_BATCH = Batch(0, 0)
_SMALL, _LARGE, _LARGEST = Batch(2048, 256), Batch(8192, 1024), Batch(16384, 1024)
"""What vLLM's server has for GPUs of so much memory (`EngineArgs.get_batch_defaults`)."""


@dataclass(frozen=True, slots=True)
class Link:
    """How GPUs of one machine reach each other.

    Attributes:
        kind: NVLink or PCIe.
        bytes_per_second: in one direction, of one GPU.
        latency: seconds that a collective takes however little it sends: our assumption, not the
            data sheet's.
    """

    kind: str
    bytes_per_second: float
    latency: float


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device.

    Attributes:
        name: as `--gpu` has it.
        memory: bytes.
        roofline: its memory bandwidth, and its dense 16-bit arithmetic with float32 accumulators.
        link: to others of its kind; None if there are none, or it is not known.
        workspace: bytes set aside for CUDA graphs and libraries: our assumption.
        batch: most tokens and requests of a step, if nothing is said: as vLLM's server has it.
    """

    name: str
    memory: float
    roofline: Roofline
    link: Link | None
    workspace: float = _WORKSPACE
    batch: Batch = _SMALL


def _nvlink(gigabytes: float) -> Link:
    return Link("NVLink", gigabytes * 1e9, latency=10e-6)


_PCIE = Link("PCIe", 32e9, latency=30e-6)  # generation 4, 16 lanes
_ECC = 15 / 16  # of GDDR6, where the check bits are kept in the same memory


def _gpu(
    name: str,
    gib: float,
    gigabytes: float,
    teraflops: float,
    link: Link,
    batch: Batch = _SMALL,
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
"""The figures of NVIDIA's data sheets: SXM modules of A100, H100, H200 and B200; figures that are
given with sparsity are halved, links that are given for both directions as well."""


def require_known(name: str) -> None:
    """Raise `ProxyConfigError` if no device has that name."""
    if name != HERE and name not in GPUS:
        raise ProxyConfigError(f"--gpu is {name!r}; use one of {', '.join((*GPUS, HERE))}")


def find_hardware(name: str, dtype: str) -> Hardware:
    """Return the GPU of a known name; `here` is measured in *dtype*, which takes some seconds."""
    return _here(dtype) if name == HERE else GPUS[name]


def _here(dtype: str) -> Hardware:
    import psutil
    import torch

    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return Hardware(HERE, free, measure("cuda", dtype), link=None)
    free = psutil.virtual_memory().available
    return Hardware(HERE, free, measure("cpu", dtype), link=None, workspace=_GIB)
