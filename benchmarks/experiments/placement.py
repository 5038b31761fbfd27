"""On paper: would small members be faster on ranks of their own? By `vllm-proxy plan`'s model.

`python benchmarks/experiments/placement.py --gpu H100-80G --gpus 8 --requests 1 8 64 256`

Today all members share all N tensor-parallel ranks and run one after the other. For sets of members
with the shapes of Llama and Qwen2.5, this computes the decode step of other placements:

- ``small TP m``: both small members on the first m ranks, one after the other; the others wait;
- ``pair 2 x TP m``: expert and antiexpert at the same time, each on m ranks, after the base;
- ``copies of TP m``: every m ranks hold both small members whole, for their part of the requests;
- ``apart``: the base on N/2 ranks, each small member on N/4, all at the same time;
- ``joint``: all ranks, but the small members' all-reduces are joined, layer by layer;
- ``engines``: what needs no new code, two engines on N/2 ranks each.

Times are those of `cost.py`: bytes or arithmetic, and two all-reduces per layer of each member on
its own number of ranks. Where a member has other ranks than the base, its logits are sent once in
float32. Decode steps are in CUDA graphs, so no launches are counted. The number of requests that
fit is that of the GPU with the least room; steps of more are in brackets. Nothing runs.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, inf
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from shared.members import LLAMA_7B, LLAMA_13B, LLAMA_70B, write_shape
from shared.options import Parser, positive
from shared.report import finish, table
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.preflight.plan import GPUS
from vllm_proxy.preflight.plan.cost import LOGIT_BYTES, EngineSettings, Load, step
from vllm_proxy.preflight.plan.hardware import Hardware
from vllm_proxy.preflight.plan.layout import Layout
from vllm_proxy.preflight.plan.read import read_all, read_engine, read_shapes
from vllm_proxy.preflight.plan.shape import Shape


def _shape(vocabulary: int, hidden: int, inner: int, layers: int, heads: int) -> dict[str, int]:
    """Return a config of a model whose 8 (Qwen2.5-7B: 4) KV heads have 128 numbers each."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 4 if heads == 28 else 8,
    }


SETS = {
    "Llama-2 13B / 7B": (LLAMA_13B, LLAMA_7B),
    "Llama-2 70B / 7B": (LLAMA_70B, LLAMA_7B),
    "Llama-3.1 70B / 8B": (LLAMA_70B | {"vocab_size": 128256}, _shape(128256, 4096, 14336, 32, 32)),
    "Qwen2.5 32B / 7B": (
        _shape(152064, 5120, 27648, 64, 40),
        _shape(152064, 3584, 18944, 28, 28),
    ),
}
PROMISED = 0.10
"""The gain that would be worth building a placement."""


@dataclass(frozen=True)
class Case:
    """Members with the base on *ranks* GPUs, and a batch.

    Attributes:
        base: the large member.
        small: expert and antiexpert have the same shape.
        ranks: GPUs.
        load: one decode step.
        engine: dtypes.
        gpu: each GPU.
    """

    base: Shape
    small: Shape
    ranks: int
    load: Load
    engine: EngineSettings
    gpu: Hardware

    def seconds(self, shape: Shape, ranks: int, requests: int | None = None) -> float:
        """Return a member's time on *ranks* GPUs; inf where its heads cannot be divided."""
        heads, kv_heads = shape.attention[0].heads, shape.attention[0].kv_heads
        if ranks < 1 or heads % ranks or (kv_heads % ranks and ranks % kv_heads):
            return inf
        load = self.load._replace(requests=requests or self.load.requests)
        return step([shape], Layout(ranks), load, self.engine, self.gpu)[shape.role].seconds

    @property
    def sending(self) -> float:
        """Seconds in which the logits of members on different ranks come together."""
        assert self.gpu.link is not None
        logits = self.load.requests * self.base.vocab_size * LOGIT_BYTES
        return self.gpu.link.latency + logits / self.gpu.link.bytes_per_second

    def fit(self, *held: tuple[Shape, int, float], replicas: int = 1) -> int:
        """Return how many requests fit if the fullest GPU holds these members.

        Args:
            held: a member, its number of ranks, and the part of the requests for which it has keys.
            replicas: engines among which the requests are divided.
        """
        weights = sum(shape.weight_bytes / ranks for shape, ranks, _ in held)
        kv = self.load.tokens * self.engine.kv_itemsize
        numbers = sum(
            part * sum(layer.kv_numbers(ranks) for layer in shape.attention)
            for shape, ranks, part in held
        )
        room = self.gpu.memory * self.engine.utilization - self.gpu.workspace - weights
        return max(0, int(replicas * room / (kv * numbers)))


class Placement(NamedTuple):
    """A placement, the duration of a decode step in seconds, and how many requests fit."""

    name: str
    seconds: float
    fit: int


def placements(case: Case) -> Iterator[Placement]:
    """Yield today's placement, then the others; where heads do not divide, `seconds` is inf."""
    base, small, ranks = case.base, case.small, case.ranks
    alone, one = case.seconds(base, ranks), case.seconds(small, ranks)
    everywhere = case.fit((base, ranks, 1), *[(small, ranks, 1)] * 2)
    yield Placement(f"today: TP {ranks}", alone + 2 * one, everywhere)
    saved = (2 * len(small.attention) + 1) * case.gpu.link.latency
    yield Placement(f"joint: TP {ranks}", alone + 2 * one - saved, everywhere)
    half, fewer = ceil(case.load.requests / 2), ranks // 2
    both = case.seconds(base, fewer, half) + 2 * case.seconds(small, fewer, half)
    fit = case.fit((base, fewer, 1), *[(small, fewer, 1)] * 2, replicas=2) if fewer else 0
    yield Placement(f"engines: 2 x TP {fewer}", both, fit)
    for fewer in (m for m in (4, 2, 1) if m < ranks):
        one, part = case.seconds(small, fewer), fewer / ranks
        fit = case.fit((base, ranks, 1), *[(small, fewer, 1)] * 2)
        yield Placement(f"small TP {fewer}", alone + 2 * one + case.sending, fit)
        if 2 * fewer <= ranks:
            fit = case.fit((base, ranks, 1), (small, fewer, 1))
            yield Placement(f"pair 2 x TP {fewer}", alone + one + case.sending, fit)
        share = case.seconds(small, fewer, ceil(case.load.requests * part))
        fit = case.fit((base, ranks, 1), *[(small, fewer, part)] * 2)
        yield Placement(f"copies of TP {fewer}", alone + 2 * share + case.sending, fit)
    if ranks >= 4:
        large, little = ranks // 2, ranks // 4
        longest = max(case.seconds(base, large), case.seconds(small, little))
        fit = min(case.fit((base, large, 1)), case.fit((small, little, 1)))
        name = f"apart: base TP {large}, small TP {little}"
        yield Placement(name, longest + case.sending, fit)


def read(name: str) -> tuple[Shape, Shape, EngineSettings]:
    """Return the shapes of a set's base and expert, as `plan` reads them, in bfloat16."""
    with tempfile.TemporaryDirectory() as scratch:
        for role, shape in zip(("base", "expert"), SETS[name], strict=True):
            write_shape(Path(scratch, role), shape)
        members = {role: str(Path(scratch, role)) for role in ("base", "expert")}
        values = {**members, "antiexpert": members["expert"], "engine": {"dtype": "bfloat16"}}
        config = ProxyConfig.parse(values, name)
        found = read_all(config)
        engine = read_engine(config, found)
        base, expert, _ = read_shapes(config, found, engine)
    return base, expert, engine


def options() -> Parser:
    """Return the command line."""
    command = Parser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    linked = [name for name, gpu in GPUS.items() if gpu.link]
    command.add_argument("--gpu", default="H100-80G", choices=linked)
    command.add_argument("--gpus", type=positive, nargs="+", default=[2, 4, 8], metavar="N")
    command.add_argument(
        "--requests", type=positive, nargs="+", default=[1, 8, 64, 256], metavar="N"
    )
    command.add_argument("--context", type=positive, default=1024, help="tokens per request")
    command.add_argument(
        "--latency", type=float, metavar="US", help="of an all-reduce, in µs; plan's if not given"
    )
    return command


def main() -> None:
    """Print a table for each set of members and number of GPUs, and one JSON line."""
    arguments = options().parse_args()
    gpu = GPUS[arguments.gpu]
    if arguments.latency is not None:
        gpu = replace(gpu, link=replace(gpu.link, latency=arguments.latency * 1e-6))
    tables, results = [], []
    for name in SETS:
        base, small, engine = read(name)
        for ranks in arguments.gpus:
            loads = [Load(n, new=1, tokens=arguments.context) for n in arguments.requests]
            cases = [Case(base, small, ranks, load, engine, gpu) for load in loads]
            steps = [*zip(*map(placements, cases), strict=True)]  # by placement, then by load
            columns = [f"{load.requests} at once (ms, gain)" for load in loads]
            shown = table("placement", *columns, "fit", title=f"{name}, {ranks} x {gpu.name}")
            for same in steps:
                cells = map(_cell, same, steps[0], arguments.requests)
                shown.add_row(same[0].name, *cells, f"{same[0].fit:,}")
                results += [
                    {"members": name, "gpus": ranks, "requests": n, **_record(one, today)}
                    for one, today, n in zip(same, steps[0], arguments.requests, strict=True)
                ]
            tables.append(shown)
    finish("placement", arguments, tables, promised=PROMISED, results=results)


def _gain(one: Placement, today: Placement) -> float | None:
    """Return how much faster *one* is; None if one of them cannot be."""
    return None if inf in (one.seconds, today.seconds) else today.seconds / one.seconds - 1


def _cell(one: Placement, today: Placement, requests: int) -> str:
    if one.seconds == inf:
        return "heads do not divide"
    gain = _gain(one, today)
    text = f"{1e3 * one.seconds:.2f}" + ("" if gain is None else f" {gain:+.0%}")
    return text if one.fit >= requests else f"({text})"


def _record(one: Placement, today: Placement) -> dict[str, object]:
    seconds = None if one.seconds == inf else one.seconds
    gain = _gain(one, today)
    return {"placement": one.name, "seconds": seconds, "fit": one.fit, "gain": gain}


if __name__ == "__main__":
    main()
