"""A request's strength and filters as numbers, and what they need of the device."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from vllm_proxy.config.request import RequestControl
from vllm_proxy.config.strength import Schedule


class LogitControls(NamedTuple):
    """A request's strength and filters: one row of the table that `fusion.controls_at` reads.

    At step t the members' weights are `(base, expert, antiexpert) + alpha(t) * (0, 1, -1)`, where
    alpha(t) is `start + slope * t` for t < `steps` and 0 afterwards. `lenient` is 1 if vLLM also
    forbids tokens of this request (by a grammar, for example): tokens that the filters remove are
    then the last choice, not impossible.
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
        """Return the numbers of a request's *control*, with *default* for what it leaves out."""
        alpha, filters = control.alpha, control.given_filters
        if control.weights is not None:
            return cls(*control.weights, **filters)
        if default is not None:
            alpha = default.alpha if alpha is None else alpha
            filters = default.given_filters | filters
        if isinstance(alpha, str):  # adaptive
            return cls(1.0, 0.0, 0.0, adaptive=1.0, **filters)
        if isinstance(alpha, Schedule):
            slope = -alpha.alpha / alpha.steps if alpha.schedule == "linear" else 0.0
            strength = {"start": alpha.alpha, "slope": slope, "steps": alpha.steps}
            return cls(1.0, 0.0, 0.0, **strength, **filters)
        assert alpha is not None  # the engine's control always has a strength
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
    """What the rows of a step need in addition to a weighted sum. On the host, to skip the rest."""

    adaptive: bool = False
    top_p: bool = False
    plausibility: bool = False

    @classmethod
    def of(cls, rows: Iterable[LogitControls]) -> "ExtraOps":
        """Return what at least one of the rows needs."""
        rows = list(rows)
        return cls(
            adaptive=any(row.adaptive for row in rows),
            top_p=any(row.top_p < 1 for row in rows),
            plausibility=any(row.plausibility for row in rows),
        )


NO_EXTRA_OPS = ExtraOps()
