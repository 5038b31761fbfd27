"""`DraftLengths`: as many drafts before each pass as have lately been worth their time.

A pass after k drafts, of which a request's first one is accepted with the probability p, and one
after a right one with the probability q, makes

    1 + p + pq + … + pq^(k-1)       (for p = q: Leviathan et al. 2023, arXiv 2211.17192, eq. 1)

tokens of each request. Where much is foreseen of some requests and nothing of others, p is low and
q is high. Both are learned from drafts; what a step with k drafts takes from a clock, and for a k
that was never tried from those nearest to it. The k with most tokens a second is taken, and so is
tried itself. It may be 0: then a single draft now and then, ever more seldom, finds out whether
that is still so. Times are those of batches of about one size; another size is measured only where
drafts might pay there.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

MEMORY = 16
"""About so many times are remembered, and drafts of each running request (twice, of one alone)."""
ENOUGH = 3
"""Times that a step must have been timed to be known."""
PATIENCE = 8 * ENOUGH
"""Steps in which it was not to be timed (beside prompts, say), after which it is not waited for."""
GAIN = 1.03
"""Another number of drafts must promise so much more to be chosen."""
PROBE_LEAST, PROBE_MOST = 16, 128
"""Steps without drafts between two that find out."""
REMEASURED = 512
"""Steps after which a time is out of date; that of a step without drafts is then taken again."""


def tokens_a_pass(most: int, first: float, later: float) -> np.ndarray:
    """Return the tokens that a pass makes of a request after 0 … *most* drafts: the formula above.

    Args:
        most: drafts before the pass.
        first: acceptance of the first one.
        later: acceptance of one after a right one.
    """
    return 1 + first * np.concatenate([[0.0], np.cumsum(later ** np.arange(most))])


class _Mean:
    """Of all values at first, then of the last ones."""

    def __init__(self) -> None:
        self.value, self.count = 0.0, 0

    @property
    def is_known(self) -> bool:
        return self.count >= ENOUGH

    def add(self, value: float, memory: int = MEMORY) -> None:
        self.count += 1
        self.value += (value - self.value) / min(self.count, memory)


class _Times:
    """Seconds of a step by its number of drafts, for batches of about one size."""

    def __init__(self) -> None:
        self._means: dict[int, _Mean] = defaultdict(_Mean)
        self._last: dict[int, int] = {}  # step in which so many were drafted
        self._steps = self.waited = 0

    def _recent(self, drafts: int) -> bool:
        return self._steps - self._last.get(drafts, -REMEASURED) < REMEASURED

    @property
    def is_plain_known(self) -> bool:
        """Whether a step without drafts has been timed often enough, and lately."""
        return self._recent(0) and self._means[0].is_known

    @property
    def is_known(self) -> bool:
        """Whether there is something to compare."""
        return self._means[0].is_known and any(k and self._means[k].is_known for k in self._last)

    def add(self, seconds: float, drafts: int) -> None:
        """Take in what a step took; at most twice what is usual, for the machine may be busy."""
        mean = self._means[drafts]
        if not self._recent(drafts):
            mean.count = 0
        self.waited, self._steps = 0, self._steps + 1
        self._last[drafts] = self._steps
        mean.add(min(seconds, 2 * mean.value) if mean.is_known else seconds)

    def seconds(self, most: int) -> np.ndarray:
        """Return what a step takes with 0 … *most* drafts, between those that were timed a line.

        The first draft may cost most: a pass of several rows is another product, or another graph.
        """
        known = sorted(k for k in self._last if self._means[k].is_known)
        last = known[-1]
        points = {k: self._means[k].value for k in known if k in (0, last) or self._recent(k)}
        if last < most:  # more than were ever tried: each as dear as those that were
            points[most] = points[0] + (points[last] - points[0]) * most / last
        return np.interp(np.arange(most + 1), [*points], [*points.values()])

    def is_waited_for(self) -> bool:
        """Whether a step is worth it to find out a time; counts them."""
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
        self._right = 0  # requests whose probe was right, less those whose was not

    def __getitem__(self, requests: int) -> int:
        """Return how many tokens to draft for each of so many requests; asked once a step."""
        most, size = self._most[requests], requests.bit_length()
        self._requests = requests
        if not most:
            return 0
        times = self._times[size]
        like = None if times.is_known else self._nearest(size)
        if like is not None and not self._may_pay(most, like):
            times = like
        if not times.is_plain_known and times.is_waited_for():
            return 0
        if not times.is_known or self._first.count < MEMORY:
            return most
        speeds = self._speeds(most, times)
        best = int(speeds.argmax())
        if speeds[best] > GAIN * speeds[min(self._chosen, most)]:
            self._chosen = best
        if self._chosen:
            self._undrafted, self._between, self._right = 0, PROBE_LEAST, 0
            return min(self._chosen, most)
        if self._right > 0:  # most requests' last probe: look again at once
            self._between = PROBE_LEAST
        elif self._undrafted < self._between:
            self._undrafted += 1
            return 0
        else:
            self._between = min(2 * self._between, PROBE_MOST)
        self._undrafted = self._right = 0
        return 1

    def _nearest(self, size: int) -> _Times | None:
        """Return the times of batches of another size, as near as there are; None if none are."""
        known = [other for other, times in self._times.items() if times.is_known]
        nearest = min(known, key=lambda other: abs(other - size), default=None)
        return None if nearest is None else self._times[nearest]

    def _may_pay(self, most: int, like: _Times) -> bool:
        """Whether drafts would be worth it for half of their time: then it is worth measuring."""
        if self._first.count < MEMORY:
            return True
        speeds = self._speeds(most, like, cost=0.5)
        return bool(speeds[1:].max() > GAIN * speeds[0])

    def _speeds(self, most: int, times: _Times, cost: float = 1.0) -> np.ndarray:
        """Return tokens a second of each request, by drafts; *cost*: theirs, over the measured."""
        tokens = tokens_a_pass(most, self._first.value, self._later.value)
        seconds = times.seconds(most)
        return tokens / (seconds[0] + cost * (seconds - seconds[0]))

    def record_acceptance(self, drafted: int, accepted: int) -> None:
        """Take in what became of a request's drafts; those after a wrong one tell nothing."""
        memory = MEMORY * max(2, self._requests)
        self._first.add(float(accepted > 0), memory)
        for i in range(1, min(accepted + 1, drafted)):
            self._later.add(float(i < accepted), memory)
        if drafted == 1:  # what is not tried is thought to be like the first one, after a while
            self._later.add(self._first.value, memory)
        self._right += 1 if accepted else -1

    def record_step_time(self, seconds: float, requests: int, drafts: int) -> None:
        """Take in the time of a step in which each request had, and got, so many drafts."""
        self._times[requests.bit_length()].add(seconds, drafts)
