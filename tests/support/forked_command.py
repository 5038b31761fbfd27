"""Runs commands, each in a fork of this process, in which vLLM is imported already.

Importing is most of what a short command takes. A line of standard input is a command as JSON: its
`words` (`vllm-proxy`'s, or those of a script, whose path is the first), the files that get its
`output` (none: this process's) and what is to be changed in its `environment`. It is answered by
its process id at once, and by its exit status when it has ended. `conftest.py`'s `Forks` asks.
"""

import json
import os
import runpy
import signal
import sys
from importlib import import_module
from pathlib import Path

import torch

from vllm_proxy import cli

for name in (
    "ray.data",
    "vllm.model_executor.models.llama",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm_proxy.jobs.job",
    "vllm_proxy.llm.proxy_llm",
    "vllm_proxy.model.proxy_model",
    "vllm_proxy.jobs.openai_job",
    "vllm_proxy.jobs.ray_job",
    "vllm_proxy.engine.worker_cpu",
):
    import_module(name)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which jobs in the background ignore
torch.set_num_threads(1)  # no pool of threads, which forks would be without


def answer(number: int) -> None:
    """Write *number* on a line of standard output."""
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def run(words: list[str], output: list[str], environment: dict[str, str]) -> None:
    """Run a command, and end this process."""
    os.setsid()
    os.environ.update(environment)
    for number, path in enumerate(output, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if not words[0].endswith(".py"):
        cli.app(words)
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")
    sys.exit()


for line in sys.stdin:
    if (process := os.fork()) == 0:
        run(**json.loads(line))
    answer(process)
    answer(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
