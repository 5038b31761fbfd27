"""What one request may change: strength, members' weights, filters and members' prompts.

A request's values have two forms. Users of Python and of batch files write the fields of
`RequestControl`. vLLM carries them, from its front end to its workers, as a flat mapping,
`SamplingParams.extra_args` (over HTTP: `vllm_xargs`), under the names in `FIELDS`. Both forms are
read by `RequestControl` alone. Imports neither torch nor vLLM.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from vllm_proxy.config.errors import ProxyConfigError, unknown_key
from vllm_proxy.config.roles import Role
from vllm_proxy.config.strength import (
    ADAPTIVE,
    STRENGTH_RANGE,
    Filters,
    Schedule,
    Strength,
    is_weight,
)
from vllm_proxy.config.text import has_lone_surrogate
from vllm_proxy.config.validation import validation_error

PREFIX = "proxy_"
PROMPT_KEYS: dict[Role, str] = {
    "expert": "proxy_expert_prompt",
    "antiexpert": "proxy_antiexpert_prompt",
}
ALPHA_KEYS = ("proxy_alpha", "proxy_alpha_schedule", "proxy_alpha_steps")
EXPERT_KEY = "proxy_expert"
EXPERT_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What the name of an expert looks like: a part of a model's name over HTTP."""
FIELDS = {
    **dict.fromkeys(ALPHA_KEYS, "alpha"),
    "proxy_weights": "weights",
    **dict.fromkeys(("proxy_top_p", "proxy_plausibility"), "filters"),
    EXPERT_KEY: "expert",
    **{key: f"{role}_prompt" for role, key in PROMPT_KEYS.items()},
}
"""Keys of a request's values in `extra_args` -> the field of `RequestControl` that they set."""
BARE_KEYS = {key.removeprefix(PREFIX): f"`{key}`" for key in FIELDS} | {
    "filters": "`proxy_top_p` and `proxy_plausibility`"
}
"""Wrong keys that users may write, without the prefix -> the right ones."""
BASE_LENGTH = "proxy_base_length"
"""Added by our scheduler for workers: the number of a lengthened prompt's last tokens that are the
base's prompt."""
INSPECTED = "proxy_inspected"
"""Added by `ProxyLLM.inspect` for workers: `{"token_ids": …, "top_k": …}` of an answer. The prompt
ends with all tokens of the answer except the last."""
MOST_TOP_K = 100
"""Most tokens of a distribution, the most likely ones, that an inspection may return."""
INTERNAL = (BASE_LENGTH, INSPECTED)
"""Keys that users may not send."""


def extra_args_of(params: Any) -> Mapping[str, Any]:
    """Return the extra arguments of vLLM's `SamplingParams`, or of None; empty without any."""
    return (params.extra_args if params is not None else None) or {}


def _weights(value: object) -> tuple[float, float, float]:
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(map(is_weight, value)):
        raise ValueError(
            f"give three finite numbers {STRENGTH_RANGE}: of base, expert and antiexpert"
        )
    base, expert, antiexpert = map(float, value)
    return base, expert, antiexpert


def _prompt(value: object) -> str | list[int]:
    if isinstance(value, str) and value:
        if has_lone_surrogate(value):
            raise ValueError("it contains half a character (a lone surrogate); remove it")
        return value
    if isinstance(value, list | tuple) and value and all(map(_is_id, value)):
        return list(value)
    raise ValueError("give text, or a list of token ids; at least one token")


def _is_id(value: object) -> bool:
    # Larger integers cannot be sent to an engine, and no tokenizer has such ids.
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


_Text = Annotated[str, Field(min_length=1)]
_Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(min_length=1)]
TextOrIds = Annotated[str | list[int], PlainValidator(_prompt, json_schema_input_type=_Text | _Ids)]
"""Text or token ids, of at least one token."""
Weights = Annotated[
    tuple[float, float, float],
    PlainValidator(_weights, json_schema_input_type=tuple[float, float, float]),
]
"""Weights of base, expert and antiexpert."""


class RequestControl(BaseModel):
    """What a request, or the configuration, sets. None: the engine's value applies."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    alpha: Strength | None = None
    """Strength: 1 is proxy tuning, 0 is the base; `adaptive` computes one for each token."""
    weights: Weights | None = None
    """Weights of base, expert and antiexpert, instead of a strength. The engine's filters do not
    apply then."""
    filters: Filters | None = None
    """Which tokens to exclude by the base's probabilities."""
    expert: Annotated[str, Field(pattern=EXPERT_NAME)] | None = None
    """Name of the expert, one of `experts` in the configuration."""
    expert_prompt: TextOrIds | None = None
    """What the expert sees instead of the base's prompt: text or token ids."""
    antiexpert_prompt: TextOrIds | None = None
    """What the antiexpert sees instead of the base's prompt: text or token ids."""

    @model_validator(mode="after")
    def _require_one_strength(self) -> Self:
        if self.alpha is not None and self.weights is not None:
            raise ValueError("`weights` replace `alpha`; give one of them")
        return self

    @property
    def prompts(self) -> dict[Role, str | list[int]]:
        """Prompts of the members that do not see the base's prompt: text or token ids."""
        given = {role: getattr(self, FIELDS[key]) for role, key in PROMPT_KEYS.items()}
        return {role: prompt for role, prompt in given.items() if prompt is not None}

    @property
    def given_filters(self) -> dict[str, float]:
        """The filters that are set, by name."""
        return self.filters.model_dump(exclude_none=True) if self.filters else {}

    @property
    def members(self) -> set[Role]:
        """The members on which an answer depends; the base always, even with weight 0."""
        if self.weights is not None:
            pairs = zip(PROMPT_KEYS, self.weights[1:], strict=True)
            small = {role for role, weight in pairs if weight}
        else:
            small = set() if self.alpha == 0 else {*PROMPT_KEYS}
        return {"base", *small}

    @property
    def is_default(self) -> bool:
        """Whether strength and filters are the engine's defaults."""
        return self.alpha is None and self.weights is None and not self.given_filters

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None) -> "RequestControl | None":
        """Read the keys of `FIELDS`; None if there are none.

        A key without a value (None) is ignored, because each row of a table, as in Ray Data, has
        every key.

        Raises:
            ProxyConfigError: names the key, its value and the remedy.
        """
        for key in extra_args or ():
            if key in BARE_KEYS:
                raise ProxyConfigError(f"use {BARE_KEYS[key]} instead", field=key)
        ours = {k: v for k, v in (extra_args or {}).items() if str(k).startswith(PREFIX)}
        for key in INTERNAL:
            ours.pop(key, None)
        if not ours:
            return None
        for key in ours:
            if key not in FIELDS:
                raise unknown_key(key, FIELDS)
        ours = {key: value for key, value in ours.items() if value is not None}
        for key in ALPHA_KEYS if "proxy_weights" in ours else ():
            if key in ours:
                remedy = "`proxy_weights` replaces it; give one of them"
                raise ProxyConfigError(field=key, value=ours[key], remedy=remedy)
        filters = {name: ours[f"{PREFIX}{name}"] for name in _FILTERS if f"{PREFIX}{name}" in ours}
        values = {FIELDS[key]: value for key, value in ours.items() if key not in ALPHA_KEYS}
        values |= {"alpha": _strength(ours), "filters": filters or None}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise validation_error(cls, error, lambda path: _key(path, ours)) from None

    def to_extra_args(self) -> dict[str, Any]:
        """Return the values as a request's `extra_args`; `from_extra_args` reads them back."""
        args: dict[str, Any] = {}
        if isinstance(self.alpha, Schedule):
            values = self.alpha.alpha, self.alpha.schedule, self.alpha.steps
            args |= zip(ALPHA_KEYS, values, strict=True)
        elif self.alpha is not None:
            args["proxy_alpha"] = self.alpha
        if self.weights is not None:
            args["proxy_weights"] = list(self.weights)
        args |= {f"{PREFIX}{name}": value for name, value in self.given_filters.items()}
        if self.expert is not None:
            args[EXPERT_KEY] = self.expert
        return args | {PROMPT_KEYS[role]: prompt for role, prompt in self.prompts.items()}


_FILTERS = tuple(Filters.model_fields)

MEMBER_CONTROLS: dict[Role, RequestControl] = {
    "base": RequestControl(weights=(1.0, 0.0, 0.0)),
    "expert": RequestControl(weights=(0.0, 1.0, 0.0)),
    "antiexpert": RequestControl(weights=(0.0, 0.0, 1.0)),
}
"""The values with which a request is answered by one member alone."""


def _strength(ours: Mapping[str, Any]) -> object:
    """Return the value of `RequestControl.alpha` that the flat keys specify."""
    alpha, schedule, steps = map(ours.get, ALPHA_KEYS)
    if isinstance(alpha, Mapping):
        for key in ALPHA_KEYS[1:]:
            if key in ours:
                remedy = "`proxy_alpha` is a mapping that has it; remove one of them"
                raise ProxyConfigError(field=key, value=ours[key], remedy=remedy)
        return alpha
    if schedule is None:
        if steps is not None:
            remedy = "add `proxy_alpha_schedule`: first or linear"
            raise ProxyConfigError(field="proxy_alpha_steps", value=steps, remedy=remedy)
        return alpha
    if schedule not in ("constant", "first", "linear"):
        remedy = "give constant, first or linear"
        raise ProxyConfigError(field="proxy_alpha_schedule", value=schedule, remedy=remedy)
    if alpha == ADAPTIVE:
        remedy = "an adaptive alpha has no schedule; remove one of them"
        raise ProxyConfigError(field="proxy_alpha_schedule", value=schedule, remedy=remedy)
    if schedule == "constant":
        if steps is not None:
            remedy = "a constant alpha has no steps; remove it"
            raise ProxyConfigError(field="proxy_alpha_steps", value=steps, remedy=remedy)
        return alpha
    nested = {"alpha": alpha, "schedule": schedule, "steps": steps}
    return {name: value for name, value in nested.items() if value is not None}


def _key(path: Sequence[str], ours: Mapping[str, Any]) -> str:
    """Return the key of `extra_args` from which a field was read."""
    field, *rest = path
    if field == "filters":
        return PREFIX + rest[0]
    if field != "alpha" or not rest:
        return PREFIX + field
    if isinstance(ours.get("proxy_alpha"), Mapping):
        return ".".join(["proxy_alpha", *rest])
    return "proxy_alpha" if rest == ["alpha"] else f"proxy_alpha_{rest[0]}"
