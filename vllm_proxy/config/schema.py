"""`ProxyConfig`: two or three models, a strength, and arguments for vLLM. Imports no vLLM or torch.

The same fields are read from a YAML file, from keyword arguments, and (`ProxySection`) from the
`proxy` entry of `--hf-overrides` inside every vLLM process.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_serializer,
    model_validator,
)

from vllm_proxy.config.engine_arguments import allows_images, serve_arguments
from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.request import EXPERT_NAME, RequestControl
from vllm_proxy.config.roles import ROLES, Role
from vllm_proxy.config.strength import Filters, Strength
from vllm_proxy.config.validation import validation_error
from vllm_proxy.config.yaml_file import read_yaml

ARCHITECTURE = "ProxyTunedForCausalLM"
"""The name under which vLLM's model registry knows the model of several members."""
IMAGE_ARCHITECTURE = "ProxyTunedForConditionalGeneration"
"""The same for members that see images."""


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True
    )

    @classmethod
    def parse(cls, values: Mapping[str, Any], source: str) -> Self:
        """Validate *values*.

        Raises:
            ProxyConfigError: names *source*, the first wrong field, its value and the remedy.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise validation_error(cls, error).within(source) from None


class Member(_Strict):
    """One of the models."""

    model: Annotated[str, Field(min_length=1)]
    """A local directory or a model id on the hub, as for vLLM's `model` argument."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    lora: Annotated[str, Field(min_length=1)] | None = None
    """A PEFT adapter for the model: a local directory or an id on the hub. Not for the base."""

    def __str__(self) -> str:
        model = f"{self.model}@{self.revision}" if self.revision else self.model
        return f"{model} + {self.lora}" if self.lora else model


def _member_from_string(value: object) -> object:
    if isinstance(value, str):
        return {"model": value}
    if not isinstance(value, Mapping | Member):
        raise ValueError(
            "a member is a path or hub id, or a mapping with `model`, `revision` and `lora`"
        )
    return value


MemberField = Annotated[Member, BeforeValidator(_member_from_string)]
# May be left out, but may not be None: a key without a value is a mistake.
OptionalMemberField = Annotated[Member | None, BeforeValidator(_member_from_string)]


ChatFormat = Literal["template", "plain"]


class ChatFormats(_Strict):
    """How each member sees the messages of a conversation; a member not named sees plain text.

    `template` is the chat template in the member's checkpoint. `plain` is the contents of the
    messages, joined by blank lines and encoded like a text prompt. In the paper the chat expert
    sees its template, base and antiexpert see plain text: `{expert: template}`.
    """

    base: ChatFormat = "plain"
    """What the base sees."""
    expert: ChatFormat = "plain"
    """What the expert sees."""
    antiexpert: ChatFormat = "plain"
    """What the antiexpert sees."""

    @model_validator(mode="after")
    def _require_a_member(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("name a member and its format, `expert: template`; or remove `chat`")
        return self

    @model_serializer
    def _as_given(self) -> dict[str, str]:
        return {role: self.of(role) for role in ROLES if role in self.model_fields_set}

    def differ(self, roles: Iterable[Role]) -> bool:
        """Whether these members see a conversation in different formats."""
        return len({self.of(role) for role in roles}) > 1

    def of(self, role: Role) -> ChatFormat:
        """Return what *role* sees."""
        return getattr(self, role)


MOST_EXPERTS = 64
"""Most adapters of an engine: all are computed for every row of the expert (`one_pass.py`)."""

Adapter = Annotated[str, Field(min_length=1)]

MOST_DRAFTS = 128
"""The limit of vLLM's rejection sampler (`MAX_SPEC_LEN`)."""


class Speculate(_Strict):
    """The expert drafts tokens, and one pass of all members verifies them.

    Greedy answers are the same as without drafts. Sampled answers have the same distribution, by
    rejection sampling (Leviathan et al. 2023, arXiv 2211.17192) against the fused distribution.
    """

    tokens: Annotated[int, Field(ge=1, le=MOST_DRAFTS, strict=True)]
    """Number of tokens that the expert drafts before each pass, at most."""
    requests: Annotated[int, Field(ge=1, strict=True)] | None = None
    """The expert drafts while at most this number of requests runs; None for any number.

    A pass over many rows is compute-bound, so rejected drafts then cost as much as tokens."""
    adapt: Annotated[bool, Field(strict=True)] | None = None
    """False: always draft `tokens`. Otherwise the engine drafts fewer tokens, or none, while that
    is faster; what a seed samples then depends on timing."""

    @property
    def adapts(self) -> bool:
        """Whether the engine may draft fewer tokens."""
        return self.adapt is not False

    @property
    def schedule(self) -> list[tuple[int, int, int]] | None:
        """Entries `(first, last, drafts)` for numbers of running requests; the last is open-ended.

        None if the number of drafts never changes. With a schedule, even with a single entry,
        vLLM's scheduler decides the number (`num_speculative_tokens_per_batch_size`).
        """
        if (most := self.requests) is not None:
            return [(1, most, self.tokens), (most + 1, most + 1, 0)]
        return [(1, 1, self.tokens)] if self.adapts else None

    def engine_argument(self, base: Member) -> dict[str, Any]:
        """Return vLLM's `speculative_config`; the engine replaces vLLM's drafter by the expert.

        The base is named as the drafting model, because vLLM requires the vocabulary and the
        context of the drafter to equal those of the engine's model, which is the base.
        """
        drafts = {
            "method": "draft_model",
            "model": base.model,
            "revision": base.revision,
            "num_speculative_tokens": self.tokens,
            "num_speculative_tokens_per_batch_size": self.schedule,
        }
        return {key: value for key, value in drafts.items() if value is not None}


def expert_field(name: str | None) -> str:
    """Return the field of the configuration that has an expert; None is that without a name."""
    return "expert" if name is None else f"experts.{name}"


class ProxySection(_Strict):
    """What `ProxyTunedForCausalLM` needs in addition to the base: `hf_config.proxy`.

    One of expert and antiexpert may be missing; the base then replaces it. Without an expert
    this is `base + alpha * (base - antiexpert)`: contrastive decoding (O'Brien and Lewis 2023,
    arXiv 2309.09117) and DExperts' anti-only ablation (Liu et al. 2021, arXiv 2105.03023). Without
    an antiexpert it is the interpolation `(1 - alpha) * base + alpha * expert`.
    """

    expert: OptionalMemberField = None
    """The small model after fine-tuning."""
    antiexpert: OptionalMemberField = None
    """The same small model before fine-tuning."""
    alpha: Strength = 1.0
    """Strength of the shift: a number between -1e30 and 1e30 (the paper uses 1.0), `adaptive`, or
    a schedule. A request may set its own."""
    filters: Filters = Filters()
    """Tokens to exclude by the base's probabilities. A request may set its own."""
    experts: Annotated[dict[str, Adapter], Field(max_length=MOST_EXPERTS)] = {}
    """More experts: PEFT adapters of the antiexpert's model, by the names that requests give
    (`expert`). A request without a name gets `expert`; if that is missing, the base alone."""
    chat: ChatFormats | None = None
    """How each member sees a conversation; None if all see what the base's chat template gives."""
    speculate: Speculate | None = None
    """How the expert drafts; None if it does not."""
    one_pass: Annotated[bool, Field(strict=True)] | None = None
    """Whether an expert that is the antiexpert plus an adapter runs in one pass with it; None to do
    so where possible."""

    @model_validator(mode="before")
    @classmethod
    def _default_expert(cls, values: Any) -> Any:
        """Let requests without a name be shifted by nothing, if there is no `expert`."""
        if isinstance(values, Mapping) and values.get("experts") and "antiexpert" in values:
            return {"expert": values["antiexpert"], **values}
        return values

    @model_validator(mode="after")
    def _require_a_second_member(self) -> Self:
        if self.expert is None and self.antiexpert is None:
            raise ProxyConfigError.worded(
                "`expert` and `antiexpert` are missing",
                field="expert",
                remedy="add one of them, or both",
            )
        return self

    @model_validator(mode="after")
    def _require_members_of_chat(self) -> Self:
        if self.chat is None:
            return self
        for role in ROLES:
            if role in self.chat.model_fields_set and role not in self.roles:
                raise ProxyConfigError(
                    f"there is no {role}",
                    field=f"chat.{role}",
                    value=self.chat.of(role),
                    remedy="remove it",
                )
        return self

    @model_validator(mode="after")
    def _require_a_drafter(self) -> Self:
        if self.speculate is not None and self.expert is None:
            raise ProxyConfigError(
                "there is no expert to draft",
                field="speculate",
                remedy="add one, or remove `speculate`",
            )
        return self

    @model_validator(mode="after")
    def _require_one_small_model(self) -> Self:
        for name in self.experts:
            problem = "it is the name of a member" if name in ROLES else None
            if not re.match(EXPERT_NAME, name):
                problem = "a name has letters, digits, `.`, `_` and `-`"
            if problem:
                raise ProxyConfigError(problem, field=f"experts.{name}", remedy="give another name")
        if self.experts and not self.may_run_as_one:
            raise ProxyConfigError.worded(
                "`experts` are adapters of the antiexpert's model, in one pass with it",
                field="experts",
                remedy="give `antiexpert`, and as `expert` nothing or the same model with an "
                "adapter; remove `one_pass: false`",
            )
        return self

    @model_validator(mode="after")
    def _require_a_pair(self) -> Self:
        if self.one_pass and not self.may_run_as_one:
            raise ProxyConfigError(
                "the expert is not the antiexpert plus an adapter",
                field="one_pass",
                value=True,
                remedy="give `expert: {model: <the antiexpert>, lora: …}`, or remove `one_pass`",
            )
        return self

    @property
    def may_run_as_one(self) -> bool:
        """Whether experts are the antiexpert plus an adapter, and `one_pass` is not false."""
        if self.expert is None or self.antiexpert is None or self.one_pass is False:
            return False
        bare = self.expert.model_copy(update={"lora": None})
        return bool(self.expert.lora or self.experts) and self.antiexpert == bare

    @property
    def adapters(self) -> dict[str | None, str | None]:
        """The experts' adapters by name, in the order of their slots; first, under None, that of
        requests without a name, which may have none."""
        first: dict[str | None, str | None] = {None: self.expert.lora if self.expert else None}
        return first | dict(self.experts)

    def adapters_of(self, role: Role) -> dict[str, str]:
        """Return a member's adapters by their fields in the configuration; the base has none."""
        found: dict[str, str | None] = {}
        if role == "expert":
            found = {expert_field(name): lora for name, lora in self.adapters.items()}
        elif role == "antiexpert" and self.antiexpert is not None:
            found = {role: self.antiexpert.lora}
        return {field: lora for field, lora in found.items() if lora is not None}

    @property
    def roles(self) -> tuple[Role, ...]:
        """The members that are configured, in the order of `ROLES`."""
        missing = {r for r in ("expert", "antiexpert") if getattr(self, r) is None}
        return tuple(role for role in ROLES if role not in missing)

    def effective_role(self, role: Role) -> Role:
        """Return the member whose logits are used for *role*: the base instead of a missing one."""
        return role if role in self.roles else "base"

    @property
    def control(self) -> RequestControl:
        """What a request gets if it sets nothing itself."""
        return RequestControl(alpha=self.alpha, filters=self.filters)


class ProxyConfig(ProxySection):
    """A proxy-tuned model: the members, the strength, and arguments passed on to vLLM."""

    base: MemberField
    """The large model whose logits are shifted."""
    engine: dict[str, Any] = {}
    """Any vLLM engine argument by its Python name, checked by vLLM's parser."""
    sampling: dict[str, Any] = {}
    """Defaults for generation: any field of `vllm.SamplingParams`."""

    _RESERVED: ClassVar[dict[str, str]] = {
        "model": "set `base` instead",
        "revision": "set `base: {model: …, revision: …}` instead",
    }

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read and validate a YAML file.

        Raises:
            ProxyConfigError: the file is missing, is not a YAML mapping, or a field is wrong.
        """
        source = f"config {str(path)!r}"
        values = read_yaml(path, source, "give the path of a YAML file")
        if not isinstance(values, dict):
            raise ProxyConfigError(
                field=source, remedy="expected a mapping with `base`, `expert` and `antiexpert`"
            )
        return cls.parse(values, source)

    @classmethod
    def parse(cls, values: Mapping[str, Any], source: str) -> Self:
        """Validate *values*; see `ProxySection`. Raises `ProxyConfigError`."""
        config = super().parse(values, source)
        if problem := config._problem():
            raise problem.within(source)
        return config

    def _problem(self) -> ProxyConfigError | None:
        """Return what is wrong with fields that are right by themselves; None if nothing is."""
        if self.base.lora is not None:
            return ProxyConfigError(
                "an adapter belongs to the expert or the antiexpert",
                field="base.lora",
                value=self.base.lora,
                remedy="remove it, or merge it into the base with PEFT",
            )
        for key, remedy in self._RESERVED.items():
            if key in self.engine:
                return _set_by_members(f"engine.{key}", remedy)
        overrides = self.engine.get("hf_overrides", {})
        if not isinstance(overrides, dict):
            return ProxyConfigError(
                field="engine.hf_overrides", value=overrides, remedy="it must be a mapping"
            )
        for key in ("architectures", "proxy"):
            if key in overrides:
                return _set_by_members(f"engine.hf_overrides.{key}", "remove it")
        if name := next(_not_finite(self.engine, "engine"), None):
            return ProxyConfigError.worded(
                f"`{name}` is not a finite number", field=name, remedy="give one"
            )
        if self.speculate is not None and "speculative_config" in self.engine:
            return ProxyConfigError(
                "the expert drafts, but `engine.speculative_config` names another drafter",
                field="speculate",
                remedy="remove one of them",
            )
        return None

    def member(self, role: Role) -> Member:
        """Return the model whose logits are used for *role* (`effective_role`)."""
        return getattr(self, self.effective_role(role))

    def hf_overrides(self) -> dict[str, Any]:
        """Return the overrides by which vLLM loads all members instead of the base alone."""
        fields = set(ProxySection.model_fields)
        section = self.model_dump(include=fields, exclude_none=True, mode="json")
        section = {key: value for key, value in section.items() if value != {}}
        user = self.engine.get("hf_overrides", {})
        sees = allows_images(self.engine.get("limit_mm_per_prompt"))
        architecture = IMAGE_ARCHITECTURE if sees else ARCHITECTURE
        return {**user, "architectures": [architecture], "proxy": section}

    def engine_args(self) -> dict[str, Any]:
        """Return keyword arguments for `vllm.LLM` or `vllm.EngineArgs`."""
        args = {
            **self.engine,
            "model": self.base.model,
            "hf_overrides": self.hf_overrides(),
        }
        if self.base.revision is not None:
            args["revision"] = self.base.revision
        if self.speculate is not None:
            args["speculative_config"] = self.speculate.engine_argument(self.base)
        return args

    def serve_arguments(self) -> list[str]:
        """Return the arguments of the `vllm serve` command for this configuration."""
        return serve_arguments(self.engine_args())


def _set_by_members(field: str, remedy: str) -> ProxyConfigError:
    return ProxyConfigError.worded(f"`{field}` is set by the members", field=field, remedy=remedy)


def _not_finite(value: object, name: str) -> Iterator[str]:
    """Yield the names of numbers within *value* that are NaN or infinite, which JSON lacks."""
    if isinstance(value, float) and not isfinite(value):
        yield name
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _not_finite(inner, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _not_finite(inner, name)
