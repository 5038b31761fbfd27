"""How engines are spread over GPUs, and which layers of a member each GPU has."""

from collections.abc import Iterator
from typing import NamedTuple


class Layout(NamedTuple):
    """A way to spread engines over GPUs.

    Attributes:
        tp: ranks that share every layer (`tensor_parallel_size`).
        pp: stages, each with some layers of every member (`pipeline_parallel_size`); of a member
            through which drafts run, the last stage has all.
        replicas: engines among which the requests are divided.
    """

    tp: int = 1
    pp: int = 1
    replicas: int = 1

    def __str__(self) -> str:
        return f"TP {self.tp} x PP {self.pp}" + (f" x {self.replicas}" if self.replicas > 1 else "")

    def layers(self, total: int, stage: int) -> range:
        """Return which of *total* layers a stage has, as in vLLM's `get_pp_indices`.

        Layers left over by the division go to the stages before the last one, which has the head.
        """
        counts = [total // self.pp] * self.pp
        for i in range(total % self.pp):
            counts[-2 - i] += 1
        start = sum(counts[:stage])
        return range(start, start + counts[stage])

    def is_last(self, stage: int) -> bool:
        """Whether the stage has the heads."""
        return stage == self.pp - 1


def layouts(gpus: int) -> Iterator[Layout]:
    """Yield every layout of this number of GPUs, those with few replicas first."""
    for engine in range(gpus, 0, -1):
        if gpus % engine == 0:
            for tp in range(engine, 0, -1):
                if engine % tp == 0:
                    yield Layout(tp, engine // tp, gpus // engine)
