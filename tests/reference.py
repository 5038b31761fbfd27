"""The oracle: proxy tuning as a plain transformers loop in float32, sharing no code with us."""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM


@dataclass
class Decoded:
    """Greedy continuation of one prompt.

    Attributes:
        token_ids: `[tokens]`.
        logprobs: `[tokens, vocab]`, of the distribution each token was taken from.
        prompt_logprobs: `[prompt, vocab]`, of the token after each prompt position.
        margin: smallest gap between first and second logit met on the way. Far above float32
            rounding, or the test that compares tokens would prove nothing.
    """

    token_ids: list[int]
    logprobs: torch.Tensor
    prompt_logprobs: torch.Tensor
    margin: float


class Reference:
    """Three transformers models and the formula."""

    def __init__(self, base: str, expert: str, antiexpert: str, alpha: float = 1.0) -> None:
        self.alpha = alpha
        self.models = [
            # The other attention implementations leave Gemma 2's soft caps out without a word.
            AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, attn_implementation="eager"
            ).eval()
            for path in (base, expert, antiexpert)
        ]

    @torch.inference_mode()
    def logits(self, ids: list[int], caches: list) -> torch.Tensor:
        """Feed *ids* after what *caches* hold; `[len(ids), vocab]` fused logits.

        Ids that a member lacks: as prompt it reads its last one, and they are never generated.
        """
        outputs = [
            model(
                torch.tensor([ids]).clamp(max=model.config.vocab_size - 1),
                past_key_values=cache,
                use_cache=True,
            )
            for model, cache in zip(self.models, caches, strict=True)
        ]
        caches[:] = [output.past_key_values for output in outputs]
        base, expert, antiexpert = (output.logits[0] for output in outputs)
        shared = min(logits.shape[-1] for logits in (base, expert, antiexpert))
        fused = base[:, :shared] + self.alpha * (expert[:, :shared] - antiexpert[:, :shared])
        lacked = torch.full((len(ids), base.shape[-1] - shared), float("-inf"))
        return torch.cat([fused, lacked], dim=-1)

    def greedy(self, prompt: list[int], max_tokens: int) -> Decoded:
        caches: list = [None, None, None]
        logits = self.logits(prompt, caches)
        prompt_logprobs = logits.log_softmax(-1)
        tokens, logprobs, margin = [], [], float("inf")
        for _ in range(max_tokens):
            last = logits[-1]
            first, second = last.topk(2).values.tolist()
            margin = min(margin, first - second)
            tokens.append(int(last.argmax()))
            logprobs.append(last.log_softmax(-1))
            logits = self.logits(tokens[-1:], caches)
        return Decoded(tokens, torch.stack(logprobs), prompt_logprobs, margin)
