"""Questions to the engine of `proxy_llm`, and loops over transformers' models that answer them."""

import torch

from support.reference import Reference
from vllm_proxy import ProxyConfig

PROMPT = "The large model is"
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
IDS = [[40 + 7 * i + j for j in range(5 + 3 * i)] for i in range(4)]
OWN = [list(range(100, 130)), list(range(60, 63))]


@torch.inference_mode()
def decode(reference: Reference, prompts, weights=lambda t: (1.0, 1.0, -1.0), tokens=10):
    """Greedy tokens of members with a prompt each and weights that change with t: plain loops.

    Args:
        prompts: of base, expert and antiexpert, or one for all.
        weights: from t, the number of tokens generated before, to the members' weights.
    """
    ids = [prompts] * 3 if isinstance(prompts[0], int) else list(prompts)
    caches, generated = [None] * 3, []
    for t in range(tokens):
        logits = 0
        for i, (model, weight) in enumerate(zip(reference.models, weights(t), strict=True)):
            output = model(torch.tensor([ids[i]]), past_key_values=caches[i], use_cache=True)
            caches[i] = output.past_key_values
            logits = logits + weight * output.logits[0, -1]
        generated.append(int(logits.argmax()))
        ids = [generated[-1:]] * 3
    return generated


def strength(alpha: float):
    return lambda t: (1.0, alpha, -alpha)


def configure(llm, monkeypatch, **fields) -> ProxyConfig:
    config = llm.proxy_config.model_copy(update=fields)
    monkeypatch.setattr(llm, "proxy_config", config)
    return config
