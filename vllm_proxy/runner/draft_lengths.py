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


def tokens_a_pass(drafts: int, acceptance: float, later: float | None = None) -> float:
    """Return the tokens that a pass makes of a request: the formula above.

    Args:
        drafts: before the pass.
        acceptance: of the first one.
        later: acceptance of one after a right one; None for the same.
    """
    after = acceptance if later is None else later
    return 1 + sum(acceptance * after**i for i in range(drafts))


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

    def knows_plain(self) -> bool:
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

    def seconds(self, drafts: int) -> float:
        """Return what a step takes; where none was timed, by those with fewer and more drafts.

        The first draft may cost most: a pass of several rows is another product, or another graph.
        """
        known = [k for k in self._last if self._means[k].is_known]
        known = [k for k in known if not k or k == max(known) or self._recent(k)]
        low = max((k for k in known if k <= drafts), default=0)
        high = min((k for k in known if k >= drafts), default=low)
        if high < drafts:  # more than were ever tried: each as dear as those that were
            low = 0
        start, end = self._means[low].value, self._means[high].value
        return start if low == high else start + (end - start) * (drafts - low) / (high - low)

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
        self._memory = 2 * MEMORY
        self._chosen = self._undrafted = 0
        self._between = PROBE_LEAST
        self._right = 0  # requests whose probe was right, less those whose was not

    def __getitem__(self, requests: int) -> int:
        """Return how many tokens to draft for each of so many requests; asked once a step."""
        most, size = self._most[requests], requests.bit_length()
        self._memory = MEMORY * max(2, requests)
        if not most:
            return 0
        times = self._times[size]
        like = None if times.is_known else self._nearest(size)
        if like is not None and not self._may_pay(most, like):
            times = like
        if not times.knows_plain() and times.is_waited_for():
            return 0
        if not times.is_known or self._first.count < MEMORY:
            return most
        best = max(range(most + 1), key=lambda k: self._speed(k, times))
        if self._speed(best, times) > GAIN * self._speed(min(self._chosen, most), times):
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
        fastest = max(self._speed(k, like, cost=0.5) for k in range(1, most + 1))
        return fastest > GAIN * self._speed(0, like)

    def _speed(self, drafts: int, times: _Times, cost: float = 1.0) -> float:
        """Return tokens a second, of each request; *cost*: of drafts, over what was measured."""
        tokens, plain = (
            tokens_a_pass(drafts, self._first.value, self._later.value),
            times.seconds(0),
        )
        return tokens / (plain + cost * (times.seconds(drafts) - plain))

    def verified(self, drafted: int, accepted: int) -> None:
        """Take in what became of a request's drafts; those after a wrong one tell nothing."""
        self._first.add(float(accepted > 0), self._memory)
        for i in range(1, min(accepted + 1, drafted)):
            self._later.add(float(i < accepted), self._memory)
        if drafted == 1:  # what is not tried is thought to be like the first one, after a while
            self._later.add(self._first.value, self._memory)
        self._right += 1 if accepted else -1

    def took(self, seconds: float, requests: int, drafts: int) -> None:
        """Take in the time of a step in which each request had, and got, so many drafts."""
        self._times[requests.bit_length()].add(seconds, drafts)
