"""What fusing the logits into one product costs and saves.

`python benchmarks/measurements/head.py`

For models of the paper's sizes and others, with random heads and hidden states, three ways to
compute the logits run in turn, on the device that vLLM runs on (a GPU or this CPU):

- fused: one product over the members' hidden states, as `ProxyTunedForCausalLM` does it;
- three heads: each member's own head, then the formula in float32, as in the cases that need it;
- one head: a single LM head of the summed width, as vLLM would run it: the target for fused.

Times are medians of interleaved repeats. Ratios are medians of the ratios within a repeat, with
their range. Traffic is what the operators read and write, caches included, divided by the least
possible: weights and hidden states read once, float32 logits written once. Errors are against
float64.
"""

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import psutil
import torch
from rich.table import Table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform

sys.path.insert(0, str(Path(__file__).parents[1]))

from shared.options import DTYPES, Parser, positive
from shared.report import Spread, finish, spread, table
from vllm_proxy.config.request import RequestControl
from vllm_proxy.config.roles import ROLES
from vllm_proxy.model.controls import LogitControls
from vllm_proxy.model.head import ProxyHead

SHAPES = {
    "SmolLM2 (demo)": (49152, (576, 576, 576)),
    "Llama-2 13B + 7B": (32000, (5120, 4096, 4096)),
    "Llama-2 70B + 7B": (32000, (8192, 4096, 4096)),
    "Llama-3 8B + 1B": (128256, (4096, 2048, 2048)),
    "Llama-3 70B + 8B": (128256, (8192, 4096, 4096)),
    "Qwen2.5 7B + 0.5B": (152064, (3584, 896, 896)),
    "Qwen2.5 72B + 7B": (152064, (8192, 3584, 3584)),
}
ALPHAS = (0.3, 0.5, 0.7, 1.0, 1.5, 2.0)
ERROR_ROWS = 32
SLOW = 20.0
"""Seconds after which a case is not repeated beyond three times."""


class Member(nn.Module):
    """An LM head as vLLM's model classes have it."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.lm_head = ParallelLMHead(vocab_size, hidden_size)
        self.logits_processor = LogitsProcessor(vocab_size)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return this member's own logits."""
        return self.logits_processor(self.lm_head, hidden_states)


def draw_weights(vocab_size: int, hidden_sizes: tuple[int, ...]) -> list[torch.Tensor]:
    """Return head weights that give logits of about the spread that language models have."""
    return [torch.randn(vocab_size, size).mul_(3 / size**0.5) for size in hidden_sizes]


def make_head(weights: list[torch.Tensor], alpha: float, *, fused: bool) -> ProxyHead:
    """Return the members' head, loaded and ready, as vLLM would make it."""
    gc.collect()  # of the last one: vLLM's parameters and their layers hold each other
    vocab_size, sizes = weights[0].shape[0], [weight.shape[1] for weight in weights]
    members = {role: Member(vocab_size, size) for role, size in zip(ROLES, sizes, strict=True)}
    default = LogitControls.of(RequestControl(alpha=alpha))
    vocab_sizes = dict.fromkeys(ROLES, vocab_size)
    head = ProxyHead(members, sizes, vocab_sizes, default, may_compile=fused)
    if not fused:
        head.separate("asked for by the benchmark")
    for member, weight in zip(members.values(), weights, strict=True):
        member.lm_head.weight.weight_loader(member.lm_head.weight, weight)
    prepare(head, *members.values())
    return head


def make_one_head(weights: list[torch.Tensor]) -> Member:
    """Return one LM head of the summed width."""
    member = Member(weights[0].shape[0], sum(weight.shape[1] for weight in weights))
    member.lm_head.weight.weight_loader(member.lm_head.weight, torch.cat(weights, dim=1))
    prepare(member)
    return member


def prepare(*modules: nn.Module) -> None:
    """Do what vLLM does with every layer once its weights are loaded."""
    for module in modules:
        for layer in module.modules():
            if isinstance(getattr(layer, "quant_method", None), QuantizeMethodBase):
                layer.quant_method.process_weights_after_loading(layer)


class Traffic(TorchDispatchMode):
    """Adds up the bytes that operators read and write; views cost nothing."""

    def __init__(self, packed: int) -> None:
        super().__init__()
        self.packed, self.bytes = packed, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        """Run an operator and count its operands."""
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        schema = operator._schema
        is_view = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
        allocates = schema.name.rpartition("::")[2] in ("empty", "new_empty", "empty_like")
        if not is_view and not allocates:
            self.bytes += sum(
                value.nbytes * self._passes(schema.name, argument)
                for argument, value in zip(schema.arguments, args, strict=False)
                if isinstance(value, torch.Tensor)
            )
            self.bytes += sum(v.nbytes for v in kwargs.values() if isinstance(v, torch.Tensor))
            self.bytes += sum(
                value.nbytes
                for value, returned in zip(
                    result if isinstance(result, tuple) else (result,), schema.returns, strict=False
                )
                if isinstance(value, torch.Tensor) and not returned.alias_info
            )
        if schema.name == "_C::onednn_mm":  # its weight is no operand: packed when it was loaded
            self.bytes += self.packed
        return result

    @staticmethod
    def _passes(operator: str, argument: torch.Argument) -> int:
        written = argument.alias_info is not None and argument.alias_info.is_write
        overwritten = ("copy_", "fill_", "onednn_mm")
        return 2 if written and not operator.endswith(overwritten) else 1


@dataclass
class Speed:
    """One line of the first table; times in seconds."""

    shape: str
    dtype: str
    rows: int
    alpha: float
    repeats: int
    fused: float
    three_heads: float
    one_head: float
    fused_to_three: Spread
    fused_to_one: Spread
    traffic_fused: float | None
    traffic_three: float


@dataclass
class Error:
    """One line of the second table: |difference| to float64, and rows whose best id differs."""

    shape: str
    dtype: str
    alpha: float
    mean_fused: float
    mean_three: float
    max_fused: float
    max_three: float
    flips_fused: int
    flips_three: int
    rows: int


def timed(run: Callable[[], torch.Tensor]) -> float:
    """Return the seconds that *run* takes, on whatever device."""
    wait = torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def measure_speed(
    name: str, weights: list[torch.Tensor], rows: list[int], alpha: float, repeats: int
) -> list[Speed]:
    """Time the three ways on batches of *rows*."""
    ways = {
        "fused": make_head(weights, alpha, fused=True),
        "three": make_head(weights, alpha, fused=False),
        "one": make_one_head(weights).compute_logits,
    }
    dtype, vocab_size = torch.get_default_dtype(), weights[0].shape[0]
    width = sum(weight.shape[1] for weight in weights)
    results = []
    for count in rows:
        hidden_states = torch.randn(count, width)
        first = {way: timed(partial(run, hidden_states)) for way, run in ways.items()}
        times = {way: [] for way in ways}
        times_left = 3 if sum(first.values()) > SLOW / repeats else repeats
        for _ in range(times_left):
            for way, run in ways.items():
                times[way].append(timed(partial(run, hidden_states)))
        least = dtype.itemsize * width * (vocab_size + count) + 4 * count * vocab_size
        traffic, product = {}, ways["fused"].product
        for way, packed in (("fused", width), ("three", width / 3)):
            if way == "fused" and product.is_narrow and product.packed:
                traffic[way] = None  # inside compiled code no operator is dispatched
                continue
            with (
                patch.object(product, "row_product", None),
                Traffic(int(packed * vocab_size * dtype.itemsize)) as counter,
            ):
                ways[way](hidden_states)
            traffic[way] = counter.bytes / least
        ratios = {
            other: [f / t for f, t in zip(times["fused"], times[other], strict=True)]
            for other in ("three", "one")
        }
        results.append(
            Speed(
                name,
                str(dtype).removeprefix("torch."),
                count,
                alpha,
                times_left,
                *(statistics.median(times[way]) for way in ("fused", "three", "one")),
                spread(ratios["three"]),
                spread(ratios["one"]),
                traffic["fused"],
                traffic["three"],
            )
        )
    return results


def measure_error(name: str, weights: list[torch.Tensor], alpha: float) -> Error:
    """Compare fused and unfused logits with float64."""
    sizes = [weight.shape[1] for weight in weights]
    hidden_states = torch.randn(ERROR_ROWS, sum(sizes))
    parts = hidden_states.split(sizes, dim=1)
    truth = torch.zeros(ERROR_ROWS, weights[0].shape[0], dtype=torch.float64)
    for weight, part, coefficient in zip(weights, parts, (1, alpha, -alpha), strict=True):
        for rows, out in zip(weight.split(4096), truth.split(4096, dim=1), strict=True):
            out += coefficient * (part.double() @ rows.double().T)
    means, largest, flips = [], [], []
    for fused in (True, False):
        difference = make_head(weights, alpha, fused=fused)(hidden_states).double() - truth
        means.append(difference.abs().mean().item())
        largest.append(difference.abs().max().item())
        best = (difference + truth).argmax(dim=1)
        flips.append(int((best != truth.argmax(dim=1)).sum()))
    dtype = str(torch.get_default_dtype()).removeprefix("torch.")
    return Error(name, dtype, alpha, *means, *largest, *flips, ERROR_ROWS)


def free_bytes() -> int:
    """Return the memory left on the device."""
    if torch.accelerator.is_available():
        return torch.accelerator.get_memory_info()[0]
    return psutil.virtual_memory().available


def tables(speeds: list[Speed], errors: list[Error]) -> list[Table]:
    """Return times and traffic, and errors."""
    times = table(
        *("members", "dtype", "rows", "alpha", "fused", "three heads", "one head"),
        *("fused / three", "fused / one", "traffic fused", "three"),
        title="Time (ms) and traffic over the least possible",
    )
    for s in speeds:
        cells = [f"{1e3 * t:.1f}" for t in (s.fused, s.three_heads, s.one_head)]
        cells += map(str, (s.fused_to_three, s.fused_to_one))
        traffic = (s.traffic_fused, s.traffic_three)
        cells += ["compiled" if t is None else f"{t:.2f}" for t in traffic]
        times.add_row(s.shape, s.dtype, str(s.rows), str(s.alpha), *cells)
    rounding = table(
        *("members", "dtype", "alpha", "mean", "", "ratio", "max", "", "flips", ""),
        title="Error against float64 (fused, three heads)",
    )
    for e in errors:
        rounding.add_row(
            e.shape,
            e.dtype,
            str(e.alpha),
            *(f"{e.mean_fused:.2g}", f"{e.mean_three:.2g}", f"{e.mean_fused / e.mean_three:.3f}"),
            *(f"{e.max_fused:.2g}", f"{e.max_three:.2g}"),
            *(f"{e.flips_fused}/{e.rows}", f"{e.flips_three}/{e.rows}"),
        )
    return [times, rounding]


def main() -> None:
    """Measure, print two tables, and one JSON line with everything."""
    command = Parser(description=__doc__.partition("\n")[0])
    command.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="NAME"
    )
    command.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    command.add_argument("--rows", nargs="+", type=positive, default=[1, 8, 64, 256])
    command.add_argument("--alpha", type=float, default=1.0, help="strength of the timed heads")
    command.add_argument("--repeats", type=positive, default=7)
    arguments = command.parse_args()

    init_distributed_environment(1, 0, "tcp://127.0.0.1:29555", 0, current_platform.dist_backend)
    speeds, errors = [], []
    with set_current_vllm_config(VllmConfig()):
        initialize_model_parallel()
        torch.set_default_device(current_platform.device_type)
        for name in arguments.shapes:
            for dtype in arguments.dtypes:
                torch.set_default_dtype(getattr(torch, dtype))
                torch.manual_seed(0)
                vocab_size, sizes = SHAPES[name]
                itemsize = torch.get_default_dtype().itemsize
                # Drawn, three ways, and put together; in float32, packed as well on a CPU.
                copies = 7 if dtype == "float32" else 5
                needed = copies * vocab_size * sum(sizes) * itemsize
                if needed > free_bytes():
                    gib = needed / 2**30
                    sys.stderr.write(f"{name}, {dtype}: left out, needs {gib:.0f} GiB\n")
                    continue
                weights = draw_weights(vocab_size, sizes)
                rows, repeats = arguments.rows, arguments.repeats
                speeds += measure_speed(name, weights, rows, arguments.alpha, repeats)
                errors += [measure_error(name, weights, alpha) for alpha in ALPHAS]
    finish(
        "head",
        arguments,
        tables(speeds, errors),
        speeds=[asdict(speed) for speed in speeds],
        errors=[asdict(error) for error in errors],
    )


if __name__ == "__main__":
    main()
