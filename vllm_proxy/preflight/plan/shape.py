"""The sizes of a member that determine its memory and time. Plain numbers, without vLLM."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from vllm_proxy.config.roles import Role
from vllm_proxy.members.attention import Attention
from vllm_proxy.preflight.plan.layout import Layout


class WeightSize(NamedTuple):
    """The size of some weights: their number, and their bytes in an engine."""

    parameters: int
    bytes: int


NO_WEIGHTS = WeightSize(0, 0)


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a member.

    Attributes:
        role: base, expert or antiexpert.
        model: path or hub id.
        hidden_size: width of hidden states.
        vocab_size: number of logits.
        context: length of the longest sequence.
        attention: the attention of each layer.
        layers: weights that every token is multiplied with, except the head.
        moe_weights: weights of all layers' routed experts (mixture of experts).
        moe_experts: number of routed experts per layer; 0 if there are none.
        moe_experts_per_token: number of routed experts that a token uses in each layer.
        embedding: weights that are looked up, not read as a whole.
        head: weights of the LM head; if tied, they are the embedding.
        tower: weights of the tower for images; none without images.
        tied: whether the head is tied to the embedding.
        quantization: vLLM's name of the method, or None.
        width: numbers per token that its widest layer holds, in addition to hidden states.
        states: bytes of the state that each layer keeps for a request, over all ranks; empty if
            none is recurrent.
        runs_with: the member whose layers its rows also run through (one pass), so that its
            weights are those of an adapter only; None otherwise.
        drafts: whether drafts run through its layers, so that the last stage has all of them.
    """

    role: Role
    model: str
    hidden_size: int
    vocab_size: int
    context: int
    attention: tuple[Attention, ...]
    layers: WeightSize
    embedding: WeightSize
    head: WeightSize
    tower: WeightSize = NO_WEIGHTS
    tied: bool = False
    moe_weights: WeightSize = NO_WEIGHTS
    moe_experts: int = 0
    moe_experts_per_token: int = 0
    quantization: str | None = None
    width: int = 0
    states: tuple[int, ...] = ()
    runs_with: "Shape | None" = None
    drafts: bool = False

    @property
    def parameters(self) -> int:
        """Number of weights, tied ones once."""
        head = 0 if self.tied else self.head.parameters
        layers = self.layers.parameters + self.moe_weights.parameters
        return layers + self.embedding.parameters + head + self.tower.parameters

    @property
    def weight_bytes(self) -> int:
        """Memory of all weights, tied ones once."""
        head = 0 if self.tied else self.head.bytes
        layers = self.layers.bytes + self.moe_weights.bytes
        return layers + self.embedding.bytes + head + self.tower.bytes

    def is_on(self, layout: Layout, stage: int) -> bool:
        """Whether a stage has some of the layers."""
        return not self.drafts or layout.is_last(stage)

    def share(self, layout: Layout, stage: int) -> float:
        """Return the fraction of the layers that a stage has."""
        return len(self.stage_attention(layout, stage)) / len(self.attention)

    def stage_attention(self, layout: Layout, stage: int) -> tuple[Attention, ...]:
        """Return the attention of the layers that a stage has."""
        if self.drafts:
            return self.attention if layout.is_last(stage) else ()
        layers = layout.layers(len(self.attention), stage)
        return self.attention[layers.start : layers.stop]

    def stage_states(self, layout: Layout, stage: int) -> tuple[int, ...]:
        """Return the bytes of the states that a stage's layers keep for a request."""
        layers = layout.layers(len(self.attention), stage)
        return self.states[layers.start : layers.stop]

    def gpu_weight_bytes(self, layout: Layout, stage: int) -> float:
        """Return the memory that the member's weights take on a GPU of this stage.

        The first stage has the embedding and the tower, the last one the head. If embedding and
        head are tied, each of two different stages has a copy. If drafts run through the member,
        the last stage has it all.
        """
        if not self.is_on(layout, stage):
            return 0.0
        total = self.share(layout, stage) * (self.layers.bytes + self.moe_weights.bytes)
        is_first = self.drafts or stage == 0
        if is_first:
            total += self.embedding.bytes + self.tower.bytes
        if layout.is_last(stage) and not (self.tied and is_first):
            total += self.head.bytes
        return total / layout.tp

    def gpu_kv_numbers(
        self, layout: Layout, stage: int, tokens: int, *, windows: bool, window: int | None = None
    ) -> int:
        """Return how many numbers a GPU of this stage keeps for a sequence of *tokens*.

        *windows*: whether keys and values behind a sliding window are freed; *window*: the one
        behind which they are in all layers, if they share one.
        """
        layers = self.stage_attention(layout, stage)
        if window is not None:
            layers = tuple(replace(layer, window=window) for layer in layers)
        return sum(
            layer.kv_numbers(layout.tp) * (layer.kept(tokens) if windows else tokens)
            for layer in layers
        )

    def kv_numbers(self) -> int:
        """Return how many numbers per token all layers keep, without copies on other ranks."""
        return sum(layer.kv_numbers(1) for layer in self.attention)

    @property
    def active_parameters(self) -> float:
        """Number of weights of layers and head that one token is multiplied with."""
        shared = self.runs_with.active_parameters if self.runs_with else 0.0
        return self.layers.parameters + self.active_moe_parameters + self.head.parameters + shared

    @property
    def active_moe_parameters(self) -> float:
        """Number of weights of routed experts that one token is multiplied with."""
        if not self.moe_experts:
            return 0.0
        return self.moe_weights.parameters * self.moe_experts_per_token / self.moe_experts

    def touched_moe_bytes(self, tokens: int) -> float:
        """Return the bytes of routed experts that *tokens* use, if each picks uniformly at random.

        One token does not use a given expert with the probability 1 - k/E, n tokens with its n-th
        power.
        """
        if not self.moe_experts:
            return 0.0
        left_out = (1 - self.moe_experts_per_token / self.moe_experts) ** tokens
        return self.moe_weights.bytes * (1 - left_out)
