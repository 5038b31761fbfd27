"""What a server's `/metrics` reports about proxy tuning: members, strengths, drafts.

They count where vLLM's metrics do: in the process that admits requests, into the registry that it
serves. With several API servers, each counts its requests. All values of labels are known before.
"""

from collections import defaultdict
from collections.abc import Iterable
from functools import cache, wraps
from typing import Any, NamedTuple

from prometheus_client import Counter, Gauge, Histogram
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import OutputProcessor, RequestState
from vllm.v1.metrics.stats import RequestStateStats, SchedulerStats
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_proxy.config.request import PROMPT_KEYS, RequestControl
from vllm_proxy.config.roles import ROLES, Role
from vllm_proxy.config.schema import ProxySection
from vllm_proxy.config.strength import ADAPTIVE, Filters, Schedule
from vllm_proxy.engine.compatibility import require_part
from vllm_proxy.members.vllm_configs import proxy_section
from vllm_proxy.model.controls import LogitControls

PROXY = "proxy"
"""Label of answers that do not come from a single member."""
STRENGTHS = ("constant", "first", "linear", ADAPTIVE, "weights")
OFF = LogitControls(1.0, 0.0, 0.0)
"""Controls whose filters keep every token."""
ALPHAS = (-2.0, -1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
DRAFTS = (1, 2, 3, 4, 5, 6, 8, 12, 16)


class _Families(NamedTuple):
    """The metrics of this process."""

    requests: Counter
    prompt_tokens: Counter
    generation_tokens: Counter
    alpha: Histogram
    filtered: Counter
    prompted: Counter
    draft_length: Histogram
    members: Gauge


@cache
def _families() -> _Families:
    """Make the metrics; once, since a registry accepts each name once."""
    one, member = ("model_name",), ("model_name", "member")
    by_member = "by the member that answers alone, or `proxy`"
    return _Families(
        Counter(
            "vllm_proxy_requests",
            f"Requests admitted (each of n choices), {by_member}, and by kind of strength.",
            (*member, "strength"),
        ),
        Counter("vllm_proxy_prompt_tokens", f"The base's prompt tokens, {by_member}.", member),
        Counter(
            "vllm_proxy_generation_tokens",
            f"Tokens generated, {by_member}; counted when a request ends.",
            member,
        ),
        Histogram(
            "vllm_proxy_alpha",
            "Strength of requests that have one: alpha, or the first token's of a schedule.",
            one,
            buckets=ALPHAS,
        ),
        Counter(
            "vllm_proxy_filtered_requests",
            "Requests with a filter on the base's probabilities.",
            ("model_name", "filter"),
        ),
        Counter(
            "vllm_proxy_prompted_requests",
            "Requests with a different prompt for this member.",
            member,
        ),
        Histogram(
            "vllm_proxy_draft_length",
            "Drafted tokens verified for a request in one pass, where any were drafted.",
            one,
            buckets=DRAFTS,
        ),
        Gauge(
            "vllm_proxy_member_info",
            "Always 1; the labels name each member's model.",
            (*member, "model"),
            multiprocess_mode="mostrecent",
        ),
    )


class Kind(NamedTuple):
    """The labels of a request.

    Attributes:
        member: the member that answers alone, or `PROXY`.
        strength: one of `STRENGTHS`.
        alpha: of the first token; None if there is none.
        filters: those that are on.
        prompts: members that have a different prompt.
    """

    member: str
    strength: str
    alpha: float | None
    filters: tuple[str, ...]
    prompts: tuple[str, ...]


def kind_of(params: SamplingParams, section: ProxySection) -> Kind:
    """Return the labels of an admitted request to an engine of *section*'s members."""
    default = section.control
    control = RequestControl.from_extra_args(params.extra_args) or RequestControl()
    row = LogitControls.of(control, default)
    is_fixed = not row.adaptive and row.slope == 0 and row.steps == float("inf")
    alpha = default.alpha if control.alpha is None else control.alpha
    if control.weights is not None:
        strength, alpha = "weights", None
    elif alpha == ADAPTIVE:
        strength, alpha = ADAPTIVE, None
    elif isinstance(alpha, Schedule):
        strength, alpha = alpha.schedule, alpha.alpha
    else:
        strength = "constant"
    return Kind(
        _answering(row.coefficients, section) if is_fixed else PROXY,
        strength,
        alpha,
        tuple(name for name in Filters.model_fields if getattr(row, name) != getattr(OFF, name)),
        tuple(control.prompts),
    )


def _answering(weights: tuple[float, float, float], section: ProxySection) -> str:
    """Return the only member with a weight, if that is 1; else `PROXY`."""
    of_members: dict[Role, float] = defaultdict(float)
    for role, weight in zip(ROLES, weights, strict=True):
        of_members[section.effective_role(role)] += weight
    weighed = [role for role, weight in of_members.items() if weight]
    return weighed[0] if len(weighed) == 1 and of_members[weighed[0]] == 1 else PROXY


class Meter:
    """Counts one engine's requests."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        model = vllm_config.model_config
        self.section = proxy_section(model)
        self.name = model.served_model_name
        self.families = families = _families()
        # Make every series now, so that a rate is 0 and not missing before the first request.
        for member in (PROXY, *self.section.roles):
            for strength in STRENGTHS:
                families.requests.labels(self.name, member, strength)
            families.prompt_tokens.labels(self.name, member)
            families.generation_tokens.labels(self.name, member)
        for name in Filters.model_fields:
            families.filtered.labels(self.name, name)
        for role in PROMPT_KEYS:
            if role in self.section.roles:
                families.prompted.labels(self.name, role)
        for role in self.section.roles:
            path = model.model if role == "base" else str(getattr(self.section, role))
            families.members.labels(self.name, role, path).set(1)
        self.alpha = families.alpha.labels(self.name)
        self.draft_length = families.draft_length.labels(self.name)

    def admit(self, params: SamplingParams, prompt_tokens: int) -> Counter:
        """Count a request; return the counter of its tokens."""
        kind = kind_of(params, self.section)
        self.families.requests.labels(self.name, kind.member, kind.strength).inc()
        self.families.prompt_tokens.labels(self.name, kind.member).inc(prompt_tokens)
        if kind.alpha is not None:
            self.alpha.observe(kind.alpha)
        for name in kind.filters:
            self.families.filtered.labels(self.name, name).inc()
        for role in kind.prompts:
            self.families.prompted.labels(self.name, role).inc()
        return self.families.generation_tokens.labels(self.name, kind.member)

    def draft(self, stats: SpecDecodingStats) -> None:
        """Count a step's drafts: vLLM reports how many requests had a draft at each position."""
        reached = [*stats.num_draft_tokens_per_pos, 0]
        for length in range(1, len(reached)):
            for _ in range(reached[length - 1] - reached[length]):
                self.draft_length.observe(length)


class MeteredOutputProcessor(OutputProcessor):
    """vLLM's output processor, which also counts requests where they begin and end."""

    meter: Meter
    running: dict[str, tuple[RequestStateStats, Counter]]

    @classmethod
    def take_over(cls, processor: OutputProcessor, meter: Meter) -> None:
        """Make vLLM's *processor* one of these."""
        processor.__class__ = cls
        processor.meter, processor.running = meter, {}

    def add_request(self, request: EngineCoreRequest, *args: Any, **kwargs: Any) -> None:
        """Add a request, or more of the prompt of a request that streams it."""
        is_new = request.request_id not in self.request_states
        super().add_request(request, *args, **kwargs)
        if is_new and request.sampling_params is not None:
            state = self.request_states[request.request_id]
            tokens = self.meter.admit(request.sampling_params, state.prompt_len)
            self.running[request.request_id] = state.stats, tokens

    def abort_requests(self, request_ids: Iterable[str], internal: bool) -> list[str]:
        """Remove requests whose clients are gone."""
        aborted = super().abort_requests(request_ids, internal)
        for request_id in aborted:
            self._count(request_id)
        return aborted

    def update_scheduler_stats(self, scheduler_stats: SchedulerStats | None) -> None:
        """Count the drafts in a step's statistics."""
        super().update_scheduler_stats(scheduler_stats)
        if scheduler_stats is not None and scheduler_stats.spec_decoding_stats is not None:
            self.meter.draft(scheduler_stats.spec_decoding_stats)

    def _finish_request(self, req_state: RequestState) -> None:
        super()._finish_request(req_state)
        self._count(req_state.request_id)

    def _count(self, request_id: str) -> None:
        stats, tokens = self.running.pop(request_id, (None, None))
        if stats is not None:
            tokens.inc(stats.num_generation_tokens)


@cache
def meter_servers() -> None:
    """Make every `AsyncLLM` of this process count, if its model is ours and it keeps statistics."""
    require_part("metrics")
    start = AsyncLLM.__init__

    @wraps(start)
    def start_metered(self: AsyncLLM, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        is_ours = getattr(self.model_config.hf_config, "proxy", None) is not None
        if is_ours and self.log_stats:
            MeteredOutputProcessor.take_over(self.output_processor, Meter(self.vllm_config))

    AsyncLLM.__init__ = start_metered
