"""`DraftLengths`: chooses the number of drafts per step that gives the most tokens per second.

Let p be the probability that a request's first draft is accepted, and q that of a draft after an
accepted one. A pass that verifies k drafts then makes

    1 + p + pq + … + pq^(k-1)       (for p = q: Leviathan et al. 2023, arXiv 2211.17192, eq. 1)

tokens per request. If drafts are accepted for some requests and not for others, p is low and q is
high. Both are estimated from drafts. The time of a step with k drafts is measured; for a k that was
never tried, it is interpolated. The k with the most tokens per second is chosen, and so measured.

It may be 0. Then a single draft is tried now and then, more and more rarely, to find out whether
drafts pay by now. Times are kept per size of batch, in powers of two. Another size is measured only
if drafts could pay there.

vLLM 0.32 has `acceptance_estimator.py` and `adaptive_verification.py`, but only for DSpark drafts.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

MEMORY = 16
"""About this many of the last times count, and of the last drafts per running request (at least two
requests)."""
ENOUGH = 3
"""A step's time is known after this many measurements."""
PATIENCE = 8 * ENOUGH
"""Give up waiting for a clean timing after this many steps (a step that also ran a prompt cannot be
timed)."""
GAIN = 1.03
"""Another number of drafts is chosen only if it promises this many times the speed."""
PROBE_LEAST, PROBE_MOST = 16, 128
"""Steps without drafts between two probes, at first and at most."""
REMEASURED = 512
"""A time is out of date after this many steps; without drafts, it is then measured again."""


def tokens_a_pass(most: int, first: float, later: float) -> np.ndarray:
    """Return the tokens per request of a pass after 0 … *most* drafts: the formula above.

    Args:
        most: drafts before the pass.
        first: acceptance of the first one.
        later: acceptance of a draft after an accepted one.
    """
    return 1 + first * np.concatenate([[0.0], np.cumsum(later ** np.arange(most))])


class _Mean:
    """The mean of all values at first, later mostly of the last *memory* ones."""

    def __init__(self) -> None:
        self.value, self.count = 0.0, 0

    @property
    def is_known(self) -> bool:
        return self.count >= ENOUGH

    def add(self, value: float, memory: int = MEMORY) -> None:
        self.count += 1
        self.value += (value - self.value) / min(self.count, memory)


class _Times:
    """Seconds per step by number of drafts, for batches of about one size."""

    def __init__(self) -> None:
        self._means: dict[int, _Mean] = defaultdict(_Mean)
        self._last: dict[int, int] = {}  # the last step with this many drafts
        self._steps = self.waited = 0

    def _recent(self, drafts: int) -> bool:
        return self._steps - self._last.get(drafts, -REMEASURED) < REMEASURED

    @property
    def is_plain_known(self) -> bool:
        """Whether the time of a step without drafts is known and not out of date."""
        return self._recent(0) and self._means[0].is_known

    @property
    def is_known(self) -> bool:
        """Whether times with and without drafts are known, so that they can be compared."""
        return self._means[0].is_known and any(k and self._means[k].is_known for k in self._last)

    def add(self, seconds: float, drafts: int) -> None:
        """Record the time of a step; at most twice the mean, since the machine may be busy."""
        mean = self._means[drafts]
        if not self._recent(drafts):
            mean.count = 0
        self.waited, self._steps = 0, self._steps + 1
        self._last[drafts] = self._steps
        mean.add(min(seconds, 2 * mean.value) if mean.is_known else seconds)

    def seconds(self, most: int) -> np.ndarray:
        """Return the time of a step with 0 … *most* drafts, interpolated between measured ones.

        The first draft may cost the most: a pass with several rows per request uses another kernel,
        or another CUDA graph.
        """
        known = sorted(k for k in self._last if self._means[k].is_known)
        last = known[-1]
        points = {k: self._means[k].value for k in known if k in (0, last) or self._recent(k)}
        if last < most:  # more than were ever tried: each costs as much as those that were
            points[most] = points[0] + (points[last] - points[0]) * most / last
        return np.interp(np.arange(most + 1), [*points], [*points.values()])

    def is_waited_for(self) -> bool:
        """Whether to spend another step on measuring; counts these steps."""
        self.waited += 1
        return self.waited <= PATIENCE


class DraftLengths:
    """Number of drafts by number of running requests, for vLLM's `Scheduler.dynamic_sd_lookup`."""

    def __init__(self, most: Sequence[int]) -> None:
        """Draft at most `most[n]` tokens for n requests."""
        self._most = most
        self._first, self._later = _Mean(), _Mean()  # acceptance
        self._times: dict[int, _Times] = defaultdict(_Times)
        self._requests = 1  # that ran lately
        self._chosen = self._undrafted = 0
        self._between = PROBE_LEAST
        self._right = 0  # accepted minus rejected drafts of the last probe

    def __getitem__(self, requests: int) -> int:
        """Return how many tokens to draft for each of *requests* requests; called once per step."""
        most, size = self._most[requests], requests.bit_length()
        self._requests = requests
        if not most:
            return 0
        times = self._times[size]
        # A new size of batch uses the times of the nearest known size, unless drafts could pay.
        like = None if times.is_known else self._nearest(size)
        if like is not None and not self._may_pay(most, like):
            times = like
        if not times.is_plain_known and times.is_waited_for():
            return 0  # measure a step without drafts
        if not times.is_known or self._first.count < MEMORY:
            return most  # measure drafts, and how many are accepted
        speeds = self._speeds(most, times)
        best = int(speeds.argmax())
        if speeds[best] > GAIN * speeds[min(self._chosen, most)]:
            self._chosen = best
        if self._chosen:
            self._undrafted, self._between, self._right = 0, PROBE_LEAST, 0
            return min(self._chosen, most)
        # No drafts pay. Probe with one draft at intervals that double while probes fail.
        if self._right > 0:  # most drafts of the last probe were accepted: probe again at once
            self._between = PROBE_LEAST
        elif self._undrafted < self._between:
            self._undrafted += 1
            return 0
        else:
            self._between = min(2 * self._between, PROBE_MOST)
        self._undrafted = self._right = 0
        return 1

    def _nearest(self, size: int) -> _Times | None:
        """Return the known times of the nearest other size of batch; None if there are none."""
        known = [other for other, times in self._times.items() if times.is_known]
        nearest = min(known, key=lambda other: abs(other - size), default=None)
        return None if nearest is None else self._times[nearest]

    def _may_pay(self, most: int, like: _Times) -> bool:
        """Whether drafts would pay at half of their cost there: then measuring is worth it."""
        if self._first.count < MEMORY:
            return True
        speeds = self._speeds(most, like, cost=0.5)
        return bool(speeds[1:].max() > GAIN * speeds[0])

    def _speeds(self, most: int, times: _Times, cost: float = 1.0) -> np.ndarray:
        """Return tokens per second and request, by drafts; *cost* scales the time of drafts."""
        tokens = tokens_a_pass(most, self._first.value, self._later.value)
        seconds = times.seconds(most)
        return tokens / (seconds[0] + cost * (seconds - seconds[0]))

    def record_acceptance(self, drafted: int, accepted: int) -> None:
        """Record a request's drafts; those after the first rejected one carry no information."""
        memory = MEMORY * max(2, self._requests)
        self._first.add(float(accepted > 0), memory)
        for i in range(1, min(accepted + 1, drafted)):
            self._later.add(float(i < accepted), memory)
        if drafted == 1:  # later drafts are not tried: their estimate moves towards the first one
            self._later.add(self._first.value, memory)
        self._right += 1 if accepted else -1

    def record_step_time(self, seconds: float, requests: int, drafts: int) -> None:
        """Record the time of a step in which each request had, and got, *drafts* drafts."""
        self._times[requests.bit_length()].add(seconds, drafts)
