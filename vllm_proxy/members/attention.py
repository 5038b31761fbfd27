"""The attention of a member's layers, and how much of the KV cache it takes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_proxy.members.recurrent import layers_without_attention
from vllm_proxy.members.vllm_configs import layer_windows

if TYPE_CHECKING:
    from vllm.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Attention:
    """The attention of one layer.

    Attributes:
        heads: number of query heads.
        kv_heads: number of key and value heads.
        head_size: numbers per head; if latent, numbers in total.
        window: most tokens that a query sees; None for all.
        latent: whether keys and values are one vector per token (DeepSeek's MLA), on every rank.
    """

    heads: int
    kv_heads: int
    head_size: int
    window: int | None = None
    latent: bool = False

    def kv_numbers(self, ranks: int) -> int:
        """Return how many numbers per token each tensor-parallel rank keeps.

        If there are fewer heads than *ranks*, heads are copied so that each rank has one.
        """
        if self.latent:
            return self.head_size
        return 2 * max(1, self.kv_heads // ranks) * self.head_size

    def kept(self, tokens: int) -> int:
        """Return for how many of a sequence's tokens keys and values are needed."""
        return tokens if self.window is None else min(tokens, self.window)

    def pairs(self, new: int, tokens: int) -> int:
        """Return how many keys the last *new* queries of a sequence of *tokens* see in total."""
        return self._pairs(tokens) - self._pairs(tokens - new)

    def _pairs(self, tokens: int) -> int:
        few = self.kept(tokens)  # queries that see all previous tokens; the others see a window
        return few * (few + 1) // 2 + (tokens - few) * few


NO_ATTENTION = Attention(heads=0, kv_heads=0, head_size=0)
"""Of a layer without any."""


def attention_layers(config: "ModelConfig") -> tuple[Attention, ...]:
    """Return the attention of each of a member's layers."""
    arch, windows = config.model_arch_config, layer_windows(config)
    without = layers_without_attention(config)
    return tuple(
        NO_ATTENTION
        if i in without
        else Attention(
            heads=arch[i].total_num_attention_heads,
            kv_heads=arch[i].total_num_kv_heads,
            head_size=arch[i].head_size,
            window=windows[i],
            latent=config.use_mla,
        )
        for i in range(config.get_total_num_hidden_layers())
    )
