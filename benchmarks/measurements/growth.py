"""How the time and memory of a step grow: proxy-tuned and base alone.

`python benchmarks/measurements/growth.py`

By the number of requests, the context length, the vocabulary and the tensor-parallel ranks, as a
table and, with `--plot FILE`, a picture. Members have random weights (the `vocabulary-N` sets of
`members.py`). Time is that of a decode step; memory is what the system's processes, or the GPU,
hold.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from measurements.latency import seconds
from shared.members import VOCABULARIES, prepare
from shared.options import Parser, parser, positive, require_device
from shared.report import Spread, finish, ratios, spread, table
from shared.systems import BASE, PROXY, start_base, start_proxy

TOKENS = 16
DEFAULT = {"at once": 4, "context": 64, "vocabulary": VOCABULARIES[0], "ranks": 1}
"""What a point has that is not about that."""


@dataclass
class Point:
    """One load on one engine; *axis* is what it is a point of."""

    axis: str
    value: int
    load: dict[str, int]
    step_ms: dict[str, Spread] = field(default_factory=dict)
    mib: dict[str, float] = field(default_factory=dict)
    over_base: Spread | None = None
    bytes_ratio: float = 0.0


def points(axes: dict[str, list[int]]) -> Iterator[Point]:
    """Yield every axis' points."""
    for axis, values in axes.items():
        for value in values:
            yield Point(axis, value, DEFAULT | {axis: value})


def memory(engine: Any) -> float:
    """Return the MiB that an engine's processes hold for themselves, or that its GPU holds."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**20
    here = psutil.Process()
    return sum(p.memory_full_info().uss for p in (here, *here.children(recursive=True))) / 2**20


def measure(command: Parser, arguments: Any, device: str, found: list[Point]) -> None:
    """Fill in *found*: engines are started once for every vocabulary and number of ranks."""
    loads = {}
    for point in found:
        loads.setdefault((point.load["vocabulary"], point.load["ranks"]), []).append(point)
    progress = tqdm(total=len(found) * (arguments.repeats + 1), unit="round")
    for (vocabulary, ranks), group in loads.items():
        name = f"vocabulary-{vocabulary}"
        members = prepare(command, name, arguments.dtype, device, reference=False)
        members.require_context(command, max(arguments.context) + TOKENS)
        engine = {"enforce_eager": arguments.eager, "tensor_parallel_size": ranks}
        systems = [start_proxy(members, device, **engine), start_base(members, device, **engine)]
        for point in group:
            prompts = [[5 + i] * point.load["context"] for i in range(point.load["at once"])]
            rounds = []
            for _ in range(arguments.repeats + 1):
                rounds.append({s.name: seconds(s, prompts, TOKENS)[1] for s in systems})
                progress.update()
            for system in systems:
                own = [1e3 * one[system.name] for one in rounds[1:]]
                point.step_ms[system.name] = spread(own)
                point.mib[system.name] = system.call(memory)
            point.bytes_ratio = members.bytes_ratio
            point.over_base = ratios(*([one[name] for one in rounds[1:]] for name in (PROXY, BASE)))
        for system in systems:
            system.stop()
    progress.close()


def plot(found: list[Point], path: Path) -> None:
    """Draw time and memory against every axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = list(dict.fromkeys(point.axis for point in found))
    figure, grid = pyplot.subplots(
        2, len(axes), figsize=(3.4 * len(axes), 6), squeeze=False, layout="constrained"
    )
    for column, axis in zip(grid.T, axes, strict=True):
        own = [point for point in found if point.axis == axis]
        values = [point.value for point in own]
        for name, color in ((PROXY, "tab:blue"), (BASE, "tab:gray")):
            times = [point.step_ms[name] for point in own]
            medians = [time.median for time in times]
            ends = [[t.median - t.least for t in times], [t.most - t.median for t in times]]
            column[0].errorbar(values, medians, ends, label=name, color=color, marker="o")
            column[1].plot(values, [p.mib[name] for p in own], color=color, marker="o")
        for chart in column:
            chart.set_xscale("log", base=2)
            chart.set_xticks(values, map(str, values))
            chart.set_ylim(bottom=0)
            chart.set_xlabel(axis)
    grid[0][0].set_ylabel("ms a decode step")
    grid[1][0].set_ylabel("memory (MiB)")
    grid[0][0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print a table, draw, and print one JSON line with everything."""
    command = parser(__doc__, models=None)
    command.add_argument("--at-once", nargs="+", type=positive, default=[1, 4, 16, 64])
    command.add_argument("--context", nargs="+", type=positive, default=[64, 256, 1024])
    command.add_argument(
        "--vocabulary", nargs="+", type=int, choices=VOCABULARIES, default=list(VOCABULARIES)
    )
    command.add_argument("--ranks", nargs="+", type=positive, default=[1, 2])
    command.add_argument("--plot", type=Path, metavar="FILE", help="where to draw, a .png or .svg")
    arguments = command.parse_args()
    device = require_device(command, arguments.device)
    there = torch.cuda.device_count() if device == "cuda" else os.cpu_count()
    if max(arguments.ranks) > there:
        command.error(f"--ranks {max(arguments.ranks)}: there are {there} of {device}; use fewer")
    axes = {
        "at once": arguments.at_once,
        "context": arguments.context,
        "vocabulary": arguments.vocabulary,
        "ranks": arguments.ranks,
    }
    found = list(points(axes))
    measure(command, arguments, device, found)
    shown = table(
        *("against", "", "proxy (ms/step)", "base (ms/step)", "time over base", "weights"),
        *("proxy (MiB)", "base (MiB)"),
        title=f"growth, {arguments.dtype}",
    )
    for point in found:
        cells = [*(str(point.step_ms[name]) for name in (PROXY, BASE)), str(point.over_base)]
        cells.append(f"{point.bytes_ratio:.2f}")
        sizes = (f"{point.mib[name]:.0f}" for name in (PROXY, BASE))
        shown.add_row(point.axis, str(point.value), *cells, *sizes)
    if arguments.plot:
        plot(found, arguments.plot)
    finish("growth", arguments, [shown], points=[vars(point) for point in found])


if __name__ == "__main__":
    main()
