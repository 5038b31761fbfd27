"""The physical limit of a device: its memory bandwidth and arithmetic; measured for this machine.

The model of Williams, Waterman and Patterson (2009): work takes the time to move its bytes or the
time of its arithmetic, whichever is longer.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

_REPEATS = 9


@dataclass(frozen=True, slots=True)
class Roofline:
    """The limits of a device.

    Attributes:
        bytes_per_second: bytes read from memory per second.
        flops: multiplications and additions per second, in the given dtype or, where that is
            faster, in float32.
    """

    bytes_per_second: float
    flops: float

    def seconds(self, bytes_moved: float, operations: float) -> float:
        """Return the least time to move these bytes and do these multiplications and additions."""
        return max(bytes_moved / self.bytes_per_second, operations / self.flops)


def measure(device: str, dtype: str) -> Roofline:
    """Measure, with all cores, a sum over memory much larger than caches, and square products.

    The best of several tries, because other work on the device may slow a try down.
    """
    import torch

    result = Roofline(_bandwidth(device), _flops(device, dtype))
    if device == "cuda":  # the engines need the memory
        torch.cuda.empty_cache()
    return result


def _bandwidth(device: str) -> float:
    import torch

    read = torch.ones(2**28 if device == "cuda" else 2**27, device=device)
    return read.nbytes / _seconds(read.sum)


def _flops(device: str, dtype: str) -> float:
    import torch

    flops, size = 0.0, 8192 if device == "cuda" else 2048
    for kind in {torch.float32, getattr(torch, dtype)}:
        if device == "cpu" and kind != torch.float32 and not torch.cpu._is_avx512_bf16_supported():
            continue  # emulated, and slower by two orders of magnitude
        a = torch.randn(size, size, device=device).to(kind)
        flops = max(flops, 2 * size**3 / _seconds(partial(torch.mm, a, a)))
    return flops


def _seconds(run: Callable[[], object]) -> float:
    import torch

    def timed() -> float:
        started = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started

    timed()
    return min(timed() for _ in range(_REPEATS))
