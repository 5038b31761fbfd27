"""`DraftLengths`: as many drafts before each pass as have lately been worth their time.

A pass after k drafts, of which a request's next one is accepted with the probability p, makes

    1 + p + … + p^k                             (Leviathan et al. 2023, arXiv 2211.17192, eq. 1)

tokens of each request, and takes a step without drafts and k times what one of them adds. p is
learned from drafts, the times from a clock; k is where there are most tokens a second. It may be 0:
then a single draft now and then, ever more seldom, finds out whether that is still so.
"""

from collections import defaultdict
from collections.abc import Sequence

MEMORY = 16
"""About so many drafts, and times, are remembered."""
ENOUGH = 3
"""Times that a step must have been timed to be known."""
PATIENCE = 8 * ENOUGH
"""Steps in which it was not to be timed (beside prompts, say), after which it is not waited for."""
GAIN = 1.03
"""Another number of drafts must promise so much more to be chosen."""
PROBE_LEAST, PROBE_MOST = 16, 128
"""Steps without drafts between two that find out."""
REMEASURED = 512
"""Steps with drafts after which a step without is timed again."""


class _Mean:
    """Of all values at first, then of the last ones."""

    def __init__(self) -> None:
        self.value, self.count = 0.0, 0

    @property
    def is_known(self) -> bool:
        return self.count >= ENOUGH

    def add(self, value: float) -> None:
        self.count += 1
        self.value += (value - self.value) / min(self.count, MEMORY)


class _Times:
    """Seconds of a step without drafts, and what one adds: for batches of about one size."""

    def __init__(self) -> None:
        self.plain, self.draft = _Mean(), _Mean()
        self.since_plain = self.waited = 0

    def add(self, seconds: float, drafts: int) -> None:
        """Take in what a step took; at most twice what is usual, for the machine may be busy."""
        self.waited = 0
        if not drafts:
            known, self.since_plain = self.plain, 0
        else:
            known, self.since_plain = self.draft, self.since_plain + 1
            seconds = max(0.0, seconds - self.plain.value) / drafts
            if self.since_plain >= REMEASURED:
                self.plain.count = 0
        if known is self.plain or self.plain.is_known:
            known.add(min(seconds, 2 * known.value) if known.is_known else seconds)

    def is_waited_for(self) -> bool:
        """Whether a step is worth it to find out a time; counts them."""
        self.waited += 1
        return self.waited <= PATIENCE


class DraftLengths:
    """Number of drafts by number of running requests, for vLLM's `Scheduler.dynamic_sd_lookup`."""

    def __init__(self, most: Sequence[int]) -> None:
        """Draft at most `most[n]` tokens for n requests."""
        self._most = most
        self._acceptance = _Mean()
        self._times: dict[int, _Times] = defaultdict(_Times)
        self._chosen = self._undrafted = 0
        self._between = PROBE_LEAST

    def __getitem__(self, requests: int) -> int:
        """Return how many tokens to draft for each of so many requests; asked once a step."""
        most, times = self._most[requests], self._times[requests.bit_length()]
        if not most:
            return 0
        if not times.plain.is_known and times.is_waited_for():
            return 0
        if not times.draft.is_known or not times.plain.is_known or self._acceptance.count < MEMORY:
            return most
        best = max(range(most + 1), key=lambda k: self._speed(k, times))
        if self._speed(best, times) > GAIN * self._speed(min(self._chosen, most), times):
            self._chosen = best
        if self._chosen:
            self._undrafted, self._between = 0, PROBE_LEAST
            return min(self._chosen, most)
        self._undrafted += 1
        if self._undrafted <= self._between:
            return 0
        self._undrafted, self._between = 0, min(max(2 * self._between, PROBE_LEAST), PROBE_MOST)
        return 1

    def _speed(self, drafts: int, times: _Times) -> float:
        """Return tokens a second, of each request."""
        tokens = sum(self._acceptance.value**i for i in range(drafts + 1))
        return tokens / (times.plain.value + drafts * times.draft.value)

    def verified(self, drafted: int, accepted: int) -> None:
        """Take in what became of a request's drafts; those after a wrong one tell nothing."""
        for i in range(min(accepted + 1, drafted)):
            self._acceptance.add(float(i < accepted))
        if accepted:
            self._between = 0  # without drafts: look again at once

    def took(self, seconds: float, requests: int, drafts: int) -> None:
        """Take in the time of a step in which each request had, and got, so many drafts."""
        self._times[requests.bit_length()].add(seconds, drafts)
