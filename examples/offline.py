"""Generate from Python at three strengths: `python examples/offline.py [CONFIG]`."""

import sys

from vllm_proxy import ProxyLLM

PROMPT = "Question: What is the capital of Spain?\nAnswer:"
STRENGTHS = [0.0, 0.5, 1.0]


def main(config: str) -> None:
    """Print the answer of each strength. All three run in one batch of one engine."""
    llm = ProxyLLM.from_config(config)
    outputs = llm.generate([PROMPT] * len(STRENGTHS), alpha=STRENGTHS, use_tqdm=False)
    for alpha, output in zip(STRENGTHS, outputs, strict=True):
        print(f"alpha {alpha}: {output.outputs[0].text!r}")


if __name__ == "__main__":  # vLLM starts processes that import this file
    main(sys.argv[1] if len(sys.argv) > 1 else "configs/demo.yaml")
