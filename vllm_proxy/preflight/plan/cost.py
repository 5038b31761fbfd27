"""The least time of a step: every member's bytes, arithmetic and messages, one after the other.

Of each member: its layers' products, its attention and its head, each as long as its bytes at the
device's bandwidth or its arithmetic at the device's peak (they do not overlap), and then what its
ranks and stages tell each other. What an engine does beside (sampling, scheduling, launching
kernels, reading and writing activations) is not counted, nor is any device at its peak in practice:
these are limits, and good for ratios.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal, NamedTuple

from vllm_proxy.config.roles import Role
from vllm_proxy.preflight.plan.hardware import NO_BATCH, Batch, Hardware, Link
from vllm_proxy.preflight.plan.layout import Layout
from vllm_proxy.preflight.plan.shape import Attention, Shape

LOGIT_BYTES = 4
"""Logits are gathered in float32."""

Bound = Literal["memory", "compute", "communication"]


@dataclass(frozen=True, slots=True)
class Engine:
    """What all members have in common.

    Attributes:
        dtype: of weights that are not quantized, and of activations.
        itemsize: bytes of a number in it.
        kv_itemsize: bytes of a number in the KV cache.
        utilization: part of a GPU's memory that an engine may use.
        kv_cache_bytes: memory for the KV cache a GPU, if it was given.
        windows: whether keys and values behind a sliding window are let go.
        batch: most tokens and requests of a step.
        drafts: tokens that the expert drafts before each pass.
        drafting: requests at once, at most, for which it does; None for any number.
    """

    dtype: str
    itemsize: int
    kv_itemsize: int
    utilization: float = 1.0
    kv_cache_bytes: int | None = None
    windows: bool = True
    batch: Batch = NO_BATCH
    drafts: int = 0
    drafting: int | None = None


class Load(NamedTuple):
    """What a step does: *requests*, each with *new* tokens, the last of *tokens*.

    Of each, *scored* tokens have logits.
    """

    requests: int
    new: int
    tokens: int
    scored: int = 1


@dataclass(frozen=True, slots=True)
class Time:
    """Seconds, by what they were spent on: parts that are bound by memory, by arithmetic, by links.

    They follow each other: times of several members, or stages, add up.
    """

    memory: float = 0.0
    compute: float = 0.0
    communication: float = 0.0

    def __add__(self, other: "Time") -> "Time":
        return Time(
            self.memory + other.memory,
            self.compute + other.compute,
            self.communication + other.communication,
        )

    def __mul__(self, times: float) -> "Time":
        return Time(self.memory * times, self.compute * times, self.communication * times)

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.memory + self.compute + self.communication

    @property
    def bound(self) -> Bound:
        """What most of it is spent on."""
        return max(("memory", "compute", "communication"), key=lambda kind: getattr(self, kind))


def total(times: Mapping[Role, Time]) -> Time:
    """Return the time of several members."""
    return sum(times.values(), Time())


def step(
    shapes: Sequence[Shape], layout: Layout, load: Load, engine: Engine, gpu: Hardware
) -> dict[Role, Time]:
    """Return each member's time in which one replica gives all its requests their next token.

    Pipeline stages work side by side on as many parts of the requests; a request's next token then
    comes as often as the slowest stage has worked on all parts, and not before all stages have
    worked on its own.
    """
    parts = min(layout.pp, load.requests)
    part = load._replace(requests=ceil(load.requests / parts))
    stages = [
        {shape.role: _stage(shape, layout, stage, part, engine, gpu) for shape in shapes}
        for stage in range(layout.pp)
    ]
    slowest = max(stages, key=lambda times: total(times).seconds)
    through = {shape.role: sum((s[shape.role] for s in stages), Time()) for shape in shapes}
    around = {role: time * parts for role, time in slowest.items()}
    return max(through, around, key=lambda times: total(times).seconds)


def _stage(
    shape: Shape, layout: Layout, stage: int, load: Load, engine: Engine, gpu: Hardware
) -> Time:
    """Return a member's time on one stage, whose ranks all take the same."""
    rows, share, tp = load.requests * load.new, shape.share(layout, stage), layout.tp
    attention = shape.stage_attention(layout, stage)
    kv = load.requests * engine.kv_itemsize
    time = (
        _layers(shape, share / tp, rows, gpu)
        # Keys and values are moved once: read while decoding, written with a prompt. A query
        # multiplies each key and each value that it sees, in every head.
        + _work(
            kv * sum(layer.kept(load.tokens) * layer.kv_numbers(tp) for layer in attention),
            4 * load.requests * sum(_products(layer, load) for layer in attention) / tp,
            gpu,
        )
    )
    if layout.is_last(stage):
        operations = 2 * load.requests * load.scored * shape.head.parameters
        time += _work(shape.head.bytes / tp, operations / tp, gpu)
    return time + Time(communication=_messages(shape, layout, stage, load, engine, gpu.link))


def _layers(shape: Shape, share: float, rows: int, gpu: Hardware) -> Time:
    """Return the time of the layers' products, of a rank that has *share* of them.

    In one pass with another member, what it adds to that one's: the weights are read once.
    """
    read = share * (shape.layers.bytes + shape.touched_expert_bytes(rows))
    operations = 2 * rows * share * (shape.layers.parameters + shape.active_experts)
    if (other := shape.beside) is None:
        return _work(read, operations, gpu)
    read += share * (other.layers.bytes + other.touched_expert_bytes(2 * rows))
    operations += 4 * rows * share * (other.layers.parameters + other.active_experts)
    both, alone = _work(read, operations, gpu), _layers(other, share, rows, gpu)
    return Time(**{both.bound: both.seconds - alone.seconds})


def _products(layer: Attention, load: Load) -> int:
    return layer.heads * layer.head_size * layer.pairs(load.new, load.tokens)


def _work(bytes_moved: float, operations: float, gpu: Hardware) -> Time:
    seconds = gpu.roofline.seconds(bytes_moved, operations)
    if bytes_moved / gpu.roofline.bytes_per_second >= seconds:
        return Time(memory=seconds)
    return Time(compute=seconds)


def _messages(
    shape: Shape, layout: Layout, stage: int, load: Load, engine: Engine, link: Link | None
) -> float:
    """Return the seconds in which ranks add up hidden states and pass them to the next stage.

    Two all-reduces a layer (Shoeybi et al. 2019) and one of the embedding, as rings: each rank
    sends 2 (n-1)/n of the tensor. The logits, fused, are gathered once: that is the base's.
    """
    if link is None:
        return 0.0
    seconds, tp = 0.0, layout.tp
    latency = 0.0 if shape.beside else link.latency  # its rows go with the other's
    hidden = load.requests * load.new * shape.hidden_size * engine.itemsize
    if tp > 1:
        sums = 2 * len(shape.stage_attention(layout, stage)) + (stage == 0)
        seconds += sums * (latency + 2 * (tp - 1) / tp * hidden / link.bytes_per_second)
        if layout.is_last(stage) and shape.role == "base":
            logits = load.requests * load.scored * shape.vocab_size * LOGIT_BYTES
            seconds += link.latency + (tp - 1) / tp * logits / link.bytes_per_second
    if not layout.is_last(stage):  # hidden states and residuals
        seconds += latency + 2 * hidden / link.bytes_per_second
    return seconds
