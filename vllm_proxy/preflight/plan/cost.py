"""The least time of a step: every member's bytes, arithmetic and messages, one after the other.

For each member: its layers' products, its attention and its head, and then the messages between its
ranks and stages. Each part takes the time of its bytes at the device's bandwidth or of its
arithmetic at the device's peak, whichever is longer; parts do not overlap. A member that runs
without a FULL CUDA graph takes at least the time of its launches (`launches.py`). Other work of an
engine (sampling, scheduling, reading and writing activations) is not counted, and no device reaches
its peak: these are lower limits, useful for ratios.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Literal, NamedTuple

from vllm_proxy.config.roles import Role
from vllm_proxy.members.attention import Attention
from vllm_proxy.preflight.plan.hardware import NO_BATCH, BatchLimits, Hardware, Link
from vllm_proxy.preflight.plan.launches import CAPTURED, Graphs, Part, host_seconds
from vllm_proxy.preflight.plan.layout import Layout
from vllm_proxy.preflight.plan.shape import Shape

BLOCK = 16
"""Tokens per KV cache block, vLLM's default: a request uses whole blocks."""
LOGIT_BYTES = 4
"""Logits are gathered in float32."""

Bound = Literal["memory", "compute", "communication", "host"]


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Settings that all members share.

    Attributes:
        dtype: dtype of activations, and of weights that are not quantized.
        itemsize: bytes of a number of this dtype.
        kv_itemsize: bytes of a number in the KV cache.
        utilization: fraction of a GPU's memory that an engine may use.
        kv_cache_bytes: memory for the KV cache per GPU; None if it is not configured.
        windows: whether keys and values behind a sliding window are freed.
        window: the window behind which all layers' are freed, if they share the largest one.
        block: tokens of a KV cache block; more where states must fit (`pages.py`).
        states: number of states that a running request has in each recurrent layer.
        batch: most tokens and requests per step.
        drafts: tokens that the expert drafts before each pass.
        drafting: the expert drafts for at most this number of running requests; None for any.
        different_prompts: whether members have different prompts.
        graphs: which CUDA graphs the parts of an engine's work run in.
    """

    dtype: str
    itemsize: int
    kv_itemsize: int
    utilization: float = 1.0
    kv_cache_bytes: int | None = None
    windows: bool = True
    window: int | None = None
    block: int = BLOCK
    states: int = 1
    batch: BatchLimits = NO_BATCH
    drafts: int = 0
    drafting: int | None = None
    different_prompts: bool = False
    graphs: Mapping[Part, Graphs] = field(default_factory=lambda: CAPTURED)

    @property
    def decoding(self) -> Part:
        """The kind of this engine's decode steps."""
        return "prompts" if self.different_prompts else "decode"


class Load(NamedTuple):
    """The work of one step.

    Attributes:
        requests: number of sequences.
        new: tokens of each sequence that are computed in this step, the last ones.
        tokens: length of each sequence.
        scored: tokens of each sequence that get logits.
    """

    requests: int
    new: int
    tokens: int
    scored: int = 1


@dataclass(frozen=True, slots=True)
class Time:
    """Seconds of work bound by memory, by arithmetic, by links between GPUs, and by launches.

    Nothing overlaps: the times of several members, or stages, add up.
    """

    memory: float = 0.0
    compute: float = 0.0
    communication: float = 0.0
    host: float = 0.0

    def __add__(self, other: "Time") -> "Time":
        return Time(
            self.memory + other.memory,
            self.compute + other.compute,
            self.communication + other.communication,
            self.host + other.host,
        )

    def __mul__(self, times: float) -> "Time":
        return Time(
            self.memory * times, self.compute * times, self.communication * times, self.host * times
        )

    @property
    def seconds(self) -> float:
        """The sum of all four."""
        return self.memory + self.compute + self.communication + self.host

    @property
    def bound(self) -> Bound:
        """The kind that takes most of the time."""
        kinds: tuple[Bound, ...] = ("memory", "compute", "communication", "host")
        return max(kinds, key=lambda kind: getattr(self, kind))


def total(times: Mapping[Role, Time]) -> Time:
    """Return the time of several members."""
    return sum(times.values(), Time())


def step(
    shapes: Sequence[Shape],
    layout: Layout,
    load: Load,
    engine: EngineSettings,
    gpu: Hardware,
    part: Part = "decode",
) -> dict[Role, Time]:
    """Return the time that each member takes until all requests of one replica get a token.

    *part* is the kind of work, on which its CUDA graphs depend.

    With pipeline stages the requests are split into as many parts, and the stages work on different
    parts at the same time. The time between two tokens is then the longer of two: the slowest stage
    works on all parts, or one part passes through all stages.
    """
    return _slower(_stages(shapes, layout, load, engine, gpu, part), layout, load)


def drafted_step(
    shapes: Sequence[Shape], layout: Layout, load: Load, engine: EngineSettings, gpu: Hardware
) -> dict[Role, Time]:
    """Return the time of a pass that verifies the engine's drafts, and of drafting them.

    The last stage drafts for a part of the requests when their pass has come to its end.

    Args:
        shapes: the members.
        layout: how they are spread over GPUs.
        load: a step without drafts.
        engine: settings that members share.
        gpu: each of the GPUs.
    """
    rows = engine.drafts + 1
    several = load._replace(new=rows, scored=rows)
    stages = _stages(shapes, layout, several, engine, gpu, engine.decoding)
    draws = [shape for shape in shapes if shape.drafts]
    for role, time in _stages(draws, layout, load, engine, gpu, "drafts")[-1].items():
        stages[-1][role] += time * engine.drafts
    return _slower(stages, layout, load)


def _parts(layout: Layout, load: Load) -> int:
    return min(layout.pp, load.requests)


def _stages(
    shapes: Sequence[Shape],
    layout: Layout,
    load: Load,
    engine: EngineSettings,
    gpu: Hardware,
    part: Part,
) -> list[dict[Role, Time]]:
    """Return the time that each stage works on one part of the requests, by member."""
    each = load._replace(requests=ceil(load.requests / _parts(layout, load)))
    graphs = engine.graphs[part] if gpu.launches else "full"
    return [
        {shape.role: _stage(shape, layout, stage, each, engine, gpu, graphs) for shape in shapes}
        for stage in range(layout.pp)
    ]


def _slower(stages: list[dict[Role, Time]], layout: Layout, load: Load) -> dict[Role, Time]:
    """Return the time of one part through all stages, or of all parts on the slowest one."""
    slowest = max(stages, key=lambda times: total(times).seconds)
    through = {role: sum((times[role] for times in stages), Time()) for role in slowest}
    around = {role: time * _parts(layout, load) for role, time in slowest.items()}
    return max(through, around, key=lambda times: total(times).seconds)


def _stage(
    shape: Shape,
    layout: Layout,
    stage: int,
    load: Load,
    engine: EngineSettings,
    gpu: Hardware,
    graphs: Graphs,
) -> Time:
    """Return a member's time on one stage; all its ranks take the same time."""
    rows, share, tp = load.requests * load.new, shape.share(layout, stage), layout.tp
    attention = shape.stage_attention(layout, stage)
    kv, states = load.requests * engine.kv_itemsize, sum(shape.stage_states(layout, stage)) / tp
    time = (
        _layers(shape, share / tp, rows, gpu)
        # Keys and values are moved once: read during decoding, written for a prompt; states are
        # read and written. A query is multiplied with every key and value that it sees, in every
        # head.
        + _work(
            kv * sum(layer.kept(load.tokens) * layer.kv_numbers(tp) for layer in attention)
            + 2 * load.requests * states,
            4 * load.requests * sum(_products(layer, load) for layer in attention) / tp,
            gpu,
        )
    )
    if layout.is_last(stage):
        operations = 2 * load.requests * load.scored * shape.head.parameters
        time += _work(shape.head.bytes / tp, operations / tp, gpu)
    time += Time(communication=_messages(shape, layout, stage, load, engine, gpu.link))
    host = host_seconds(graphs, len(attention))
    return Time(host=host) if host > time.seconds else time


def _layers(shape: Shape, share: float, rows: int, gpu: Hardware) -> Time:
    """Return the time of the layers' products on a rank that has *share* of them.

    For a member that runs in one pass with another one, the time that it adds to the other's: the
    shared weights are read once.
    """
    read = share * (shape.layers.bytes + shape.touched_moe_bytes(rows))
    operations = 2 * rows * share * (shape.layers.parameters + shape.active_moe_parameters)
    if (other := shape.runs_with) is None:
        return _work(read, operations, gpu)
    read += share * (other.layers.bytes + other.touched_moe_bytes(2 * rows))
    operations += 4 * rows * share * (other.layers.parameters + other.active_moe_parameters)
    both, alone = _work(read, operations, gpu), _layers(other, share, rows, gpu)
    added = both.seconds - alone.seconds
    return Time(memory=added) if both.bound == "memory" else Time(compute=added)


def _products(layer: Attention, load: Load) -> int:
    return layer.heads * layer.head_size * layer.pairs(load.new, load.tokens)


def _work(bytes_moved: float, operations: float, gpu: Hardware) -> Time:
    seconds = gpu.roofline.seconds(bytes_moved, operations)
    if bytes_moved / gpu.roofline.bytes_per_second >= seconds:
        return Time(memory=seconds)
    return Time(compute=seconds)


def _messages(
    shape: Shape, layout: Layout, stage: int, load: Load, engine: EngineSettings, link: Link | None
) -> float:
    """Return the seconds in which ranks sum hidden states and send them to the next stage.

    Two all-reduces per layer (Shoeybi et al. 2019) and one for the embedding, as rings: each rank
    sends 2 (n-1)/n of the tensor. The fused logits are gathered once; this counts for the base.
    """
    if link is None:
        return 0.0
    seconds, tp = 0.0, layout.tp
    latency = 0.0 if shape.runs_with else link.latency  # its rows are sent with the other member's
    hidden = load.requests * load.new * shape.hidden_size * engine.itemsize
    if tp > 1:
        embeds = layout.is_last(stage) if shape.drafts else stage == 0
        sums = 2 * len(shape.stage_attention(layout, stage)) + embeds
        seconds += sums * (latency + 2 * (tp - 1) / tp * hidden / link.bytes_per_second)
        if layout.is_last(stage) and shape.role == "base":
            logits = load.requests * load.scored * shape.vocab_size * LOGIT_BYTES
            seconds += link.latency + (tp - 1) / tp * logits / link.bytes_per_second
    if not layout.is_last(stage) and not shape.drafts:  # hidden states and residuals
        seconds += latency + 2 * hidden / link.bytes_per_second
    return seconds
