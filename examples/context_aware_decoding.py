"""Context-aware decoding (Shi et al. 2023, arXiv 2305.14739).

    logits = (1 + alpha) * with_context - alpha * without_context

Run it with `python examples/context_aware_decoding.py [CONFIG]`. The base reads a context that
contradicts what the model has learned. The antiexpert, which is the same model, reads the question
alone. Only the base of CONFIG is used.
"""

import sys

from vllm_proxy import ProxyConfig, ProxyLLM

CONTEXT = "In this story the capital of France is Lyon.\n"
QUESTION = "The capital of France is"
ALPHAS = [0.0, 0.5, 1.0]


def main(config: str) -> None:
    """Print the answer without (alpha 0) and with context-aware decoding."""
    given = ProxyConfig.from_yaml(config)
    model = given.base.model_dump(exclude_none=True)
    llm = ProxyLLM(base=model, antiexpert=model, sampling=given.sampling, **given.engine)
    prompt = {"prompt": CONTEXT + QUESTION, "antiexpert_prompt": QUESTION}
    outputs = llm.generate([prompt] * len(ALPHAS), alpha=ALPHAS, use_tqdm=False)
    for alpha, output in zip(ALPHAS, outputs, strict=True):
        print(f"alpha {alpha}: {output.outputs[0].text!r}")


if __name__ == "__main__":  # vLLM starts processes that import this file
    main(sys.argv[1] if len(sys.argv) > 1 else "configs/demo.yaml")
