"""How strongly the expert pulls, and which tokens the base allows: alpha and the filters."""

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
"""Largest strength or weight, either way. A member's logits, and the partial sums of products that
they are formed of, are far below 1e7; so weighted sums, and these over vLLM's lowest temperature of
0.01, are numbers of float32, which end at 3.4e38."""

MOST_STEPS = 2**53
"""Most tokens of a schedule: integers up to here are floats."""

STRENGTH_RANGE = f"from {-MOST_STRENGTH:g} to {MOST_STRENGTH:g}"


class Schedule(BaseModel):
    """A strength that changes with t, the number of tokens generated before.

    Attributes:
        alpha: strength of the first token.
        schedule: `first` keeps it for `steps` tokens and is 0 afterwards; `linear` falls evenly
            and reaches 0 after `steps` tokens: `alpha * max(0, 1 - t / steps)`.
        steps: number of tokens; needs `schedule`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    alpha: Annotated[float, Field(strict=True, ge=-MOST_STRENGTH, le=MOST_STRENGTH)] = 1.0
    schedule: Literal["first", "linear"]
    steps: Annotated[int, Field(strict=True, ge=1, le=MOST_STEPS)]

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
    """Whether *value* is an int or a float that may weigh logits, and not a bool."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= MOST_STRENGTH


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
"""A number; `"adaptive"`, found anew for every token (`fusion.adaptive_alpha`); or a
`Schedule`."""


class Filters(BaseModel):
    """Tokens that are never generated, by the base's own probabilities of them.

    Attributes:
        top_p: keep the likeliest tokens of the base that make up this probability together
            (`fusion.in_nucleus`).
        plausibility: keep tokens of at least this part of the base's highest probability
            (`fusion.is_plausible`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    top_p: Annotated[float, Field(strict=True, gt=0, le=1)] | None = None
    plausibility: Annotated[float, Field(strict=True, ge=0, le=1)] | None = None


NO_FILTERS = Filters()
