"""A request's strength and filters as numbers, one row of a table that the device reads."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from vllm_proxy.config.request import RequestControl
from vllm_proxy.config.strength import ADAPTIVE, Schedule


class LogitControls(NamedTuple):
    """A request's strength and filters as numbers, one row of a table that the device reads.

    At step t the members' weights are `fixed + alpha(t) * (0, 1, -1)`, where alpha(t) is
    `start + slope * t` before `steps`, and 0 from then on. `lenient` is 1 where something else
    forbids tokens too (a grammar, say): what filters remove then comes last instead of never.
    """

    base: float
    expert: float
    antiexpert: float
    start: float = 0.0
    slope: float = 0.0
    steps: float = math.inf
    adaptive: float = 0.0
    top_p: float = 1.0
    plausibility: float = 0.0
    lenient: float = 0.0

    @classmethod
    def of(cls, control: RequestControl, default: RequestControl | None = None) -> "LogitControls":
        """Return the numbers of a request's *control*; *default* is the engine's control."""
        alpha, filters = control.alpha, control.given_filters
        if control.weights is not None:
            return cls(*control.weights, **filters)
        if default is not None:
            alpha = default.alpha if alpha is None else alpha
            filters = default.given_filters | filters
        if alpha == ADAPTIVE:
            return cls(1.0, 0.0, 0.0, adaptive=1.0, **filters)
        if isinstance(alpha, Schedule):
            slope = -alpha.alpha / alpha.steps if alpha.schedule == "linear" else 0.0
            strength = {"start": alpha.alpha, "slope": slope, "steps": alpha.steps}
            return cls(1.0, 0.0, 0.0, **strength, **filters)
        return cls(1.0, 0.0, 0.0, start=alpha, **filters)

    @property
    def is_filtered(self) -> bool:
        """Whether a filter is on."""
        return self.top_p < 1 or self.plausibility > 0

    @property
    def is_constant(self) -> bool:
        """Whether logits are the same weighted sum at every step."""
        return not any(ExtraOps.of([self])) and self.slope == 0 and self.steps == math.inf

    @property
    def coefficients(self) -> tuple[float, float, float]:
        """The members' weights at the first step."""
        return self.base, self.expert + self.start, self.antiexpert - self.start


class ExtraOps(NamedTuple):
    """What some row of a step asks for beside a weighted sum: on the host, to skip the rest."""

    adaptive: bool = False
    top_p: bool = False
    plausibility: bool = False

    @classmethod
    def of(cls, rows: Iterable[LogitControls]) -> "ExtraOps":
        """Look through the rows."""
        rows = list(rows)
        return cls(
            adaptive=any(row.adaptive for row in rows),
            top_p=any(row.top_p < 1 for row in rows),
            plausibility=any(row.plausibility for row in rows),
        )


NO_EXTRA_OPS = ExtraOps()
