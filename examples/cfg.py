"""Classifier-free guidance (Sanchez et al. 2023, arXiv 2306.17806).

    logits = uncond + scale * (cond - uncond) = cond + (scale - 1) * (cond - uncond)

Run it with `python examples/cfg.py [CONFIG]`. This is proxy tuning with one model in two roles. The
base reads the prompt. The antiexpert, which is the same model, reads the prompt without its
instruction. `alpha` is the scale less one. Only the base of CONFIG is used.
"""

import sys

from vllm_proxy import ProxyConfig, ProxyLLM

INSTRUCTION = "This is a story about a dragon.\n"
STORY = "Once upon a time, there was a"
SCALES = [1.0, 1.5, 3.0]


def main(config: str) -> None:
    """Print the answer of each guidance scale; 1 is the model without guidance."""
    given = ProxyConfig.from_yaml(config)
    model = given.base.model_dump(exclude_none=True)
    llm = ProxyLLM(base=model, antiexpert=model, sampling=given.sampling, **given.engine)
    prompt = {"prompt": INSTRUCTION + STORY, "antiexpert_prompt": STORY}
    alphas = [scale - 1 for scale in SCALES]
    outputs = llm.generate([prompt] * len(SCALES), alpha=alphas, use_tqdm=False)
    for scale, output in zip(SCALES, outputs, strict=True):
        print(f"guidance scale {scale}: {output.outputs[0].text!r}")


if __name__ == "__main__":  # vLLM starts processes that import this file
    main(sys.argv[1] if len(sys.argv) > 1 else "configs/demo.yaml")
