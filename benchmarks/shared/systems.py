"""What is compared: the proxy-tuned engine, the base alone in vLLM, the loop over transformers.

Each system has its own process, so that none is affected by what another leaves behind, and works
only when it is its turn. On a GPU the others sleep meanwhile and give their memory back.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, ClassVar

import torch

from shared.members import Members
from shared.workload import Answer, Request
from vllm_proxy.engine.defaults import set_cpu_defaults
from vllm_proxy.members.text_part import with_text_part

PROXY, BASE, REFERENCE = "proxy-tuned", "base alone", "transformers loop"
ONE_PASS = "one pass"


IMPORTED = (
    *("__main__", "vllm.entrypoints.llm", "vllm.v1.engine.core"),
    *("vllm.v1.worker.cpu_worker", "vllm_proxy.engine.worker_cpu"),
)
"""What systems on a CPU find imported."""


@cache
def _processes() -> BaseContext:
    """Return how systems get their processes.

    With a GPU each is a new interpreter, as CUDA needs it. On a CPU each is a fork of one process
    that has imported vLLM, which takes most of a start, and done nothing else.
    """
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # which vLLM reads when it is imported
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED])
    return context


class System:
    """One contestant, in a process of its own that starts with it."""

    _started: ClassVar[list["System"]] = []

    def __init__(self, name: str, start: Callable[..., None], *args: object) -> None:
        """Start it. If that fails, all others are stopped: the program could not end otherwise."""
        self.name = name
        self._pool = ProcessPoolExecutor(1, mp_context=_processes())
        try:
            self._pool.submit(_start, dict(os.environ), start, *args).result()
        except BaseException:
            for other in [*self._started]:
                other.stop()
            raise
        self._started.append(self)

    def answer(self, requests: Sequence[Request], at_once: int) -> Answer:
        """Answer *requests*, in groups of *at_once*; alone on the machine while it does."""
        return self._pool.submit(_answer, list(requests), at_once).result()

    def call(self, function: Callable[..., Any], *args: object) -> Any:
        """Return `function(engine, *args)`, run where the engine is."""
        return self._pool.submit(_call, function, *args).result()

    def stop(self) -> None:
        """End the process."""
        self._started.remove(self)
        self._pool.submit(_stop).result()
        self._pool.shutdown()


def start_proxy(
    members: Members,
    device: str,
    *,
    name: str = PROXY,
    drafts: int = 0,
    adapt: bool = False,
    **engine: object,
) -> System:
    """Start the proxy-tuned engine.

    Args:
        members: what it runs.
        device: where.
        name: what tables call it; drafts are added.
        drafts: tokens that the expert drafts before each pass.
        adapt: or fewer, while that is faster.
        engine: arguments of `vllm.LLM` over the set's own.
    """
    if drafts:
        name += f", {'up to ' if adapt else ''}{drafts} drafts"
        members = members.drafting(drafts, adapt=adapt)
    return System(name, _start_vllm, engine_args(members, device, engine, proxy=True))


def start_base(members: Members, device: str, **engine: object) -> System:
    """Start the base alone, with the same arguments."""
    return System(BASE, _start_vllm, engine_args(members, device, engine, proxy=False))


def start_reference(members: Members, device: str) -> System:
    """Start the transformers loop over all members."""
    return System(REFERENCE, _start_reference, members, device)


def engine_args(
    members: Members, device: str, engine: dict[str, object], *, proxy: bool
) -> dict[str, Any]:
    """Return arguments of `vllm.LLM`: *engine*'s over these benchmarks' over the set's own."""
    config = members.config
    own = {
        "dtype": members.dtype,
        "kv_cache_memory_bytes": members.kv_bytes,
        "max_num_seqs": 256,
        "enable_prefix_caching": False,  # every round has the same prompts
        "seed": 0,
    }
    if device == "cuda":
        own["enable_sleep_mode"] = True
    args: dict[str, Any] = config.engine_args()
    if not proxy:
        args["hf_overrides"] = config.engine.get("hf_overrides", {})
        args = with_text_part(args)  # of other models than multimodal ones it is the whole
    return {**args, **own, **engine}


def worker_extension(name: str) -> str:
    """Return what `worker_extension_cls` is to be: a class of these benchmarks, `module.Name`.

    Workers import it by that name; from here on they can.
    """
    here = str(Path(__file__).parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    return name


# In the process of a system:


def ask(engine: Any, method: str) -> Any:
    """Call a method of the worker, where the engine is (see `System.call`)."""
    return engine.llm.collective_rpc(method)[0]


CPU_TIME = "BENCH_CPU_TIME"
"""Variable: count the time of a process that has one thread, and all of its engine."""


def count_cpu_time() -> None:
    """From now on, start engines of one thread and count the time that processors work for them.

    On a machine with other work, wall time tells little: threads wait for each other in turn.
    """
    os.environ |= {
        CPU_TIME: "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }


_system: Any = None


def _start(environment: dict[str, str], start: Callable[..., None], *args: object) -> None:
    """Start a system; a fork has the environment of when the process that it is of was started."""
    os.environ.update(environment)
    start(*args)


def _start_vllm(args: dict[str, Any]) -> None:
    global _system
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if not torch.cuda.is_available():
        set_cpu_defaults()  # what the plugin does for proxies, for the base as well
        if (ranks := args.get("tensor_parallel_size", 1)) > 1:  # of one NUMA node, told by hand
            cores = os.cpu_count() // ranks
            shares = (f"{r * cores}-{(r + 1) * cores - 1}" for r in range(ranks))
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(shares))
    from vllm import LLM

    _system = _Engine(LLM(**args))


def _start_reference(members: Members, device: str) -> None:
    global _system
    from shared.transformers_loop import Reference

    _system = Reference(members, device)


def _answer(requests: list[Request], at_once: int) -> Answer:
    _system.wake()
    try:
        groups = [requests[i : i + at_once] for i in range(0, len(requests), at_once)]
        answers = [_system.answer(group) for group in groups]
        tokens = [row for answer in answers for row in answer.tokens]
        return Answer(sum(answer.seconds for answer in answers), tokens)
    finally:
        _system.rest()


def _call(function: Callable[..., Any], *args: object) -> Any:
    _system.wake()
    try:
        return function(_system, *args)
    finally:
        _system.rest()


def _stop() -> None:
    _system.stop()


class _Engine:
    """A `vllm.LLM` that sleeps, on a GPU, while it is not its turn."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.sleeps = llm.llm_engine.vllm_config.model_config.enable_sleep_mode
        self.rest()

    def wake(self) -> None:
        if self.sleeps:
            self.llm.wake_up()

    def rest(self) -> None:
        if self.sleeps:
            self.llm.sleep(level=1)

    def stop(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()

    def answer(self, requests: list[Request]) -> Answer:
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": request.prompt} for request in requests]
        params = [
            SamplingParams(
                **{
                    "temperature": 0.0,
                    "max_tokens": request.tokens,
                    "ignore_eos": True,
                    "detokenize": False,
                    **request.params,
                }
            )
            for request in requests
        ]
        clock = time.process_time if CPU_TIME in os.environ else time.perf_counter
        started = clock()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = clock() - started
        return Answer(seconds, [list(output.outputs[0].token_ids) for output in outputs])
