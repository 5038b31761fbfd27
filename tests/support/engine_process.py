"""Run engines: `engine_process.py PLAN RESULTS`, in a fork with vLLM imported (`forks.py`).

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
import vllm
from torch._dynamo.utils import counters
from vllm import LLM, RequestOutput, SamplingParams
from vllm.compilation.counter import compilation_counter

from vllm_proxy import ProxyLLM
from vllm_proxy.llm.inspection import Inspection, Inspector
from vllm_proxy.llm.sampling import request_name


def start(config: dict) -> LLM:
    if "plain" in config:
        return LLM(**config["plain"])
    engine = {"disable_log_stats": False, **config.get("engine", {})}
    return ProxyLLM(**{k: v for k, v in config.items() if k != "engine"}, **engine)


def prompt_of(given: list[int] | dict) -> dict:
    """Return a prompt: of ids, or of a text with the images that `random_image` makes."""
    if isinstance(given, list):
        return {"prompt_token_ids": given}
    from random_images import random_image  # next to this program

    images = [random_image(*image) for image in given["images"]]
    return {"prompt": given["text"], **({"multi_modal_data": {"image": images}} if images else {})}


def drive(llm: LLM, requests: list[dict]) -> list[dict | None]:
    """Ask requests that arrive, and are aborted, while others run; None for the aborted."""
    waiting = sorted(range(len(requests)), key=lambda i: -requests[i]["arrival"])
    running, aborts, answers, step = {}, {}, [None] * len(requests), 0
    while waiting or llm.llm_engine.has_unfinished_requests():
        while waiting and (requests[waiting[-1]]["arrival"] <= step or not running):
            index = waiting.pop()
            request = requests[index]
            params = {"detokenize": False, "extra_args": request["control"] or None}
            (request_id,) = llm.enqueue(
                [prompt_of(request["prompt"])],
                SamplingParams(**params, **request["params"]),
                use_tqdm=False,
            )
            name = request_name(request_id)
            running[name] = index
            if request["abort"] is not None:
                aborts[name] = step + request["abort"]
        for output in llm.llm_engine.step():
            if output.finished:
                answers[running.pop(output.request_id)] = dump(output)
        step += 1
        late = [name for name, end in aborts.items() if end <= step and name in running]
        llm.llm_engine.abort_request(late)
        for name in late:
            del running[name]
    return answers


def inspect(llm: ProxyLLM, requests: list[dict], top_k: int, abort: int | None) -> list[dict]:
    """Inspect answers that are generated, or given; or give up after *abort* steps."""
    if abort is not None:
        inspector = Inspector(llm, top_k)
        for request in requests:
            inspector.submit(request["prompt"], request["answer"], SamplingParams())
        for _ in range(abort):
            llm.llm_engine.step()
        inspector.abort()
        return []
    inspections: list[Inspection | None] = [None] * len(requests)
    for given in (False, True):
        chosen = [i for i, request in enumerate(requests) if bool(request["answer"]) == given]
        if not chosen:
            continue
        found = llm.inspect(
            [{"prompt_token_ids": requests[i]["prompt"]} for i in chosen],
            [
                SamplingParams(**requests[i]["params"], extra_args=requests[i]["control"] or None)
                for i in chosen
            ],
            completions=[requests[i]["answer"] for i in chosen] if given else None,
            top_k=top_k,
        )
        for i, inspection in zip(chosen, found, strict=True):
            inspections[i] = inspection
    return [
        {
            "token_ids": inspection.token_ids,
            "tokens": [token.to_record() for token in inspection.tokens],
            "missing": inspection.missing,
        }
        for inspection in inspections
    ]


def ask(llm: LLM, question: dict) -> list[dict | None]:
    if "requests" in question:
        return drive(llm, question["requests"])
    if "inspect" in question:
        return inspect(llm, question["inspect"], question["top_k"], question.get("abort"))
    if "calls" in question:
        return [call(llm, *each) for each in question["calls"]]
    if "refused" in question:
        return [refuse(llm, request) for request in question["refused"]]
    prompts = [prompt_of(given) for given in question["prompts"]]
    own = question.get("extra_args", [None] * len(prompts))
    params = question["params"]
    params = params if isinstance(params, list) else [params] * len(prompts)
    params = [
        SamplingParams(**{"detokenize": False, **one, "extra_args": extra_args})
        for one, extra_args in zip(params, own, strict=True)
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [dump(output) for output in outputs]


def refuse(llm: LLM, request: dict) -> str | list[int]:
    """Return why a request is refused; its tokens, if it is not."""
    params = SamplingParams(**{"detokenize": False, **request["params"]})
    try:
        (output,) = llm.generate([{"prompt_token_ids": request["prompt"]}], params, use_tqdm=False)
    except ValueError as error:
        return str(error)
    return list(output.outputs[0].token_ids)


def call(llm: LLM, method: str, *arguments: object) -> str | None:
    """Call a method of the engine; returns its error."""
    try:
        getattr(llm, method)(*arguments)
    except Exception as error:  # noqa: BLE001 - the answer, whatever it is
        return str(error)
    return None


def dump(output: RequestOutput) -> dict:
    return {
        "token_ids": [list(choice.token_ids) for choice in output.outputs],
        "logprobs": [dump_logprobs(choice.logprobs) for choice in output.outputs],
        "prompt_logprobs": dump_logprobs(output.prompt_logprobs),
        "cached": output.num_cached_tokens,
    }


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
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    return {
        "metrics": {
            metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")
        },
        "num_gpu_blocks": cache.num_gpu_blocks,
        "block_size": cache.block_size,
        "vllm": vllm.__version__,
        "v2": llm.llm_engine.vllm_config.use_v2_model_runner,
        "executor": type(llm.llm_engine.model_executor).__name__,
        "compiled": dict(counters["inductor"]),
        "ahead_of_time": ahead_of_time(),
        "kv_cache": kv_cache(llm),
        "weights": weights(llm),
        "kv_cache_usage": scheduler.kv_cache_manager.usage,
        "unfinished": scheduler.get_num_unfinished_requests(),
        "probes": probes(llm),
        "steps": graph_steps(llm),
    }


def graph_steps(llm: LLM) -> dict[str, int] | None:
    """Steps by the graphs that they replayed, where the rig for graphs runs; else None."""
    if "GRAPHS_ON_CPU" not in os.environ:
        return None
    return llm.collective_rpc("graph_steps")[0]


def probes(llm: LLM) -> int | None:
    """How many inspections a worker in this process still holds."""
    worker = getattr(getattr(llm.llm_engine.model_executor, "driver_worker", None), "worker", None)
    if worker is None:
        return None
    state = getattr(worker.model_runner, "model_state", worker.model_runner)
    own = getattr(state, "overrides", None)  # a stock model has none
    return None if own is None else len(own.probes) + len(own.inspected)


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


def ahead_of_time() -> dict[str, int]:
    """How many members were compiled ahead of time, and saved or loaded as such."""
    return {
        "compiled": compilation_counter.num_aot_compiles,
        "saved": compilation_counter.num_aot_artifacts_saved,
        "loaded": compilation_counter.num_aot_artifacts_loaded,
    }


def weights(llm: LLM) -> list[str]:
    """Names of all parameters and buffers of the model, for a worker that is this process.

    Names alone: on a CPU, products keep what belongs to them in layouts of their own.
    """
    worker = getattr(getattr(llm.llm_engine.model_executor, "driver_worker", None), "worker", None)
    if worker is None:
        return []
    model = worker.get_model()
    return [name for name, _ in (*model.named_parameters(), *model.named_buffers())]


def run(engine: dict) -> dict:
    started = time.perf_counter()
    if "cudagraph_mode" in engine["config"].get("engine", {}).get("compilation_config", {}):
        os.environ |= {"GRAPHS_ON_CPU": "1", "VLLM_USE_AOT_COMPILE": "0"}
        if engine["config"]["engine"].get("async_scheduling"):
            os.environ["ASYNC_ON_CPU"] = "1"
    try:
        if "mutation" in engine:
            import mutations  # beside this program

            getattr(mutations, engine["mutation"])()
        llm = start(engine["config"])
        answers = {question["name"]: ask(llm, question) for question in engine["questions"]}
        result = {"answers": answers, **facts(llm)}
        llm.llm_engine.engine_core.shutdown()
    except Exception:  # noqa: BLE001 - one broken engine must not hide the others' answers
        result = {"error": traceback.format_exc()}
    return {**result, "seconds": time.perf_counter() - started}


def main() -> None:
    from transfer import register_transfer  # beside this program

    plan, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    register_transfer()
    # Each engine runs in a fork, because an engine leaves traces in its process (compiled graphs,
    # patched kernels) that the next one would find.
    for engine in plan:
        child = os.fork()
        if child == 0:
            with (results / f"{engine['name']}.json").open("w") as file:
                json.dump(run(engine), file)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
