"""The oracle for images: proxy tuning as a transformers loop in float32; shares no code with us."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import AutoProcessor

from support.reference import auto_class
from support.tiny_images import WORDS

_OF_TEXT = ("input_ids", "attention_mask", "mm_token_type_ids")
"""What a processor returns beside pixels and their sizes."""


@dataclass
class Seen:
    """Greedy continuation of a prompt with images.

    Attributes:
        prompt: its ids, with as many placeholders as the images have tokens.
        token_ids: `[tokens]`.
        margin: the smallest gap between first and second logit.
    """

    prompt: list[int]
    token_ids: list[int]
    margin: float


class ImageReference:
    """Three transformers models, each with its own tower if it has one, and the formula.

    A member without a tower reads the placeholders as ordinary ids.
    """

    def __init__(self, base: str, expert: str, antiexpert: str) -> None:
        self.processor = AutoProcessor.from_pretrained(base)
        self.models = [
            auto_class(path)
            .from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
            .eval()
            for path in (base, expert, antiexpert)
        ]

    def greedy(
        self,
        text: str,
        images: Sequence[Image.Image],
        max_tokens: int,
        weights: tuple[float, float, float] = (1.0, 1.0, -1.0),
    ) -> Seen:
        """Decode to ids of `WORDS`; *weights* of base, expert and antiexpert."""
        inputs = dict(self.processor(text=[text], images=[*images] or None, return_tensors="pt"))
        prompt = inputs["input_ids"][0].tolist()
        token_ids: list[int] = []
        margin = float("inf")
        for _ in range(max_tokens):
            logits = sum(
                weight * self.next_logits(model, inputs, token_ids)
                for weight, model in zip(weights, self.models, strict=True)
                if weight
            )
            (first, second), (best, _) = (found.tolist() for found in logits[WORDS].topk(2))
            margin = min(margin, first - second)
            token_ids.append(WORDS[best])
        return Seen(prompt, token_ids, margin)

    @torch.inference_mode()
    def next_logits(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], answer: Sequence[int]
    ) -> torch.Tensor:
        """Return `[vocab]` after the prompt and *answer*: all of it, without a cache."""
        more = torch.tensor([[*answer]], dtype=torch.long)
        ids = torch.cat([inputs["input_ids"], more], dim=1)
        if not hasattr(model.config, "vision_config"):
            return model(input_ids=ids, use_cache=False).logits[0, -1].double()
        seen = {key: value for key, value in inputs.items() if key not in _OF_TEXT}
        if "pixel_values" in seen:  # Llama 4's are prepared in bfloat16
            seen["pixel_values"] = seen["pixel_values"].float()
        if "mm_token_type_ids" in inputs:
            types = inputs["mm_token_type_ids"]
            seen["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(more)], dim=1)
        output = model(input_ids=ids, use_cache=False, **seen)
        return output.logits[0, -1].double()
