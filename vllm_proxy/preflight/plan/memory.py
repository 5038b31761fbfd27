"""How many requests fit beside the weights and the tensors of a step."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_proxy.preflight.plan.cost import LOGIT_BYTES, Engine
from vllm_proxy.preflight.plan.hardware import Hardware
from vllm_proxy.preflight.plan.layout import Layout
from vllm_proxy.preflight.plan.shape import Shape

BLOCK = 16
"""Tokens of a KV cache block, vLLM's default: a request has whole ones."""


@dataclass(frozen=True, slots=True)
class Room:
    """What one replica's memory holds.

    Attributes:
        requests: that fit in its KV cache.
        needed: bytes that weights, activations, workspace and one request take on the fullest GPU.
        lacking: bytes of these that it does not have; 0 if they fit.
        activations: bytes of a step on the GPU with most of them.
    """

    requests: int
    needed: float
    lacking: float
    activations: float


def room(
    shapes: Sequence[Shape], layout: Layout, tokens: int, engine: Engine, gpu: Hardware
) -> Room:
    """Return how many requests of *tokens* fit; the stage with the least room decides."""
    blocks = -(-tokens // BLOCK) * BLOCK
    requests, needed, lacking, activations = [], [], [], []
    for stage in range(layout.pp):
        weights = sum(shape.gpu_weight_bytes(layout, stage) for shape in shapes)
        activations.append(activation_bytes(shapes, layout, stage, engine))
        beside = gpu.workspace + activations[-1]
        one = engine.kv_itemsize * sum(
            shape.gpu_kv_numbers(layout, stage, blocks, windows=engine.windows) for shape in shapes
        )
        if engine.kv_cache_bytes is None:
            usable = gpu.memory * engine.utilization
            cache = usable - weights - beside
        else:  # vLLM then takes so much, whatever else it may use
            usable = gpu.memory
            cache = engine.kv_cache_bytes
        taken = max(one, engine.kv_cache_bytes or 0)
        fits = weights + beside + taken <= usable
        requests.append(max(0, int(cache // one)) if fits else 0)
        needed.append(weights + beside + taken)
        lacking.append(max(0.0, weights + beside + taken - usable))
    return Room(min(requests), max(needed), max(lacking), max(activations))


def activation_bytes(shapes: Sequence[Shape], layout: Layout, stage: int, engine: Engine) -> float:
    """Return what a step of the largest batch holds at most, beside weights and KV cache.

    First the layers: all members' hidden states, which wait for the head, and of one member at a
    time its own, the residuals and what its widest layer holds; in one pass, of both members' rows,
    and the adapter's part of gate and up. Then the logits: float32, and once more as probabilities;
    with drafts, a row for each of them, and their own probabilities.
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
    """Return how many numbers a member's layers hold of a token at once, on one of the ranks."""
    width = shape.width / ranks
    if shape.beside is None:
        return 2 * shape.hidden_size + width
    return 2 * (2 * shape.hidden_size + width) + 2 / 3 * width
