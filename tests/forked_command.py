"""Runs commands of `vllm-proxy`, each in a fork of this process, in which vLLM is imported already.

Importing is most of what a short command takes. A line of standard input is a command's words as a
JSON list; answered by its process id at once, and by its exit status when it has ended.
"""

import json
import os
import signal
import sys
from importlib import import_module

import torch

from vllm_proxy import cli

for name in (
    "ray.data",
    "vllm.model_executor.models.llama",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm_proxy.batch",
    "vllm_proxy.engine",
    "vllm_proxy.model",
    "vllm_proxy.openai_batch",
    "vllm_proxy.replicas",
    "vllm_proxy.runner.v1_cpu",
):
    import_module(name)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which jobs in the background ignore
torch.set_num_threads(1)  # no pool of threads, which forks would be without


def answer(number: int) -> None:
    """Write *number* on a line of standard output."""
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


for line in sys.stdin:
    if (process := os.fork()) == 0:
        os.setsid()
        cli.app(json.loads(line))
    answer(process)
    answer(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
