"""`ProxyConfig`: two or three models, a strength, and what to pass on to vLLM. Imports neither.

The same fields are read from a YAML file, from keyword arguments, and (`ProxySection`) from the
`proxy` entry of `--hf-overrides` inside every vLLM process.
"""

from collections.abc import Iterator, Mapping
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

from vllm_proxy.config.engine_arguments import serve_arguments
from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.request import RequestControl
from vllm_proxy.config.roles import ROLES, Role
from vllm_proxy.config.strength import Filters, Strength
from vllm_proxy.config.validation import validation_error
from vllm_proxy.config.yaml_file import read_yaml

ARCHITECTURE = "ProxyTunedForCausalLM"
"""The name under which vLLM's model registry knows the model of several members."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @classmethod
    def parse(cls, values: Mapping[str, Any], source: str) -> Self:
        """Validate *values*.

        Raises:
            ProxyConfigError: naming *source*, the first wrong field, its value and the remedy.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise validation_error(cls, error).within(source) from None


class Member(_Strict):
    """One of the models.

    Attributes:
        model: a local directory or a model id on the hub, as vLLM's own `model` argument.
        revision: branch, tag or commit of the model on the hub.
        lora: a PEFT adapter to merge into the model while it is loaded: a local directory or an id
            on the hub. Not for the base.
    """

    model: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    lora: Annotated[str, Field(min_length=1)] | None = None

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
# May be left out, but not be None: a key without a value is a mistake.
OptionalMemberField = Annotated[Member | None, BeforeValidator(_member_from_string)]


ChatFormat = Literal["template", "plain"]


class ChatFormats(_Strict):
    """How each member sees the messages of a conversation; one that is not named sees plain text.

    `template` is the chat template of the member's own checkpoint; `plain` the contents of the
    messages, joined by blank lines and encoded like a text prompt. The paper's chat expert sees its
    template, base and antiexpert plain text: `{expert: template}`.
    """

    base: ChatFormat = "plain"
    expert: ChatFormat = "plain"
    antiexpert: ChatFormat = "plain"

    @model_validator(mode="after")
    def _require_a_member(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("name a member and its format, `expert: template`; or remove `chat`")
        return self

    @model_serializer
    def _as_given(self) -> dict[str, str]:
        return {role: self.of(role) for role in ROLES if role in self.model_fields_set}

    def of(self, role: Role) -> ChatFormat:
        """Return what *role* sees."""
        return getattr(self, role)


MOST_DRAFTS = 128
"""vLLM's rejection sampler takes no more (`MAX_SPEC_LEN`)."""


class Speculate(_Strict):
    """The expert drafts, and one pass of all members verifies.

    Greedy answers are those without drafts; sampled ones have the same distribution, by rejection
    sampling (Leviathan et al. 2023, arXiv 2211.17192) against the fused distribution.

    Attributes:
        tokens: how many the expert drafts before each pass, at most.
        requests: most that run at once for the expert to draft; None for any number. A pass of many
            rows is bound by arithmetic, and rejected drafts cost as much as tokens.
        adapt: false for so many always. Else fewer are drafted, or none, while that is faster, and
            what a seed draws depends on the clock.
    """

    tokens: Annotated[int, Field(ge=1, le=MOST_DRAFTS, strict=True)]
    requests: Annotated[int, Field(ge=1, strict=True)] | None = None
    adapt: Annotated[bool, Field(strict=True)] | None = None

    @property
    def adapts(self) -> bool:
        """Whether fewer may be drafted."""
        return self.adapt is not False

    @property
    def schedule(self) -> list[tuple[int, int, int]] | None:
        """How many drafts from one number of requests to another; the last holds from there on.

        None if it is always the same. With a schedule, even of one entry, vLLM lets its scheduler
        say how many (`num_speculative_tokens_per_batch_size`).
        """
        if (most := self.requests) is not None:
            return [(1, most, self.tokens), (most + 1, most + 1, 0)]
        return [(1, 1, self.tokens)] if self.adapts else None

    def engine_argument(self, base: Member) -> dict[str, Any]:
        """Return how vLLM is told of the drafts; its drafter is exchanged for the expert.

        As its model the base is named, whose configuration stands for all members' elsewhere, too:
        vocabulary and context are what vLLM wants alike in both.
        """
        drafts = {
            "method": "draft_model",
            "model": base.model,
            "revision": base.revision,
            "num_speculative_tokens": self.tokens,
            "num_speculative_tokens_per_batch_size": self.schedule,
        }
        return {key: value for key, value in drafts.items() if value is not None}


class ProxySection(_Strict):
    """What `ProxyTunedForCausalLM` needs beside the base: `hf_config.proxy`.

    One of expert and antiexpert may be missing; the base then plays its part. Without an expert
    this is `base + alpha * (base - antiexpert)`: contrastive decoding (O'Brien and Lewis 2023,
    arXiv 2309.09117) and DExperts' anti-only ablation (Liu et al. 2021, arXiv 2105.03023). Without
    an antiexpert it is the interpolation `(1 - alpha) * base + alpha * expert`.

    Attributes:
        expert: the small model after fine-tuning.
        antiexpert: the same small model before it.
        alpha: strength of the shift: any number up to 1e30 either way, 1.0 is the paper's;
            `adaptive`; or a schedule. A request may have its own.
        filters: tokens to leave out by the base's own probabilities. A request may have its own.
        chat: how each member sees a conversation; None for all as the base's chat template has it.
        speculate: how the expert drafts; None if it does not.
        one_pass: whether an expert that is the antiexpert and an adapter runs in one pass with it;
            None if it can.
    """

    expert: OptionalMemberField = None
    antiexpert: OptionalMemberField = None
    alpha: Strength = 1.0
    filters: Filters = Filters()
    chat: ChatFormats | None = None
    speculate: Speculate | None = None
    one_pass: Annotated[bool, Field(strict=True)] | None = None

    @model_validator(mode="after")
    def _require_a_second_member(self) -> Self:
        if self.expert is None and self.antiexpert is None:
            raise ValueError("`expert` and `antiexpert` are missing; add one of them, or both")
        return self

    @model_validator(mode="after")
    def _require_members_of_chat(self) -> Self:
        for role in self.chat.model_fields_set if self.chat else ():
            if role not in self.roles:
                raise ValueError(
                    f"`chat.{role}` is {self.chat.of(role)!r}: there is no {role}; remove it"
                )
        return self

    @model_validator(mode="after")
    def _require_a_drafter(self) -> Self:
        if self.speculate is not None and self.expert is None:
            raise ValueError("`speculate`: there is no expert to draft; add one, or remove it")
        return self

    @model_validator(mode="after")
    def _require_a_pair(self) -> Self:
        if self.one_pass and not self.may_run_as_one:
            raise ValueError(
                "`one_pass`: the expert is not the antiexpert and an adapter; give "
                "`expert: {model: <the antiexpert>, lora: …}`, or remove it"
            )
        return self

    @property
    def may_run_as_one(self) -> bool:
        """Whether the expert is the antiexpert and an adapter, and nobody wants it merged."""
        if self.expert is None or self.antiexpert is None or self.one_pass is False:
            return False
        bare = self.expert.model_copy(update={"lora": None})
        return self.expert.lora is not None and self.antiexpert == bare

    @property
    def roles(self) -> tuple[Role, ...]:
        """The members that there are, in the order of `ROLES`."""
        missing = {r for r in ("expert", "antiexpert") if getattr(self, r) is None}
        return tuple(role for role in ROLES if role not in missing)

    def player(self, role: Role) -> Role:
        """Return the member that plays *role*: the base in the place of a missing one."""
        return role if role in self.roles else "base"

    @property
    def control(self) -> RequestControl:
        """What requests get that ask for nothing of their own."""
        return RequestControl(alpha=self.alpha, filters=self.filters)


class ProxyConfig(ProxySection):
    """A proxy-tuned model: the members, the strength, and arguments passed on to vLLM.

    Attributes:
        base: the large model whose predictions are moved.
        engine: any vLLM engine argument by its Python name, checked by vLLM's own parser.
        sampling: defaults for generation, any field of `vllm.SamplingParams`.
    """

    base: MemberField
    engine: dict[str, Any] = {}
    sampling: dict[str, Any] = {}

    _RESERVED: ClassVar[dict[str, str]] = {
        "model": "set `base` instead",
        "revision": "set `base: {model: …, revision: …}` instead",
    }

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read and validate a YAML file.

        Raises:
            ProxyConfigError: the file is missing, is no YAML mapping, or a field is wrong.
        """
        source = f"config {str(path)!r}"
        values = read_yaml(path, source, "give the path of a YAML file")
        if not isinstance(values, dict):
            raise ProxyConfigError(
                f"{source}: expected a mapping with `base`, `expert` and `antiexpert`"
            )
        return cls.parse(values, source)

    @classmethod
    def parse(cls, values: Mapping[str, Any], source: str) -> Self:
        """Validate *values*; see `ProxySection`. Raises `ProxyConfigError`."""
        config = super().parse(values, source)
        if config.base.lora is not None:
            raise ProxyConfigError(
                f"{source}: `base.lora` is {config.base.lora!r}: an adapter belongs to the expert "
                "or the antiexpert; remove it, or merge it into the base with PEFT"
            )
        for key, remedy in cls._RESERVED.items():
            if key in config.engine:
                raise ProxyConfigError(f"{source}: `engine.{key}` is set by the members; {remedy}")
        overrides = config.engine.get("hf_overrides", {})
        if not isinstance(overrides, dict):
            raise ProxyConfigError(
                f"{source}: `engine.hf_overrides` is {overrides!r}; it must be a mapping"
            )
        for key in ("architectures", "proxy"):
            if key in overrides:
                raise ProxyConfigError(
                    f"{source}: `engine.hf_overrides.{key}` is set by the members; remove it"
                )
        if wrong := next(_not_finite(config.engine, "engine"), None):
            raise ProxyConfigError(f"{source}: `{wrong}` is not a finite number; give one")
        if config.speculate is not None and "speculative_config" in config.engine:
            raise ProxyConfigError(
                f"{source}: `speculate` has the expert draft, `engine.speculative_config` has "
                "something else draft; remove one of them"
            )
        return config

    def member(self, role: Role) -> Member:
        """Return the member that plays *role*."""
        return getattr(self, self.player(role))

    def hf_overrides(self) -> dict[str, Any]:
        """Return what turns vLLM's loading of the base into loading of all members."""
        fields = set(ProxySection.model_fields)
        section = self.model_dump(include=fields, exclude_none=True, mode="json")
        section = {key: value for key, value in section.items() if value != {}}
        user = self.engine.get("hf_overrides", {})
        return {**user, "architectures": [ARCHITECTURE], "proxy": section}

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
        """Return the words after `vllm serve` that serve this configuration."""
        return serve_arguments(self.engine_args())


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
