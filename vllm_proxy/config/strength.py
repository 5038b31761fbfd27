"""Alpha, the strength of the shift, and the filters, which exclude tokens by the base."""

from collections.abc import Mapping
from typing import Annotated, Final, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
)

ADAPTIVE: Final = "adaptive"

MOST_STRENGTH = 1e30
"""Largest absolute value of a strength or weight. A member's logits, and the partial sums of their
products, are far below 1e7. So weighted sums, also divided by vLLM's lowest temperature of 0.01,
stay within float32, which ends at 3.4e38."""

MOST_STEPS = 2**53
"""Most steps of a schedule: all integers up to here are exact as floats."""

STRENGTH_RANGE = f"from {-MOST_STRENGTH:g} to {MOST_STRENGTH:g}"


class Schedule(BaseModel):
    """A strength that changes with t, the number of tokens generated before."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    alpha: Annotated[float, Field(strict=True, ge=-MOST_STRENGTH, le=MOST_STRENGTH)] = 1.0
    """Strength of the first token."""
    schedule: Literal["first", "linear"]
    """`first` keeps the strength for `steps` tokens, then it is 0; `linear` decreases it evenly to
    0 after `steps` tokens: `alpha * max(0, 1 - t / steps)`."""
    steps: Annotated[int, Field(strict=True, ge=1, le=MOST_STEPS)]
    """Number of tokens; needs `schedule`."""

    def __str__(self) -> str:
        if self.schedule == "first":
            return f"{self.alpha} for {self.steps} tokens, then 0"
        return f"{self.alpha} falling to 0 over {self.steps} tokens"


def _kind_of_strength(value: object) -> str | None:
    if is_weight(value):
        return "number"
    if value == ADAPTIVE:
        return ADAPTIVE
    return "schedule" if isinstance(value, Mapping | Schedule) else None


def is_weight(value: object) -> bool:
    """Whether *value* is an int or a float that logits may be multiplied with, and not a bool."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= MOST_STRENGTH


Strength = Annotated[
    Annotated[float, Tag("number")]
    | Annotated[Literal["adaptive"], Tag(ADAPTIVE)]
    | Annotated[Schedule, Tag("schedule")],
    Discriminator(
        _kind_of_strength,
        custom_error_type="strength",
        custom_error_message=f'give a finite number {STRENGTH_RANGE}, "{ADAPTIVE}", '
        "or a mapping with `schedule`",
    ),
]
"""A number; `"adaptive"`, computed for each token (`fusion.adaptive_alpha`); or a `Schedule`."""


class Filters(BaseModel):
    """Which tokens are never generated, by the probabilities that the base alone gives them."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    top_p: Annotated[float, Field(strict=True, gt=0, le=1)] | None = None
    """Keep the base's most likely tokens that together have this probability
    (`fusion.in_nucleus`)."""
    plausibility: Annotated[float, Field(strict=True, ge=0, le=1)] | None = None
    """Keep the tokens with at least this fraction of the base's highest probability
    (`fusion.is_plausible`)."""


NO_FILTERS = Filters()
