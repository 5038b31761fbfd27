"""What an engine does by default and a request may change: strength, members, filters, prompts.

The same rules read the configuration (`alpha`, `filters`) and a request's own values, which travel
in `SamplingParams.extra_args` (over HTTP: `vllm_xargs`) under the names in `FIELDS`. Imports
neither torch nor vLLM.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)

from vllm_proxy.config.errors import ProxyConfigError, did_you_mean, shown
from vllm_proxy.config.strength import (
    ADAPTIVE,
    MOST_STEPS,
    NO_FILTERS,
    STRENGTH_RANGE,
    Filters,
    Schedule,
    Strength,
    is_weight,
)

PREFIX = "proxy_"
PROMPT_KEYS = {"expert": "proxy_expert_prompt", "antiexpert": "proxy_antiexpert_prompt"}
ALPHA_KEYS = ("proxy_alpha", "proxy_alpha_schedule", "proxy_alpha_steps")
FIELDS = {
    **dict.fromkeys(ALPHA_KEYS, "alpha"),
    "proxy_weights": "weights",
    **dict.fromkeys(("proxy_top_p", "proxy_plausibility"), "filters"),
    **{key: f"{role}_prompt" for role, key in PROMPT_KEYS.items()},
}
"""Names of a request's own values, and which field of `RequestValues` has each."""
BARE_KEYS = {key.removeprefix(PREFIX): f"`{key}`" for key in FIELDS} | {
    "filters": "`proxy_top_p` and `proxy_plausibility`"
}
"""Names that users write instead, and the right ones."""
BASE_LENGTH = "proxy_base_length"
"""Added by our scheduler, for workers: how many of a lengthened prompt's last tokens are the
base's."""
INSPECTED = "proxy_inspected"
"""Added by `ProxyLLM.inspect`, for workers: `{"token_ids": …, "top_k": …}`, of an answer whose
tokens but the last are the last ones of the prompt."""
MOST_TOP_K = 100
"""How many of a distribution's likeliest tokens an inspection may keep."""
INTERNAL = (BASE_LENGTH, INSPECTED)
"""Names that users may not send."""


@dataclass(frozen=True)
class Control:
    """What was asked for: by the configuration, or by one request.

    Attributes:
        alpha: strength; None for the engine's.
        weights: the members' weights, instead of a strength.
        filters: fields that are None are the engine's, or none beside `weights`.
        prompts: prompts of the members that do not see the base's: text or token ids.
    """

    alpha: float | str | Schedule | None = None
    weights: tuple[float, float, float] | None = None
    filters: Filters = NO_FILTERS
    prompts: Mapping[str, str | Sequence[int]] = field(default_factory=dict)

    @property
    def asked(self) -> set[str]:
        """The members on whose logits an answer depends; the base's, whatever its weight."""
        if self.weights is not None:
            small = {r for r, weight in zip(PROMPT_KEYS, self.weights[1:], strict=True) if weight}
        else:
            small = set() if self.alpha == 0 else {*PROMPT_KEYS}
        return {"base", *small}

    @property
    def is_default(self) -> bool:
        """Whether strength and filters are the engine's."""
        return self.alpha is None and self.weights is None and self.filters == NO_FILTERS

    @classmethod
    def from_request(cls, extra_args: Mapping[str, Any] | None) -> "Control | None":
        """Read a request's own values; None if there are none.

        A key without a value (None) is as if it were not there: in a table, such as those of Ray
        Data, each row has every key.

        Raises:
            ProxyConfigError: naming the key, its value and the remedy.
        """
        for key in extra_args or ():
            if key in BARE_KEYS:
                raise ProxyConfigError(f"`{key}`: its name here is {BARE_KEYS[key]}")
        own = {k: v for k, v in (extra_args or {}).items() if str(k).startswith(PREFIX)}
        for key in INTERNAL:
            own.pop(key, None)
        if not own:
            return None
        for key in own:
            if key not in FIELDS:
                raise ProxyConfigError(f"unknown key `{key}`{did_you_mean(key, FIELDS)}")
        own = {key: value for key, value in own.items() if value is not None}
        filters = {
            key.removeprefix(PREFIX): _fraction(key, own[key], zero=key == "proxy_plausibility")
            for key in ("proxy_top_p", "proxy_plausibility")
            if key in own
        }
        weights = None
        if "proxy_weights" in own:
            weights = _read(own, "proxy_weights", _weights)
            for key in ALPHA_KEYS:
                if key in own:
                    raise _wrong(key, own[key], "`proxy_weights` takes its place; give one of them")
        return cls(
            alpha=_strength(own),
            weights=weights,
            filters=Filters(**filters),
            prompts={
                role: _read(own, key, _prompt) for role, key in PROMPT_KEYS.items() if key in own
            },
        )

    def to_request(self) -> dict[str, Any]:
        """Return the values as a request's `extra_args`; `from_request` reads them back."""
        args: dict[str, Any] = {}
        if isinstance(self.alpha, Schedule):
            args["proxy_alpha"] = self.alpha.alpha
            args["proxy_alpha_schedule"] = self.alpha.schedule
            args["proxy_alpha_steps"] = self.alpha.steps
        elif self.alpha is not None:
            args["proxy_alpha"] = self.alpha
        if self.weights is not None:
            args["proxy_weights"] = list(self.weights)
        filters = self.filters.model_dump(exclude_none=True)
        args |= {f"{PREFIX}{key}": value for key, value in filters.items()}
        for role, prompt in self.prompts.items():
            args[PROMPT_KEYS[role]] = prompt if isinstance(prompt, str) else list(prompt)
        return args


MEMBERS = {
    "base": Control(weights=(1.0, 0.0, 0.0)),
    "expert": Control(weights=(0.0, 1.0, 0.0)),
    "antiexpert": Control(weights=(0.0, 0.0, 1.0)),
}
"""What makes a request one member's."""


def _wrong(key: str, value: object, remedy: str) -> ProxyConfigError:
    return ProxyConfigError(f"`{key}` is {shown(value)}: {remedy}")


def _read(own: Mapping[str, Any], key: str, read: Callable[[object], Any]) -> Any:
    try:
        return read(own[key])
    except ValueError as error:
        raise _wrong(key, own[key], str(error)) from None


def _strength(own: Mapping[str, Any]) -> float | str | Schedule | None:
    alpha = own.get("proxy_alpha")
    if isinstance(alpha, Mapping):
        for key in own.keys() & {*ALPHA_KEYS} - {"proxy_alpha"}:
            raise _wrong(key, own[key], "`proxy_alpha` is a mapping, which says it; remove one")
        return _read(own, "proxy_alpha", _schedule)
    if "proxy_alpha" in own and alpha != ADAPTIVE and not is_weight(alpha):
        raise _wrong(
            "proxy_alpha",
            alpha,
            f'give a finite number {STRENGTH_RANGE}, "{ADAPTIVE}", or a mapping with `schedule`',
        )
    schedule, steps = own.get("proxy_alpha_schedule"), own.get("proxy_alpha_steps")
    if "proxy_alpha_schedule" not in own:
        if "proxy_alpha_steps" in own:
            raise _wrong("proxy_alpha_steps", steps, "add `proxy_alpha_schedule`: first or linear")
        return alpha if alpha is None or alpha == ADAPTIVE else float(alpha)
    if schedule not in ("constant", "first", "linear"):
        raise _wrong("proxy_alpha_schedule", schedule, "give constant, first or linear")
    if alpha == ADAPTIVE:
        raise _wrong("proxy_alpha_schedule", schedule, "an adaptive alpha has none; remove it")
    if schedule == "constant":
        if "proxy_alpha_steps" in own:
            raise _wrong("proxy_alpha_steps", steps, "a constant alpha has none; remove it")
        return None if alpha is None else float(alpha)
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= MOST_STEPS:
        raise _wrong(
            "proxy_alpha_steps", steps, "give the number of tokens, at least 1 and at most 2**53"
        )
    return Schedule(alpha=1.0 if alpha is None else float(alpha), schedule=schedule, steps=steps)


def _schedule(value: object) -> Schedule:
    try:
        return Schedule.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise ValueError(f"its `{field}`: {first['msg']}") from None


def _fraction(key: str, value: object, *, zero: bool) -> float:
    if not is_weight(value) or not 0 <= value <= 1 or (value == 0 and not zero):
        raise _wrong(key, value, f"give a number in {'[' if zero else '('}0, 1]")
    return float(value)


def _weights(value: object) -> tuple[float, float, float]:
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(map(is_weight, value)):
        raise ValueError(
            f"give three finite numbers {STRENGTH_RANGE}: of base, expert and antiexpert"
        )
    return tuple(map(float, value))


def _prompt(value: object) -> str | list[int]:
    if isinstance(value, str) and value:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("it has half a character (a lone surrogate); remove it") from None
        return value
    if isinstance(value, list | tuple) and value and all(map(_is_id, value)):
        return list(value)
    raise ValueError("give text, or a list of token ids; at least one token")


def _is_id(value: object) -> bool:
    # Larger integers cannot be sent to an engine, and are no one's ids.
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


_Text = Annotated[str, Field(min_length=1)]
_Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(min_length=1)]
TextOrIds = Annotated[str | list[int], PlainValidator(_prompt, json_schema_input_type=_Text | _Ids)]
"""Text or token ids, of at least one token."""


class RequestValues(BaseModel):
    """A request's own values as users write them, in a row or as keyword arguments.

    Attributes:
        alpha: strength: 1 is proxy tuning, 0 the base; `adaptive` finds one for every token.
        weights: the weights of base, expert and antiexpert, instead of a strength.
        filters: tokens to leave out by the base's own probabilities.
        expert_prompt: what the expert sees instead of the base's prompt: text or token ids.
        antiexpert_prompt: what the antiexpert sees instead of it: text or token ids.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    alpha: Strength | None = None
    weights: (
        Annotated[
            tuple[float, float, float],
            PlainValidator(_weights, json_schema_input_type=tuple[float, float, float]),
        ]
        | None
    ) = None
    filters: Filters | None = None
    expert_prompt: TextOrIds | None = None
    antiexpert_prompt: TextOrIds | None = None

    @model_validator(mode="after")
    def _require_one_strength(self) -> Self:
        if self.alpha is not None and self.weights is not None:
            raise ValueError("`weights` take the place of `alpha`; give one of them")
        return self

    @property
    def control(self) -> Control:
        """What is asked for."""
        prompts = {"expert": self.expert_prompt, "antiexpert": self.antiexpert_prompt}
        return Control(
            alpha=self.alpha,
            weights=self.weights,
            filters=self.filters or NO_FILTERS,
            prompts={role: prompt for role, prompt in prompts.items() if prompt is not None},
        )
