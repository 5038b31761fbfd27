"""Why the engines of a job die one after the other: because of one row, or of any row?"""

from collections.abc import Collection, Iterable
from typing import NamedTuple

from vllm_proxy.jobs.inputs import Line


class Blame(NamedTuple):
    """The verdict after an engine has died.

    Attributes:
        engine: whether the next engine would die too, whatever row it gets.
        row: index of the row that kills engines, if it is known.
    """

    engine: bool = False
    row: int | None = None


class Suspects:
    """The rows of a job that may have killed its engines.

    If no engine has answered a row yet, the next engine first gets one row alone: if that kills it,
    any other engine would die too. Otherwise the rows that two consecutive engines left unanswered
    are submitted one at a time. If two engines then die at the same row, that row is to blame. If
    two engines that had answered nothing die at different rows, no row is.

    Args:
        isolates: whether rows can be submitted alone. If not, two consecutive engines that died
            without an answer are enough to give up.

    Attributes:
        rows: indices of the rows to submit alone.
        alone: index of the row that is submitted alone now.
    """

    def __init__(self, *, isolates: bool) -> None:
        self.rows: set[int] = set()
        self.alone: int | None = None
        self._isolates = isolates
        self._last: set[int] = set()
        self._died_at: set[int] = set()
        self._fruitless = 0

    def in_order(self, lines: Iterable[Line]) -> list[Line]:
        """Return the rows to submit again; those at which an engine died come last."""
        return sorted(lines, key=lambda line: (line.index in self._died_at, line))

    def blame(self, unanswered: Collection[int], *, answered: bool, ever: bool) -> Blame:
        """Decide why an engine died.

        Args:
            unanswered: indices of the rows that were submitted to it and not answered.
            answered: whether it had answered other rows.
            ever: whether any engine of the job has answered a row.
        """
        alone, self.alone = self.alone, None
        last, self._last = self._last, set(unanswered)
        self._fruitless = 0 if answered else self._fruitless + 1
        if not ever or not self._isolates:
            self.rows.update(sorted(unanswered)[:1])
            return Blame(engine=self._fruitless >= 2)
        if len(unanswered) == 1:
            (alone,) = unanswered
        if alone is not None:
            if alone in self._died_at:
                return Blame(row=alone)
            self._died_at.add(alone)
        self.rows.update(last & self._last)
        return Blame(engine=self._fruitless >= 2 and len(self._died_at) >= 2)
