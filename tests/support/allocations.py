"""How much memory a piece of code holds at most, by PyTorch's own account of a CPU's allocator."""

from collections.abc import Callable
from itertools import accumulate

from torch.profiler import ProfilerActivity, profile


def peak_bytes(code: Callable[[], object]) -> int:
    """Run *code* and return the most bytes that tensors hold at once, above those at its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        code()
    events = found.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate((size for _, size in changes), initial=0))
