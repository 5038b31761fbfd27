"""How benchmarks report: tables for people, then one JSON line with the sources of the figures."""

import json
import os
import platform
import statistics
import sys
from argparse import Namespace
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table


class Spread(NamedTuple):
    """A figure over the rounds of one run."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        digits = 2 if self.median < 10 else 1 if self.median < 100 else 0
        return "{:.{d}f} ({:.{d}f}-{:.{d}f})".format(*self, d=digits)


def spread(values: Iterable[float]) -> Spread:
    """Return median, least and most."""
    values = list(values)
    return Spread(statistics.median(values), min(values), max(values))


def ratios(ones: Iterable[float], others: Iterable[float]) -> Spread:
    """Return the ratios within the rounds: what disturbed one round disturbed both sides of it."""
    return spread(one / other for one, other in zip(ones, others, strict=True))


def table(*columns: str, title: str | None = None) -> Table:
    """Return an empty table with these columns."""
    result = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for column in columns:
        result.add_column(column, justify="right")
    return result


def finish(benchmark: str, arguments: Namespace, tables: Iterable[Table], **record: Any) -> None:
    """Print *tables*, then *record* with its provenance as one JSON line."""
    console = Console(width=None if sys.stdout.isatty() else 240)  # a file's lines: as they are
    for shown in tables:
        console.print(shown)
    print(json.dumps({**provenance(benchmark, arguments), **record}, default=str))


def provenance(benchmark: str, arguments: Namespace) -> dict[str, Any]:
    """Return the provenance of results: the benchmark, its arguments, device and versions."""
    return {
        "benchmark": benchmark,
        "arguments": vars(arguments),
        "device": device_name(),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("VLLM_", "OMP_"))},
        "versions": {name: version(name) for name in ("vllm", "torch", "vllm-proxy")},
    }


def device_name() -> str:
    """Return the GPU's name, or the CPU's and its number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return f"{cpu}, {os.cpu_count()} cores"
