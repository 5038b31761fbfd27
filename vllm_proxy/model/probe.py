"""Inspection inside a worker: which tokens of a request are inspected, and what was measured.

To inspect an answer, `ProxyLLM` sends a request whose prompt is the original prompt and the answer
without its last token. The last n rows of that prompt predict the n tokens of the answer. (Prompts
that are lengthened because members have different ones grow on the left.) All of these rows but the
last are rows of prompt logprobs; the last one is the row that vLLM samples from.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_proxy.config.request import INSPECTED
from vllm_proxy.model.measure import Measured


class TokenStats(NamedTuple):
    """The measurements of n tokens, as in `measure.Measured`, on the host.

    Attributes:
        logprobs: `[n, 4]`, float32.
        ranks: `[n, 4]`, int32.
        top_ids: `[n, 4, k]`, int32.
        top_logprobs: `[n, 4, k]`, float32.
        kl: `[n]`, float32.
    """

    logprobs: np.ndarray
    ranks: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray
    kl: np.ndarray

    @classmethod
    def empty(cls, n: int, k: int) -> "TokenStats":
        """Return arrays for *n* tokens that are not measured yet."""
        shapes = (n, 4), (n, 4), (n, 4, k), (n, 4, k), (n,)
        dtypes = np.float32, np.int32, np.int32, np.float32, np.float32
        return cls(
            *(
                np.full(s, -np.inf, d) if d == np.float32 else np.zeros(s, d)
                for s, d in zip(shapes, dtypes, strict=True)
            )
        )

    def pack(self) -> list[bytes]:
        """Return the arrays as bytes: vLLM's messages between processes cannot hold arrays."""
        return [array.tobytes() for array in self]

    @classmethod
    def unpack(cls, packed: Sequence[bytes], n: int) -> "TokenStats":
        """Return what `pack` packed for *n* tokens."""
        k = len(packed[2]) // (16 * n)  # `top_ids`: 4 distributions of int32
        empty = cls.empty(0, k)
        return cls(
            *(
                np.frombuffer(data, like.dtype).reshape(n, *like.shape[1:])
                for data, like in zip(packed, empty, strict=True)
            )
        )


class InspectionRequest:
    """The inspected tokens of one request, in order, and what was measured so far."""

    def __init__(self, extra_args: Mapping[str, Any]) -> None:
        wanted = extra_args[INSPECTED]
        self.tokens: list[int] = wanted["token_ids"]
        self.top_k: int = wanted["top_k"]
        self.stats = TokenStats.empty(len(self.tokens), self.top_k)
        self.is_done: np.ndarray = np.zeros(len(self.tokens), dtype=bool)


class ProbedStep:
    """The inspected requests of one step.

    A row's *place* is the index of its token among the inspected tokens of all these requests.

    Args:
        probes: `[requests]`; None for a request that is not inspected.
        device: of the rows.

    Attributes:
        counts: `[requests]`: how many tokens of each request are inspected.
        starts: `[requests]`: the place of the first of them.
        ends: `[inspected requests]`, on the host: the place after the last one of each.
        tokens: `[places]`, int64.
        top_k: the largest of the requests' `top_k`.
    """

    def __init__(self, probes: Sequence[InspectionRequest | None], device: torch.device) -> None:
        self.probes = [probe for probe in probes if probe is not None]
        counts = np.array([len(probe.tokens) if probe else 0 for probe in probes])
        self.ends = np.cumsum(counts[counts > 0])
        self.counts = async_tensor_h2d(counts, device)
        self.starts = async_tensor_h2d(np.cumsum(counts) - counts, device)
        tokens = np.concatenate([np.array(probe.tokens) for probe in self.probes])
        self.tokens = async_tensor_h2d(tokens, device, torch.int64)
        self.top_k = max(probe.top_k for probe in self.probes)

    def unmeasured(self, places: np.ndarray) -> np.ndarray:
        """Return the indices of the rows that are inspected and not measured yet.

        vLLM computes the logits of a row twice if the row is the last one of a prompt's chunk.

        Args:
            places: `[R]`; -1 for rows that are not inspected.
        """
        rows = np.flatnonzero(places >= 0)
        owners = np.atleast_1d(np.searchsorted(self.ends, places[rows], side="right"))
        is_new = [
            not self.probes[owner].is_done[self._index(owner, place)]
            for owner, place in zip(owners.tolist(), places[rows].tolist(), strict=True)
        ]
        return rows[np.array(is_new, dtype=bool)]

    def _index(self, owner: int, place: int) -> int:
        return place - (self.ends[owner - 1] if owner else 0)

    def store(self, places: np.ndarray, measured: Measured) -> None:
        """Store what was measured at the places `[R]`. Waits for the device."""
        found = [tensor.cpu().numpy() for tensor in measured]
        for row, place in enumerate(places):
            owner = int(np.searchsorted(self.ends, place, side="right"))
            probe, index = self.probes[owner], self._index(owner, place)
            for stored, values in zip(probe.stats, found, strict=True):
                if stored.ndim < 3:
                    stored[index] = values[row]
                else:  # the vocabulary may have fewer tokens than `top_k`
                    width = min(probe.top_k, values.shape[-1])
                    stored[index, :, :width] = values[row, :, :width]
            probe.is_done[index] = True
