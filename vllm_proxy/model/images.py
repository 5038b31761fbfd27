"""`Sight`: the towers of members that see images, and their embeddings side by side.

vLLM's model runner keeps one row of embeddings per token. Here it has a part for each member that
sees: its embedding of the token or of the image, and after it, where the member has them, the rows
that its first layers add (DeepStack; zeros for text). So images take vLLM's own way: its encoder
cache, its chunks of a prompt and its buffers, which are as wide as all parts.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from vllm.sequence import IntermediateTensors

from vllm_proxy.config.roles import Role


class Sight(nn.Module):
    """The towers, by role, in the order of the members' columns.

    Symbols: N is the number of tokens; H_m a member's hidden size, L_m its number of layers that
    add rows of an image; W is the sum of H_m * (1 + L_m).

    Args:
        towers: vLLM's whole models without their text models.
        sizes: H_m and L_m by role.
        max_tokens: of a batch.
        dtype: of embeddings.

    Attributes:
        places: `[max_tokens]`: plain positions, written before a step, for members that do not see.
    """

    def __init__(
        self,
        towers: Mapping[Role, nn.Module],
        sizes: Mapping[Role, tuple[int, int]],
        max_tokens: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.towers = nn.ModuleDict(towers)
        self.sizes = dict(sizes)
        self.widths = [hidden * (1 + levels) for hidden, levels in sizes.values()]
        # One after the other, members read their inputs from here: in one piece each, and from
        # the same addresses in every step, as CUDA graphs need them.
        self.inputs = torch.zeros(max_tokens * max(self.widths), dtype=dtype)
        self.places = torch.zeros(max_tokens, dtype=torch.int64)

    def embed_images(self, **kwargs: object) -> list[torch.Tensor]:
        """Run each tower on the same pixels; returns `[tokens, W]` for each image."""
        seen = [tower.embed_multimodal(**kwargs) for tower in self.towers.values()]
        return [torch.cat(parts, dim=-1) for parts in zip(*seen, strict=True)]

    def embed(
        self,
        texts: Mapping[Role, torch.Tensor],
        images: Sequence[torch.Tensor] | None,
        is_image: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the members' embeddings side by side, `[N, W]`.

        Args:
            texts: each member's embeddings of the ids, `[N, H_m]`.
            images: `[tokens, W]` each: rows of what `embed_images` returned, for this step.
            is_image: `[N]`, bool: where these rows belong, in this order.
        """
        wide = torch.cat(
            [
                nn.functional.pad(texts[role], (0, hidden * levels))
                for role, (hidden, levels) in self.sizes.items()
            ],
            dim=-1,
        )
        if images:
            assert is_image is not None  # vLLM passes it with images
            wide[is_image] = torch.cat(list(images)).to(wide.dtype)
        return wide

    def part(
        self, role: Role, embeddings: torch.Tensor
    ) -> tuple[torch.Tensor, IntermediateTensors | None]:
        """Return one member's part of `[N, W]` embeddings.

        Valid until another member's is taken.

        Returns:
            `[N, H_m]`, and by layer what it adds, `[N, H_m]` each; None if no layer does.
        """
        hidden, levels = self.sizes[role]
        mine = embeddings.split(self.widths, dim=-1)[list(self.sizes).index(role)]
        rows = len(embeddings)
        held = self.inputs[: self.inputs.numel() // hidden * hidden].view(-1, hidden)
        most = len(self.places)
        pieces = [held[i * most : i * most + rows] for i in range(1 + levels)]
        for piece, columns in zip(pieces, mine.split(hidden, dim=-1), strict=True):
            piece.copy_(columns)
        if not levels:
            return pieces[0], None
        added = {f"deepstack_input_embeds_{i}": piece for i, piece in enumerate(pieces[1:])}
        return pieces[0], IntermediateTensors(added)

    def positions(self, role: Role, positions: torch.Tensor) -> torch.Tensor:
        """Return a member's positions, of those that vLLM passes: `[N]`, or `[3, N]` (M-RoPE)."""
        if role in self.sizes or positions.ndim == 1:
            return positions
        return self.places[: positions.shape[-1]]
