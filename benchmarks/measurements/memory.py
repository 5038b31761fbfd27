"""The memory of each way to run proxy tuning.

`python benchmarks/measurements/memory.py --models smollm2`

The base alone, three members, drafts by the expert, an expert that is an adapter in one pass with
the antiexpert, and both: the weights, KV cache and activations of the engine's worker, next to what
`vllm-proxy plan` predicts. One engine runs after the other.

On a GPU, weights are what torch has allocated without the KV cache. On a CPU, where products keep
weights in packed layouts, they are the worker's memory minus that of an engine with the same
arguments and the set `tiny`, which stands for everything that is not a model. Activations are the
most that torch allocates in a step: of one prompt as long as a step may be, and of as many requests
as may run at once, sampled at a temperature.
"""

import ctypes
import gc
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from measurements.one_pass import paired
from shared.members import Members, prepare
from shared.options import Parser, parser, positive, require_device
from shared.report import finish, table
from shared.systems import (
    BASE,
    ONE_PASS,
    PROXY,
    System,
    ask,
    start_base,
    start_proxy,
    worker_extension,
)
from shared.workload import Request
from vllm_proxy.preflight.plan.cost import EngineSettings
from vllm_proxy.preflight.plan.hardware import BatchLimits
from vllm_proxy.preflight.plan.layout import Layout
from vllm_proxy.preflight.plan.memory import activation_bytes
from vllm_proxy.preflight.plan.read import read_all, read_engine, read_shapes
from vllm_proxy.preflight.plan.shape import Shape

MIB = 2**20
KV_BYTES = 2**28
"""Of every engine."""


class Meter:
    """vLLM's seam `worker_extension_cls`: methods added to the worker, called from the front."""

    def held(self) -> int:
        """Return the bytes that the worker has: on a GPU by torch, else by the system."""
        import torch

        gc.collect()
        if torch.cuda.is_available():
            return torch.cuda.memory_allocated()
        ctypes.CDLL(None).malloc_trim(0)
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
        raise OSError("/proc/self/status has no RssAnon")

    def kv_cache(self) -> tuple[int, int]:
        """Return bytes of the KV cache, and of a token in it."""
        config = self.model_runner.vllm_config
        layers = config.compilation_config.static_forward_context.values()
        caches = [getattr(layer, "kv_cache", None) for layer in layers]
        total = sum(cache.nbytes for cache in caches if hasattr(cache, "nbytes"))
        return total, total // (config.cache_config.num_gpu_blocks * config.cache_config.block_size)

    def start_meter(self) -> None:
        """Watch what steps allocate: a step runs, and then samples from what it left."""
        self.most = self.left = 0
        for name in ("execute_model", "sample_tokens"):
            self._watch(self.model_runner, name)

    def _watch(self, owner: Any, name: str) -> None:
        import torch
        from torch.profiler import ProfilerActivity, profile

        run, begins = getattr(owner, name), name == "execute_model"

        def watched(*args: Any, **kwargs: Any) -> Any:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                if begins:
                    self.left = torch.cuda.memory_allocated()
                result = run(*args, **kwargs)
                torch.cuda.synchronize()
                self.most = max(self.most, torch.cuda.max_memory_allocated() - self.left)
                return result
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
                result = run(*args, **kwargs)
            self.left = 0 if begins else self.left
            events = profiled.profiler.kineto_results.events()
            for event in sorted(events, key=lambda event: event.start_ns()):
                if event.name() == "[memory]":
                    self.left += event.nbytes()
                    self.most = max(self.most, self.left)
            return result

        setattr(owner, name, watched)

    def peak(self) -> int:
        """Return the most that a step allocated since the last call."""
        most, self.most = self.most, 0
        return most


class Found(NamedTuple):
    """Bytes: what a worker holds at first, of a token in the KV cache, and in a step at most."""

    held: int
    kv_cache: int
    kv_token: int
    activations: int


def measure(system: System, batch: BatchLimits) -> Found:
    """Return what a system holds, and stop it."""
    held = system.call(ask, "held")
    kv_cache, kv_token = system.call(ask, "kv_cache")
    system.call(ask, "start_meter")
    drawn = {"temperature": 1.0}
    long = [5 + i % 500 for i in range(batch.tokens)]
    system.answer([Request(long, 2, drawn)], 1)
    short = [Request([5 + i, 6, 7], 8, drawn) for i in range(batch.requests)]
    system.answer(short, batch.requests)
    activations = system.call(ask, "peak")
    system.stop()
    return Found(held, kv_cache, kv_token, activations)


def planned(members: Members, batch: BatchLimits, *, base: bool) -> tuple[int, int, float]:
    """Return bytes of weights, of a token in the KV cache and of activations as `plan` has them."""
    config = members.config.model_copy(
        update={"engine": {**members.config.engine, "dtype": members.dtype}}
    )
    found = read_all(config)
    engine: EngineSettings = replace(read_engine(config, found), batch=batch)
    shapes: list[Shape] = read_shapes(config, found, engine, here=True)
    if base:
        shapes = [shape for shape in shapes if shape.role == "base"]
    return (
        sum(shape.weight_bytes for shape in shapes),
        engine.kv_itemsize * sum(shape.kv_numbers() for shape in shapes),
        activation_bytes(shapes, Layout(), 0, engine),
    )


def options() -> Parser:
    """Return the command line."""
    command = parser(__doc__)
    command.add_argument("--drafts", type=positive, default=4, metavar="K")
    command.add_argument(
        "--step-tokens", type=positive, default=1024, help="tokens of the longest step"
    )
    command.add_argument(
        "--requests", type=positive, default=64, help="run at most N requests at once"
    )
    return command


def main() -> None:
    """Measure, print a table, and one JSON line with everything."""
    command = options()
    arguments = command.parse_args()
    device = require_device(command, arguments.device)
    batch = BatchLimits(arguments.step_tokens, arguments.requests)
    members = prepare(command, arguments.models, arguments.dtype, device, reference=False)
    members.require_context(command, batch.tokens + 2)
    tiny = prepare(command, "tiny", arguments.dtype, device, reference=False)
    members.kv_bytes = tiny.kv_bytes = KV_BYTES
    adapted = paired(command, members)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines, two a step
    engine = {
        "worker_extension_cls": worker_extension("memory.Meter"),
        "enforce_eager": arguments.eager,
        "max_num_batched_tokens": batch.tokens,
        "max_num_seqs": batch.requests,
    }
    k = arguments.drafts
    ways: dict[str, Members] = {
        BASE: members,
        f"{PROXY}: three members": members,
        f"… and {k} drafts": members.drafting(k, adapt=False),
        ONE_PASS: adapted,
        f"{ONE_PASS}, and {k} drafts": adapted.drafting(k, adapt=False),
    }
    nothing = measure(start_base(tiny, device, **engine), batch)
    own = planned(tiny, batch, base=True)[0]
    shown = table(
        *("system", "weights", "plan", "KV a token", "plan", "activations", "plan"),
        title=f"{arguments.models}, {arguments.dtype}, MiB (a token: KiB); steps of "
        f"{batch.tokens} tokens, {batch.requests} requests",
    )
    results = []
    for name, which in tqdm(ways.items(), unit="system"):
        start = start_base if name == BASE else start_proxy
        found = measure(start(which, device, **engine), batch)
        weights = (
            found.held - found.kv_cache if device == "cuda" else found.held - nothing.held + own
        )
        expected = planned(which, batch, base=name == BASE)
        results.append({"system": name, "weights": weights, "planned": expected, **found._asdict()})
        shown.add_row(
            name,
            f"{weights / MIB:.0f}",
            f"{expected[0] / MIB:.0f}",
            f"{found.kv_token / 1024:.1f}",
            f"{expected[1] / 1024:.1f}",
            f"{found.activations / MIB:.0f}",
            f"{expected[2] / MIB:.0f}",
        )
    finish("memory", arguments, [shown], results=results, engine_alone=nothing.held)


if __name__ == "__main__":
    main()
