"""Answer a Ray dataset with `ray.data.llm`: `python examples/ray_data.py [CONFIG]`.

Each row may have its own strength. Needs `pip install 'ray[data]==2.60.0'`; not `ray[llm]`, which
pins another vLLM.
"""

import os
import sys

import ray
import torch
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

from vllm_proxy import ProxyConfig

PROMPT = "Question: What is the capital of Spain?\nAnswer:"


def main(config: str) -> None:
    """Print each row's strength and answer."""
    given = ProxyConfig.from_yaml(config)
    engine = given.engine_args()
    model = os.path.abspath(path) if os.path.isdir(path := engine.pop("model")) else path
    on_gpus = torch.cuda.is_available()
    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=model,
            engine_kwargs=engine,
            concurrency=1,
            chat_template_stage=False,
            log_engine_metrics=False,  # or install 'ray[serve]' too, which its metrics import
            placement_group_config=None if on_gpus else {"bundle_per_worker": {"CPU": 1}},
        ),
        preprocess=lambda row: {
            "prompt": PROMPT,
            "sampling_params": {**given.sampling, "extra_args": {"proxy_alpha": row["alpha"]}},
        },
        postprocess=lambda row: {"alpha": row["alpha"], "text": row["generated_text"]},
    )
    rows = ray.data.from_items([{"alpha": alpha} for alpha in (0.0, 0.5, 1.0)])
    for row in sorted(processor(rows).take_all(), key=lambda row: row["alpha"]):
        print(f"alpha {row['alpha']}: {row['text']!r}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "configs/demo.yaml")
