"""A layout's figures, for all members and for the base alone."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import NamedTuple

from vllm_proxy.config.roles import Role
from vllm_proxy.engine.drafting.lengths import tokens_a_pass
from vllm_proxy.preflight.plan.cost import (
    EngineSettings,
    Load,
    Time,
    drafted_step,
    step,
    total,
)
from vllm_proxy.preflight.plan.hardware import Hardware
from vllm_proxy.preflight.plan.layout import Layout
from vllm_proxy.preflight.plan.memory import Room, room
from vllm_proxy.preflight.plan.shape import Shape


class Demand(NamedTuple):
    """The requests to all replicas together.

    Attributes:
        concurrency: number of simultaneous requests.
        context: tokens of each request in the KV cache.
        prompt: tokens of the prompt whose prefill is timed.
    """

    concurrency: int
    context: int
    prompt: int


@dataclass(frozen=True, slots=True)
class Prediction:
    """Figures of some members on one layout.

    Attributes:
        fit: number of requests that fit, in all replicas.
        running: number of simultaneous requests, in all replicas: as demanded, or as many as fit.
        step: each member's part of a decode step, in the replica with most requests.
        prefill: each member's part of a step with the prompt of one request.
    """

    fit: int
    running: int
    step: Mapping[Role, Time]
    prefill: Mapping[Role, Time]

    @property
    def step_seconds(self) -> float:
        """Duration of a decode step: the time between two tokens of a request."""
        return total(self.step).seconds

    @property
    def prefill_seconds(self) -> float:
        """Time from a prompt to its first token, if nothing else runs."""
        return total(self.prefill).seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens generated per second by all replicas, while nothing is prefilled."""
        return self.running / self.step_seconds


@dataclass(frozen=True, slots=True)
class Drafting:
    """Passes of all members after the expert has drafted.

    Attributes:
        drafts: tokens drafted before each pass.
        running: number of simultaneous requests, in all replicas.
        times: each member's part of a pass, including the expert's drafting.
        plain: seconds of a step of all members without drafts, for these requests.
        base: seconds of a step of the base alone, for these requests.
    """

    drafts: int
    running: int
    times: Mapping[Role, Time]
    plain: float
    base: float

    @property
    def seconds(self) -> float:
        """Duration of a pass and its drafts."""
        return total(self.times).seconds

    def tokens(self, acceptance: float) -> float:
        """Return the expected tokens per pass, by the formula that engines adapt with."""
        return float(tokens_a_pass(self.drafts, acceptance, acceptance)[-1])

    def acceptance(self, tokens: float) -> float | None:
        """Return the acceptance at which a pass yields *tokens*; None if no acceptance does."""
        if tokens > self.drafts + 1:
            return None
        least, most = 0.0, 1.0
        for _ in range(40):
            middle = (least + most) / 2
            least, most = (middle, most) if self.tokens(middle) < tokens else (least, middle)
        return most

    @property
    def acceptance_to_pay(self) -> float | None:
        """Least acceptance at which drafting is faster than not drafting; None if there is none."""
        return self.acceptance(self.seconds / self.plain)

    @property
    def acceptance_to_beat_base(self) -> float | None:
        """Least acceptance at which the proxy is faster than the base; None if there is none."""
        return self.acceptance(self.seconds / self.base)


@dataclass(frozen=True, slots=True)
class Choice:
    """A layout on which the members fit.

    Attributes:
        layout: TP, PP and replicas.
        proxy: all members.
        base: the base alone with the same number of running requests.
        base_at_most: the base alone with as many requests as demanded, or as fit with it.
        activations: bytes of a step on the fullest GPU.
        drafting: passes with drafts; None without.
    """

    layout: Layout
    proxy: Prediction
    base: Prediction
    base_at_most: Prediction
    activations: float = 0.0
    drafting: Drafting | None = None

    @property
    def step_overhead(self) -> float:
        """Duration of a decode step relative to the base's, for the same requests."""
        return self.proxy.step_seconds / self.base.step_seconds

    @property
    def prefill_overhead(self) -> float:
        """Duration of a prefill relative to the base's."""
        return self.proxy.prefill_seconds / self.base.prefill_seconds


def predict(
    shapes: Sequence[Shape],
    layout: Layout,
    demand: Demand,
    engine: EngineSettings,
    gpu: Hardware,
    *,
    fit: int,
    running: int | None = None,
) -> Prediction:
    """Return the figures of members on one layout.

    Args:
        shapes: the members.
        layout: how they are spread over GPUs.
        demand: the requests.
        engine: settings that members share.
        gpu: each of the GPUs.
        fit: number of requests that fit in a replica, at least 1.
        running: number of simultaneous requests, in all replicas; None for the demand, or as many
            as fit.
    """
    if running is None:
        running = min(demand.concurrency, fit * layout.replicas)
    most = ceil(running / layout.replicas)
    decode = Load(most, new=1, tokens=demand.context)
    prefill = Load(1, new=demand.prompt, tokens=demand.prompt)
    return Prediction(
        fit=fit * layout.replicas,
        running=running,
        step=step(shapes, layout, decode, engine, gpu, engine.decoding),
        prefill=step(shapes, layout, prefill, engine, gpu, "prefill"),
    )


def choose(
    shapes: Sequence[Shape], layout: Layout, demand: Demand, engine: EngineSettings, gpu: Hardware
) -> Choice | Room:
    """Return a layout's figures and the base's for comparison; its room if no request fits."""
    base = [shape for shape in shapes if shape.role == "base"]
    space = room(shapes, layout, demand.context, engine, gpu)
    if not space.requests:
        return space
    alone = room(base, layout, demand.context, engine, gpu).requests
    proxy = predict(shapes, layout, demand, engine, gpu, fit=space.requests)
    single = replace(engine, different_prompts=False)
    same = predict(base, layout, demand, single, gpu, fit=alone, running=proxy.running)
    most = predict(base, layout, demand, single, gpu, fit=alone)
    drafting = None
    if engine.drafts:
        drafting = _draft(shapes, layout, demand, engine, gpu, proxy.running)
    return Choice(layout, proxy, same, most, space.activations, drafting)


def _draft(
    shapes: Sequence[Shape],
    layout: Layout,
    demand: Demand,
    engine: EngineSettings,
    gpu: Hardware,
    running: int,
) -> Drafting:
    """Return the times of passes while as many requests run as the expert drafts for."""
    each = ceil(running / layout.replicas)
    if engine.drafting is not None:  # of each part that is in the pipeline
        each = min(each, engine.drafting * layout.pp)
    one = Load(each, new=1, tokens=demand.context)
    plain = step(shapes, layout, one, engine, gpu, engine.decoding)
    base = step([s for s in shapes if s.role == "base"], layout, one, engine, gpu)
    return Drafting(
        engine.drafts,
        each * layout.replicas,
        drafted_step(shapes, layout, one, engine, gpu),
        total(plain).seconds,
        total(base).seconds,
    )


def best_throughput(choices: Iterable[Choice]) -> Choice:
    """Return the choice with most tokens per second; of equals, that with the shortest step."""
    return max(choices, key=lambda c: (c.proxy.tokens_per_second, -c.proxy.step_seconds))


def best_latency(choices: Iterable[Choice]) -> Choice:
    """Return the choice with the shortest step, of those that run most requests at once."""
    return min(choices, key=lambda c: (-c.proxy.running, c.proxy.step_seconds))
