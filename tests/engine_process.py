"""Run engines in a process of their own: `python tests/engine_process.py PLAN RESULTS`.

PLAN is a JSON list of engines, each with a `config` (a `ProxyConfig`'s fields, or `{"plain": {…}}`
for a stock `vllm.LLM`) and named `questions`. An engine is started once, asked everything and shut
down; its answers, or its error, go to the file RESULTS/name.json. The model runner and the compile
cache are chosen by the environment, which vLLM reads at import: hence the process.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path

import torch
from torch._dynamo.utils import counters
from vllm import LLM, SamplingParams

from vllm_proxy import ProxyLLM


def start(config: dict) -> LLM:
    if "plain" in config:
        return LLM(**config["plain"])
    engine = {"disable_log_stats": False, **config.get("engine", {})}
    return ProxyLLM(**{k: v for k, v in config.items() if k != "engine"}, **engine)


def ask(llm: LLM, question: dict) -> list[dict]:
    prompts = [{"prompt_token_ids": ids} for ids in question["prompts"]]
    params = SamplingParams(**{"detokenize": False, **question["params"]})
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [
        {
            "token_ids": [list(choice.token_ids) for choice in output.outputs],
            "logprobs": [dump_logprobs(choice.logprobs) for choice in output.outputs],
            "prompt_logprobs": dump_logprobs(output.prompt_logprobs),
            "cached": output.num_cached_tokens,
        }
        for output in outputs
    ]


def dump_logprobs(logprobs: list | None) -> list | None:
    if logprobs is None:
        return None
    return [
        None if row is None else {str(token): value.logprob for token, value in row.items()}
        for row in logprobs
    ]


def facts(llm: LLM) -> dict:
    """What the engine says of itself after the questions."""
    cache = llm.llm_engine.vllm_config.cache_config
    return {
        "metrics": {
            metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")
        },
        "num_gpu_blocks": cache.num_gpu_blocks,
        "block_size": cache.block_size,
        "v2": llm.llm_engine.vllm_config.use_v2_model_runner,
        "executor": type(llm.llm_engine.model_executor).__name__,
        "compiled": dict(counters["inductor"]),
        "kv_cache": kv_cache(llm),
    }


def kv_cache(llm: LLM) -> dict[str, int]:
    """Bytes of every KV cache tensor by layer, for an engine whose worker is this process."""
    runner = getattr(getattr(llm.llm_engine.model_executor, "driver_worker", None), "worker", None)
    if runner is None:
        return {}
    layers = runner.model_runner.compilation_config.static_forward_context
    return {
        name: layer.kv_cache.numel() * layer.kv_cache.element_size()
        for name, layer in layers.items()
        if isinstance(getattr(layer, "kv_cache", None), torch.Tensor)
    }


def run(engine: dict) -> dict:
    started = time.perf_counter()
    try:
        llm = start(engine["config"])
        answers = {question["name"]: ask(llm, question) for question in engine["questions"]}
        result = {"answers": answers, **facts(llm)}
        llm.llm_engine.engine_core.shutdown()
    except Exception:  # noqa: BLE001 - one broken engine must not hide the others' answers
        result = {"error": traceback.format_exc()}
    return {**result, "seconds": time.perf_counter() - started}


def main() -> None:
    plan, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    # vLLM is imported once, here; each engine then runs in a fork, because an engine leaves traces
    # in its process (compiled graphs, patched kernels) that the next one would find.
    for engine in plan:
        child = os.fork()
        if child == 0:
            with (results / f"{engine['name']}.json").open("w") as file:
                json.dump(run(engine), file)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
