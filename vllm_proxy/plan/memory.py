"""How many requests fit beside the weights."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_proxy.plan.cost import Engine
from vllm_proxy.plan.hardware import Hardware
from vllm_proxy.plan.layout import Layout
from vllm_proxy.plan.shape import Shape

BLOCK = 16
"""Tokens of a KV cache block, vLLM's default: a request has whole ones."""


@dataclass(frozen=True, slots=True)
class Room:
    """What one replica's memory holds.

    Attributes:
        requests: that fit in its KV cache.
        needed: bytes that weights, workspace and one request take on the fullest GPU.
        lacking: bytes of these that it does not have; 0 if they fit.
    """

    requests: int
    needed: float
    lacking: float


def room(
    shapes: Sequence[Shape], layout: Layout, tokens: int, engine: Engine, gpu: Hardware
) -> Room:
    """Return how many requests of *tokens* fit; the stage with the least room decides."""
    blocks = -(-tokens // BLOCK) * BLOCK
    requests, needed, lacking = [], [], []
    for stage in range(layout.pp):
        weights = sum(shape.gpu_weight_bytes(layout, stage) for shape in shapes)
        one = engine.kv_itemsize * sum(
            shape.gpu_kv_numbers(layout, stage, blocks, windows=engine.windows) for shape in shapes
        )
        if engine.kv_cache_bytes is None:
            usable = gpu.memory * engine.utilization
            cache = usable - weights - gpu.workspace
        else:  # vLLM then takes so much, whatever else it may use
            usable = gpu.memory
            cache = engine.kv_cache_bytes
        taken = max(one, engine.kv_cache_bytes or 0)
        fits = weights + gpu.workspace + taken <= usable
        requests.append(max(0, int(cache // one)) if fits else 0)
        needed.append(weights + gpu.workspace + taken)
        lacking.append(max(0.0, weights + gpu.workspace + taken - usable))
    return Room(min(requests), max(needed), max(lacking))
