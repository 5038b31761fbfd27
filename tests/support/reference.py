"""The oracle: proxy tuning as a plain transformers loop in float32, sharing no code with us."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import log_softmax, rel_entr, softmax
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

KL_ERROR = 1e-4
"""Part of 1 + KL by which engines may be wrong about a KL: logits of 10 are, by 1e-5 each."""


@dataclass
class Decoded:
    """Greedy continuation of one prompt.

    Attributes:
        token_ids: `[tokens]`.
        logprobs: `[tokens, vocab]`, of the distribution each token was taken from.
        prompt_logprobs: `[prompt, vocab]`, of the token after each position of the base's prompt.
            Prompts of members are aligned at the right; before one of the small members begins,
            the base is alone.
        margin: how much logits must at least move before another token is taken somewhere: without
            filters the smallest gap between first and second logit met on the way. Far above
            float32 rounding, or the test that compares tokens would prove nothing. Says nothing of
            logprobs: a filter's bound may lie next to a token that would not be taken anyway.
    """

    token_ids: list[int]
    logprobs: torch.Tensor
    prompt_logprobs: torch.Tensor
    margin: float


class Reference:
    """Three transformers models and the formula; the base plays the part of a missing one."""

    def __init__(
        self,
        base: str,
        expert: str | None = None,
        antiexpert: str | None = None,
        alpha: float | str = 1.0,
    ) -> None:
        self.alpha = alpha
        self.models = [
            # The other attention implementations leave Gemma 2's soft caps out without a word.
            auto_class(path or base)
            .from_pretrained(path or base, dtype=torch.float32, attn_implementation="eager")
            .eval()
            for path in (base, expert, antiexpert)
        ]

    @torch.inference_mode()
    def feed(self, prompts: list[list[int]], caches: list) -> list[np.ndarray]:
        """Feed each member its ids after what *caches* hold; `[len(ids), member's vocab]` each."""
        logits = []
        for i, (model, ids) in enumerate(zip(self.models, prompts, strict=True)):
            # Mamba 2 has nothing but states.
            cache = "cache_params" if model.config.model_type == "mamba2" else "past_key_values"
            output = model(torch.tensor([ids]), use_cache=True, **{cache: caches[i]})
            caches[i] = output[cache]
            logits.append(output.logits[0].double().numpy())
        return logits

    def logits(self, ids: list[int], caches: list) -> torch.Tensor:
        """Feed *ids* to all members after what *caches* hold; `[len(ids), vocab]` fused logits."""
        rows = zip(*self.feed([ids] * 3, caches), strict=True)
        return torch.from_numpy(np.stack([self.fuse(*row, {}, 0)[0] for row in rows])).float()

    def greedy(self, prompt: list[int], max_tokens: int, control: dict | None = None) -> Decoded:
        """Decode.

        Args:
            prompt: the base's, and that of members without one of their own.
            max_tokens: number of tokens; there is no other end.
            control: a request's `extra_args`: what it asks for under names with `proxy_`.
        """
        control = control or {}
        own_prompts = [
            prompt,
            control.get("proxy_expert_prompt", prompt),
            control.get("proxy_antiexpert_prompt", prompt),
        ]
        caches: list = [None, None, None]
        members = self.feed(own_prompts, caches)
        length = min(map(len, own_prompts))
        rows = zip(*(logits[-length:] for logits in members), strict=True)
        alone = [torch.from_numpy(row).float() for row in members[0][:-length]]
        fused = [self.fuse(*row, control, 0)[0] for row in rows]
        prompt_logprobs = [logprobs_of(row) for row in (*alone, *fused)]
        tokens, logprobs, margin = [], [], float("inf")
        for t in range(max_tokens):
            fused, own_margin = self.fuse(*(logits[-1] for logits in members), control, t)
            margin = min(margin, own_margin)
            tokens.append(int(fused.argmax()))
            logprobs.append(logprobs_of(fused))
            members = self.feed([tokens[-1:]] * 3, caches)
        return Decoded(tokens, torch.stack(logprobs), torch.stack(prompt_logprobs), margin)

    def fuse(
        self,
        base: np.ndarray,
        expert: np.ndarray,
        antiexpert: np.ndarray,
        control: dict,
        t: int,
    ) -> tuple[np.ndarray, float]:
        """Return logits `[base's vocab]` of one row at step *t*, and their margin.

        Ids that a member lacks are never generated.
        """
        shared = min(map(len, (base, expert, antiexpert)))
        lacked = np.full(len(base) - shared, -np.inf)
        base, expert, antiexpert = base[:shared], expert[:shared], antiexpert[:shared]
        all_weights = self.weights(base, expert, antiexpert, control, t)
        fused, *others = (
            w_b * base + w_e * expert + w_a * antiexpert for w_b, w_e, w_a in all_weights
        )
        kept, distance = filtered(base, control)
        logits = np.where(kept, fused, -np.inf)
        first = logits.argmax()
        # Another token is taken if the first is filtered out, or if one that is kept, or comes in,
        # surpasses it.
        margin = distance[first]
        for candidate in (fused, *others):
            needed = np.maximum(candidate[first] - candidate, np.where(kept, -np.inf, distance))
            margin = min(margin, np.delete(needed, first).min())
        return np.concatenate([logits, lacked]), float(margin)

    def weights(
        self,
        base: np.ndarray,
        expert: np.ndarray,
        antiexpert: np.ndarray,
        control: dict,
        t: int,
    ) -> list[tuple[float, float, float]]:
        """Return the members' weights, and others that are as good where rounding decides."""
        if "proxy_weights" in control:
            return [tuple(control["proxy_weights"])]
        schedule = control.get("proxy_alpha_schedule", "constant")
        alpha = control.get("proxy_alpha", self.alpha if schedule == "constant" else 1.0)
        alphas = [alpha]
        if schedule == "first":
            alphas = [alpha if t < control["proxy_alpha_steps"] else 0.0]
        elif schedule == "linear":
            alphas = [alpha * max(0.0, 1 - t / control["proxy_alpha_steps"])]
        elif alpha == "adaptive":
            target = kl(expert, antiexpert)
            error = KL_ERROR * (1 + target)
            alphas = [
                alpha_that_moves(base, expert - antiexpert, near)
                for near in (target, target - error, target + error)
            ]
        return [(1.0, alpha, -alpha) for alpha in alphas]


def auto_class(path: str) -> type:
    """Return the class of transformers that reads this checkpoint: a multimodal one as a whole."""
    is_multimodal = hasattr(AutoConfig.from_pretrained(path), "vision_config")
    return AutoModelForImageTextToText if is_multimodal else AutoModelForCausalLM


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """Return KL(softmax(p) ‖ softmax(q))."""
    return rel_entr(softmax(p), softmax(q)).sum()


def alpha_that_moves(base: np.ndarray, shift: np.ndarray, target: float) -> float:
    """Return the alpha in [0, 2] at which KL(base + alpha * shift ‖ base) is *target*."""

    def excess(alpha: float) -> float:
        return kl(base + alpha * shift, base) - target

    if excess(0.0) >= 0:
        return 0.0
    if excess(2.0) <= 0:
        return 2.0
    return brentq(excess, 0.0, 2.0, xtol=1e-12)


def filtered(base: np.ndarray, control: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return which tokens the filters keep, and how far each is from the other fate, in logits.

    A token has one to lose under all filters, and one to gain under each that removes it.
    """
    outcomes = [(np.ones(len(base), dtype=bool), np.full(len(base), np.inf))]
    if (beta := control.get("proxy_plausibility", 0)) > 0:
        bound = base.max() + np.log(beta)
        outcomes.append((base >= bound, abs(base - bound)))
    if (top_p := control.get("proxy_top_p", 1)) < 1:
        outcomes.append(nucleus(base, top_p))
    kept = np.all([keeps for keeps, _ in outcomes], axis=0)
    to_lose = np.min([distance for _, distance in outcomes], axis=0)
    to_gain = np.max([np.where(keeps, 0, distance) for keeps, distance in outcomes], axis=0)
    return kept, np.where(kept, to_lose, to_gain)


def nucleus(base: np.ndarray, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """Return which tokens are in the nucleus, and how far each is from the other fate.

    A token changes sides if it changes places with one on the other side, or if the probability of
    those before it crosses top_p. (Moving logits by x moves that by less than x.)
    """
    probs = softmax(base)
    before = np.array([probs[base > logit].sum() for logit in base])
    kept = before < top_p
    if kept.all():
        return kept, abs(before - top_p)
    places = np.where(kept, base - base[~kept].max(), base[kept].min() - base)
    return kept, np.minimum(abs(before - top_p), places)


def logprobs_of(logits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(log_softmax(logits)).float()
