"""The blocks of a KV cache that also holds the states of recurrent layers.

All layers of such an engine, attention or not, have pages of one size: attention has as many tokens
in a block as its largest page needs to hold the largest state (`model/kernels.py`), and vLLM pads
smaller states. It puts layers that store the same into groups of one size, and each group takes
blocks for a request from one pool (`_get_kv_cache_groups_uniform_page_size`).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

from vllm_proxy.members.attention import Attention
from vllm_proxy.preflight.plan.cost import EngineSettings
from vllm_proxy.preflight.plan.layout import Layout
from vllm_proxy.preflight.plan.shape import Shape


@dataclass(frozen=True, slots=True)
class StateBlocks:
    """The blocks that members share on a GPU.

    Attributes:
        tokens: of one block, in the layers with the largest keys and values; 0 without attention.
        page: bytes of one layer in a block.
        layers: of a group; a block has a page for each.
        attention: groups of layers with attention, by what they store and the tokens of a block.
        states: groups of recurrent layers.
    """

    tokens: int
    page: float
    layers: int
    attention: Mapping[tuple[Attention, int], int]
    states: int

    @property
    def bytes(self) -> float:
        """Memory of a block."""
        return self.page * self.layers

    def of_request(self, tokens: int, states: int) -> int:
        """Return the blocks of a request of *tokens* that has *states* in each recurrent layer."""
        keys = sum(
            groups * ceil(layer.kept(tokens) / of_block)
            for (layer, of_block), groups in self.attention.items()
        )
        return keys + self.states * states


def state_blocks(
    shapes: Sequence[Shape], layout: Layout, stage: int, engine: EngineSettings
) -> StateBlocks | None:
    """Return the blocks on each GPU of a stage; None if no layer there is recurrent."""
    states = Counter(
        size / layout.tp for shape in shapes for size in shape.stage_states(layout, stage) if size
    )
    if not states:
        return None
    attention = Counter(
        replace(layer, heads=0)  # queries are not stored
        for shape in shapes
        for layer in shape.stage_attention(layout, stage)
        if layer.kv_heads
    )
    sizes = {layer: engine.kv_itemsize * layer.kv_numbers(layout.tp) for layer in attention}
    most, largest = max(sizes.values(), default=0), max(states)
    tokens = engine.block * max(1, ceil(largest / (engine.block * most))) if most else 0
    page = max(tokens * most, largest)
    counts = [*attention.values(), *states.values()]
    layers = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    return StateBlocks(
        tokens,
        page,
        layers,
        {
            (layer, _tokens(tokens, sizes[layer], page)): ceil(count / layers)
            for layer, count in attention.items()
        },
        sum(ceil(count / layers) for count in states.values()),
    )


def _tokens(tokens: int, size: int, page: float) -> int:
    """Return the tokens in a block of layers that keep *size* bytes of each.

    If smaller pages fit exactly, vLLM gives these layers larger blocks, else it pads their pages.
    """
    own = tokens * size
    return tokens * int(page // own) if page % own == 0 else tokens
