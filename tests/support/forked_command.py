"""Runs commands, each in a fork of this process, in which vLLM is imported already.

A line of standard input is a command as JSON: its `words` (`vllm-proxy`'s; or `vllm` and its; or
those of a script, whose path is the first), the files that get its `output`, its `environment`
and its `directory`. It is answered by its process id at once. A line that is a process id is
answered by the command's exit status when it has ended. `forks.py` asks.
"""

import atexit
import gc
import json
import multiprocessing
import os
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from importlib import import_module
from multiprocessing.context import BaseContext
from pathlib import Path

BEGUN = dict(os.environ)  # before vLLM is imported, which sets some

import torch  # noqa: E402
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition  # noqa: E402
from vllm.model_executor.models import registry  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.v1.engine import coordinator  # noqa: E402
from vllm.v1.engine import utils as engines  # noqa: E402
from vllm.v1.executor import multiproc_executor  # noqa: E402

from vllm_proxy import cli  # noqa: E402

IS_V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
EVERYONE_S = (
    *("vllm.model_executor.models.llama", "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker"),
    "vllm.v1.worker.cpu.model_runner" if IS_V2 else "vllm.v1.worker.cpu_model_runner",
    *("ray.data", "vllm_proxy.jobs.job", "vllm_proxy.jobs.openai_job", "vllm_proxy.jobs.ray_job"),
    *("vllm_proxy.llm.proxy_llm", "vllm_proxy.model.proxy_model", "vllm_proxy.engine.worker_cpu"),
)
"""Modules that most commands import."""


def prepare() -> None:
    """Import and do once what every command would do."""
    for name in EVERYONE_S:
        import_module(name)
    # vLLM's kernels for CPUs, for which a worker looks through all that is imported.
    current_platform.register_triton_kernel_overrides()
    type(current_platform).register_triton_kernel_overrides = classmethod(lambda _: None)
    start_no_python_anew()
    # What waits for a message of another rank else looks for it for a second before it sleeps, and
    # takes a core from that rank.
    SpinCondition.__init__.__defaults__ = (0.005,)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which jobs in the background ignore
    torch.set_num_threads(1)  # no pool of threads, which forks would be without
    # An engine's start and end have the collector go through everything about ten times: half a
    # second each for what is imported, of which no command makes garbage.
    gc.collect()
    gc.freeze()


def context() -> BaseContext:
    """Return how a command starts processes: forks, but for one that may have asked a Ray cluster.

    Ray has threads, which a fork would wait for and does not have.
    """
    return multiprocessing.get_context("spawn" if "RAY_ADDRESS" in os.environ else "fork")


def start_no_python_anew() -> None:
    """Spare what vLLM starts in new interpreters, where importing is most of what is to be done.

    Engines and workers are forked, as vLLM does on GPUs (`test_ray.py`, `test_server.py` and
    `test_batch.py` start some as it does on a CPU), and model classes are looked at here, not in a
    process for each.
    """
    for module in (coordinator, engines, multiproc_executor):
        module.get_mp_context = context
    registry._run_in_subprocess = lambda function: function()


def run(words: list[str], output: list[str], environment: dict[str, str], directory: str) -> None:
    """Run a command, and end this process."""
    os.setsid()
    gc.unfreeze = lambda: None  # which the end of an engine asks for
    for name in BEGUN.keys() - environment.keys():
        os.environ.pop(name, None)
    os.environ.update(environment.items() - BEGUN.items())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(output, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(directory)
    sys.argv = words
    status = status_of(partial(call, words))
    # As Python does; only what is imported is not taken to pieces first, which takes seconds.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def call(words: list[str]) -> None:
    if words[0] == "vllm":
        import_module("vllm.entrypoints.cli.main").main()
    elif words[0].endswith(".py"):
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
    else:
        cli.app(words)


def status_of(command: Callable[[], None]) -> int:
    """Return the status with which Python ends after *command*."""
    try:
        command()
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        return 1
    return 0


def answer(number: int) -> None:
    """Write *number* on a line of standard output."""
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def main() -> None:
    prepare()
    for line in sys.stdin:
        question = json.loads(line)
        if isinstance(question, int):
            answer(os.waitstatus_to_exitcode(os.waitpid(question, 0)[1]))
        elif (process := os.fork()) == 0:
            run(**question)
        else:
            answer(process)
    os._exit(0)


if __name__ == "__main__":  # a process that a command spawns imports this file again
    main()
