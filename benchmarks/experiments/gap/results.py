"""What the answers show: accuracies, the gap closed, differences, with confidence intervals.

Figures are means over the seeds. Intervals are 95 % bootstrap intervals over the test items. What
is resampled is each item's share of seeds that answered it right, for all systems together. The
spread over the seeds is reported separately.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap

from experiments.gap.measure import TUNED, proxy, shots

RESAMPLES = 9999

Right = Mapping[str, Mapping[str, Sequence[str]]]
"""By system and split: for each seed a string with a 1 for an item answered right, else a 0."""


class Interval(NamedTuple):
    """A figure in percent, and its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1f} ({self.low:.1f}-{self.high:.1f})"


class Accuracy(NamedTuple):
    """Test items answered right, in percent: over all seeds, and by seed."""

    mean: Interval
    seeds: list[float]

    def __str__(self) -> str:
        return f"{self.mean}  [{min(self.seeds):.1f}-{max(self.seeds):.1f}]"


@dataclass
class Outcome:
    """One task's results.

    Attributes:
        items: how many were measured.
        alpha: the strength, chosen by validation.
        shots: the few-shot rival's examples, chosen by validation.
        accuracy: by system.
        gap: (proxy - base) / (tuned - base), in percent: the paper's measure. None where tuning
            does not help.
        over_expert: proxy minus expert, in points.
        over_few_shot: proxy minus the rival, in points.
    """

    items: int
    alpha: float
    shots: int
    accuracy: dict[str, Accuracy]
    gap: Interval | None
    over_expert: Interval
    over_few_shot: Interval


def outcome(right: Right, alphas: Sequence[float], counts: Sequence[int]) -> Outcome:
    """Evaluate one task.

    Args:
        right: what was answered right.
        alphas: strengths to choose from.
        counts: numbers of examples to choose from.
    """
    alpha = max(alphas, key=lambda one: _share(right[proxy(one)]["validation"]).mean())
    count = max(counts, key=lambda one: _share(right[shots(one)]["validation"]).mean())
    test = {system: _share(splits["test"]) for system, splits in right.items()}
    accuracy = {
        system: Accuracy(
            _interval(np.mean, test[system]),
            [100 * seed.count("1") / len(seed) for seed in splits["test"]],
        )
        for system, splits in right.items()
    }
    ours = test[proxy(alpha)]
    return Outcome(
        items=len(ours),
        alpha=alpha,
        shots=count,
        accuracy=accuracy,
        gap=_interval(gap_closed, ours, test["base"], test[TUNED])
        if test[TUNED].mean() > test["base"].mean()
        else None,
        over_expert=_interval(_difference, ours, test["expert"]),
        over_few_shot=_interval(_difference, ours, test[shots(count)]),
    )


def gap_closed(
    proxy: np.ndarray, base: np.ndarray, tuned: np.ndarray, axis: int = -1
) -> np.ndarray:
    """Return how much of the way from base to directly tuned the proxy goes (paper, section 3)."""
    start = base.mean(axis)
    return (proxy.mean(axis) - start) / (tuned.mean(axis) - start)


def _difference(one: np.ndarray, other: np.ndarray, axis: int = -1) -> np.ndarray:
    return one.mean(axis) - other.mean(axis)


def _share(seeds: Sequence[str]) -> np.ndarray:
    """Return `[items]`: in which share of the seeds each was answered right."""
    return np.array([[int(mark) for mark in seed] for seed in seeds]).mean(0)


def _interval(statistic: Callable[..., np.ndarray], *items: np.ndarray) -> Interval:
    """Return *statistic* of `[items]` arrays, in percent."""
    value = float(statistic(*items))
    if all(np.ptp(one) == 0 for one in items):
        return Interval(100 * value, 100 * value, 100 * value)
    found = bootstrap(
        items,
        statistic,
        n_resamples=RESAMPLES,
        paired=len(items) > 1,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(*(100 * float(one) for one in (value, found.low, found.high)))
