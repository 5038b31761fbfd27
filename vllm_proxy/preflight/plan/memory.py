"""How many requests fit in addition to the weights and the tensors of a step."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_proxy.preflight.plan.cost import LOGIT_BYTES, EngineSettings
from vllm_proxy.preflight.plan.hardware import Hardware
from vllm_proxy.preflight.plan.layout import Layout
from vllm_proxy.preflight.plan.pages import state_blocks
from vllm_proxy.preflight.plan.shape import Shape


@dataclass(frozen=True, slots=True)
class Room:
    """What fits in one replica's memory.

    Attributes:
        requests: number of requests that fit in its KV cache.
        needed: bytes that weights, activations, workspace and one request take on the fullest GPU.
        lacking: how many of these bytes do not fit on it; 0 if all fit.
        activations: bytes of a step on the GPU with most of them.
    """

    requests: int
    needed: float
    lacking: float
    activations: float


def room(
    shapes: Sequence[Shape], layout: Layout, tokens: int, engine: EngineSettings, gpu: Hardware
) -> Room:
    """Return how many requests of *tokens* fit; the stage with the least room decides."""
    requests, needed, lacking, activations = [], [], [], []
    for stage in range(layout.pp):
        weights = sum(shape.gpu_weight_bytes(layout, stage) for shape in shapes)
        activations.append(activation_bytes(shapes, layout, stage, engine))
        other = gpu.workspace + activations[-1]
        one = request_bytes(shapes, layout, stage, tokens, engine)
        if engine.kv_cache_bytes is None:
            usable = gpu.memory * engine.utilization
            cache = usable - weights - other
        else:  # vLLM then allocates this much, and ignores the utilization
            usable = gpu.memory
            cache = engine.kv_cache_bytes
        taken = max(one, engine.kv_cache_bytes or 0)
        needed.append(weights + other + taken)
        fits = needed[-1] <= usable
        requests.append(max(0, int(cache // one)) if fits else 0)
        lacking.append(max(0.0, needed[-1] - usable))
    return Room(min(requests), max(needed), max(lacking), max(activations))


def request_bytes(
    shapes: Sequence[Shape], layout: Layout, stage: int, tokens: int, engine: EngineSettings
) -> float:
    """Return the KV cache that a request of *tokens* takes on a GPU of a stage: whole blocks."""
    if (blocks := state_blocks(shapes, layout, stage, engine)) is not None:
        return blocks.bytes * blocks.of_request(tokens, engine.states)
    tokens = -(-tokens // engine.block) * engine.block
    return engine.kv_itemsize * sum(
        shape.gpu_kv_numbers(layout, stage, tokens, windows=engine.windows, window=engine.window)
        for shape in shapes
    )


def activation_bytes(
    shapes: Sequence[Shape], layout: Layout, stage: int, engine: EngineSettings
) -> float:
    """Return the most bytes that a step of the largest batch takes besides weights and KV cache.

    First the layers: all members' hidden states, which are kept for the head, and for one member at
    a time its hidden states, its residuals and its widest layer. In one pass, this is for both
    members' rows, plus the adapter's part of gate and up. Then the logits in float32, and again as
    probabilities; with drafts, one row for each draft, and the probabilities of the drafts.
    """
    rows = engine.batch.tokens
    waiting = rows * engine.itemsize * sum(shape.hidden_size for shape in shapes)
    layers = rows * engine.itemsize * max(_numbers(shape, layout.tp) for shape in shapes)
    if not layout.is_last(stage):
        return waiting + layers
    vocabulary = next(shape.vocab_size for shape in shapes if shape.role == "base")
    scored = min(engine.batch.requests, engine.drafting or engine.batch.requests)
    logits = max(engine.batch.requests, scored * (1 + engine.drafts))
    row = vocabulary * LOGIT_BYTES
    return waiting + max(layers, row * (2 * logits + scored * engine.drafts))


def _numbers(shape: Shape, ranks: int) -> float:
    """Return how many numbers per token a member's layers hold at once, on one rank."""
    width = shape.width / ranks
    if shape.runs_with is None:
        return 2 * shape.hidden_size + width
    return 2 * (2 * shape.hidden_size + width) + 2 / 3 * width
