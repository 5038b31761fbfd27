"""What a member is made of, as far as memory and time go: pure numbers, nothing of vLLM's."""

from dataclasses import dataclass
from typing import NamedTuple

from vllm_proxy.config.roles import Role
from vllm_proxy.preflight.plan.layout import Layout


class Weights(NamedTuple):
    """Some of a member's weights: how many, and the bytes that they take in an engine."""

    parameters: int
    bytes: int


NONE = Weights(0, 0)


@dataclass(frozen=True, slots=True)
class Attention:
    """The attention of one layer.

    Attributes:
        heads: of queries.
        kv_heads: of keys and values.
        head_size: numbers a head; of a latent one, numbers in all.
        window: tokens that a query sees at most; None for all.
        latent: whether keys and values are one vector a token (DeepSeek's MLA), on every rank.
    """

    heads: int
    kv_heads: int
    head_size: int
    window: int | None = None
    latent: bool = False

    def kv_numbers(self, ranks: int) -> int:
        """Return what one of so many tensor-parallel ranks keeps for a token.

        Heads that are fewer than ranks are copied, so that each has one.
        """
        if self.latent:
            return self.head_size
        return 2 * max(1, self.kv_heads // ranks) * self.head_size

    def kept(self, tokens: int) -> int:
        """Return of how many of a sequence's tokens keys and values are needed."""
        return tokens if self.window is None else min(tokens, self.window)

    def pairs(self, new: int, tokens: int) -> int:
        """Return how many keys the last *new* queries of a sequence of *tokens* see, in all."""
        return self._pairs(tokens) - self._pairs(tokens - new)

    def _pairs(self, tokens: int) -> int:
        few = self.kept(tokens)  # queries that see all before them; others see a window
        return few * (few + 1) // 2 + (tokens - few) * few


@dataclass(frozen=True, slots=True)
class Shape:
    """A member.

    Attributes:
        role: base, expert or antiexpert.
        model: path or hub id.
        hidden_size: width between layers.
        vocab_size: ids that it has logits for.
        context: the longest sequence.
        attention: of every layer.
        layers: weights of all layers but routed experts, and whatever else every token meets.
        experts: weights of all layers' routed experts.
        num_experts: of a layer; 0 if there are none.
        experts_per_token: of these.
        embedding: weights that are looked up, not read.
        head: weights that make logits; a tied one is the embedding.
        tied: whether it is.
        quantization: vLLM's name of the method, or None.
        width: numbers that its widest layer holds of a token at once, beside hidden states.
        beside: the member through whose layers its rows run as well (one pass); its own weights are
            then an adapter's alone.
    """

    role: Role
    model: str
    hidden_size: int
    vocab_size: int
    context: int
    attention: tuple[Attention, ...]
    layers: Weights
    embedding: Weights
    head: Weights
    tied: bool = False
    experts: Weights = NONE
    num_experts: int = 0
    experts_per_token: int = 0
    quantization: str | None = None
    width: int = 0
    beside: "Shape | None" = None

    @property
    def parameters(self) -> int:
        """Number of weights, tied ones once."""
        head = 0 if self.tied else self.head.parameters
        return self.layers.parameters + self.experts.parameters + self.embedding.parameters + head

    @property
    def weight_bytes(self) -> int:
        """Memory of them all, tied ones once."""
        head = 0 if self.tied else self.head.bytes
        return self.layers.bytes + self.experts.bytes + self.embedding.bytes + head

    def share(self, layout: Layout, stage: int) -> float:
        """Return the part of the layers that a stage has."""
        return len(layout.layers(len(self.attention), stage)) / len(self.attention)

    def stage_attention(self, layout: Layout, stage: int) -> tuple[Attention, ...]:
        """Return the attention of the layers that a stage has."""
        own = layout.layers(len(self.attention), stage)
        return self.attention[own.start : own.stop]

    def gpu_weight_bytes(self, layout: Layout, stage: int) -> float:
        """Return the memory that the member's weights take on a GPU of this stage.

        The first stage has the embedding, the last the head: a tied one on both, if they are two.
        """
        total = self.share(layout, stage) * (self.layers.bytes + self.experts.bytes)
        if stage == 0:
            total += self.embedding.bytes
        if layout.is_last(stage) and not (self.tied and stage == 0):
            total += self.head.bytes
        return total / layout.tp

    def gpu_kv_numbers(self, layout: Layout, stage: int, tokens: int, *, windows: bool) -> int:
        """Return how many numbers a GPU of this stage keeps for a sequence of *tokens*.

        *windows*: whether what is behind a sliding window is let go.
        """
        return sum(
            layer.kv_numbers(layout.tp) * (layer.kept(tokens) if windows else tokens)
            for layer in self.stage_attention(layout, stage)
        )

    def kv_numbers(self) -> int:
        """Return how many numbers one token takes, in all layers, kept once."""
        return sum(layer.kv_numbers(1) for layer in self.attention)

    @property
    def active_parameters(self) -> float:
        """Weights of layers and head that one token is multiplied with."""
        shared = self.beside.active_parameters if self.beside else 0.0
        return self.layers.parameters + self.active_experts + self.head.parameters + shared

    @property
    def active_experts(self) -> float:
        """Weights of routed experts that one token is multiplied with."""
        if not self.num_experts:
            return 0.0
        return self.experts.parameters * self.experts_per_token / self.num_experts

    def touched_expert_bytes(self, tokens: int) -> float:
        """Return what *tokens* read of routed experts, if each picks its own evenly at random.

        An expert is left out by one token with the probability 1 - k/E, by n with its nth power.
        """
        if not self.num_experts:
            return 0.0
        left_out = (1 - self.experts_per_token / self.num_experts) ** tokens
        return self.experts.bytes * (1 - left_out)
