"""Where a benchmark's figures come from."""

import os
import platform
from argparse import Namespace
from importlib.metadata import version
from typing import Any

import torch


def provenance(benchmark: str, arguments: Namespace) -> dict[str, Any]:
    """Return what stands beside results: the benchmark, its arguments, device and versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "benchmark": benchmark,
        "arguments": vars(arguments),
        "device": gpu or f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("vllm", "torch", "vllm-proxy")},
    }
