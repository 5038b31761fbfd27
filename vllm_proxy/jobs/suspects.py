"""Why engines of a job die one after the other: because of one row, or whatever they are asked?"""

from collections.abc import Collection, Iterable
from typing import NamedTuple

from vllm_proxy.jobs.inputs import Line


class Blame(NamedTuple):
    """What follows from a death.

    Attributes:
        engine: whether the next engine would die as well, whatever it was asked.
        row: index of the row that kills engines, if it is known.
    """

    engine: bool = False
    row: int | None = None


class Suspects:
    """The rows of a job that may have killed its engines.

    Where no engine has answered a row yet, the next one is asked a row alone first: if it dies of
    that, so would any other. Else the rows that two engines in a row left unanswered are asked one
    at a time. If two engines then die at the same row, it is to blame; if two that had answered
    nothing die at different rows, it is none of these.

    Args:
        isolates: whether rows can be asked alone; else two engines that died one after the other
            and had answered nothing would be followed by others.

    Attributes:
        rows: indices of those to be asked alone.
        alone: the one that is being asked alone.
    """

    def __init__(self, *, isolates: bool) -> None:
        self.rows: set[int] = set()
        self.alone: int | None = None
        self._isolates = isolates
        self._last: set[int] = set()
        self._died_at: set[int] = set()
        self._fruitless = 0

    def in_order(self, lines: Iterable[Line]) -> list[Line]:
        """Return rows that are to be asked again, those at which an engine died last."""
        return sorted(lines, key=lambda line: (line.index in self._died_at, line))

    def blame(self, asked: Collection[int], *, answered: bool, ever: bool) -> Blame:
        """Judge a death.

        Args:
            asked: indices of the rows that the engine was asked and did not answer.
            answered: whether it had answered others.
            ever: whether any engine had.
        """
        alone, self.alone = self.alone, None
        last, self._last = self._last, set(asked)
        self._fruitless = 0 if answered else self._fruitless + 1
        if not ever or not self._isolates:
            self.rows.update(sorted(asked)[:1])
            return Blame(engine=self._fruitless >= 2)
        if len(asked) == 1:
            (alone,) = asked
        if alone is not None:
            if alone in self._died_at:
                return Blame(row=alone)
            self._died_at.add(alone)
        self.rows.update(last & self._last)
        return Blame(engine=self._fruitless >= 2 and len(self._died_at) >= 2)
