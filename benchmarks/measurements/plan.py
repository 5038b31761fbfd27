"""How far `vllm-proxy plan` is from what is measured here.

`python benchmarks/measurements/plan.py`

Decode steps and prefills, predicted from this machine's measured bandwidth and arithmetic, and
measured, proxy-tuned and base alone in turn, and the ratio of the two. The prediction is a limit:
it does not count vLLM's scheduler, its messages, or kernel launches. That time is assumed to be the
same in every step. It is derived from one figure, the base's step with the fewest requests, and
added to all others: `with host`. Both errors are (predicted - measured) / measured.

The script also prints the paper's run times (arXiv 2401.08565: 512 tokens, one request at a time,
on A100s, the authors' code on transformers) and the plan's for the same members.
"""

import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from measurements.latency import seconds
from shared.members import LLAMA_7B, LLAMA_13B, LLAMA_70B, Members, prepare, write_shape
from shared.options import Parser, parser, positive, require_device
from shared.report import Spread, finish, ratios, spread, table
from shared.systems import BASE, PROXY, start_base, start_proxy
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.preflight.plan import HERE, Demand, plan
from vllm_proxy.preflight.plan.cost import EngineSettings, Load, step, total
from vllm_proxy.preflight.plan.hardware import Hardware, find_hardware
from vllm_proxy.preflight.plan.layout import Layout
from vllm_proxy.preflight.plan.read import read_all, read_engine, read_shapes
from vllm_proxy.preflight.plan.shape import Shape

RATIO = "ratio"


class Paper(NamedTuple):
    """Seconds for 512 tokens: the large model after its own fine-tuning, and proxy-tuned."""

    base: dict[str, int]
    pp: int
    alone: float
    proxy: float


PAPER_TOKENS = 512
PAPER = {
    "Llama-2 13B": Paper(LLAMA_13B, 1, 16.35, 41.55),
    # as many GPUs as hold it; layers one after the other, as transformers places them
    "Llama-2 70B": Paper(LLAMA_70B, 4, 55.73, 88.17),
}


@dataclass
class Point:
    """One kind of step: *load*, and what it took in each round, by system, in seconds."""

    name: str
    load: Load
    predicted: dict[str, float]
    measured: dict[str, list[float]]


class Row(NamedTuple):
    """One line of the table: milliseconds, or ratios; *with_host* None where it was found."""

    point: str
    system: str
    measured: Spread
    predicted: float
    with_host: float | None

    def error(self, predicted: float | None) -> float | None:
        """Return how far a prediction is off."""
        return None if predicted is None else predicted / self.measured.median - 1


def options() -> Parser:
    """Return the command line."""
    command = parser(__doc__)
    command.add_argument("--at-once", nargs="+", type=positive, default=[1, 16, 64], metavar="N")
    command.add_argument("--context", type=positive, default=64, help="tokens per prompt")
    command.add_argument("--prompt-tokens", nargs="+", type=positive, default=[256, 1024])
    command.add_argument("--tokens", type=positive, default=16, help="generated tokens per request")
    return command


def read(members: Members) -> tuple[list[Shape], EngineSettings]:
    """Return the shapes as `vllm-proxy plan` reads them."""
    engine = {**members.config.engine, "dtype": members.dtype}
    config = members.config.model_copy(update={"engine": engine})
    found = read_all(config)
    settings = read_engine(config, found)
    return read_shapes(config, found, settings, here=True), settings


def points(
    arguments: Any, shapes: list[Shape], engine: EngineSettings, here: Hardware
) -> list[Point]:
    """Return what is measured, with its predictions."""
    # A request's context while it decodes, on average.
    context = arguments.context + arguments.tokens // 2
    loads = {f"step of {n}": Load(n, new=1, tokens=context) for n in sorted(arguments.at_once)}
    loads |= {f"prefill of {n}": Load(1, new=n, tokens=n) for n in arguments.prompt_tokens}
    alone = [shape for shape in shapes if shape.role == "base"]
    return [
        Point(
            name,
            load,
            {
                system: total(step(which, Layout(), load, engine, here)).seconds
                for system, which in ((PROXY, shapes), (BASE, alone))
            },
            {PROXY: [], BASE: []},
        )
        for name, load in loads.items()
    ]


def measure(arguments: Any, members: Members, device: str, found: list[Point]) -> None:
    """Fill in *found*: systems take turns; the first round warms up."""
    engine = {"enforce_eager": arguments.eager, "max_num_batched_tokens": 8192}
    systems = [start_proxy(members, device, **engine), start_base(members, device, **engine)]
    turns = tqdm(total=len(found) * (arguments.repeats + 1) * 2, unit="turn")
    for turn in range(arguments.repeats + 1):
        for point in found:
            decodes = point.load.new == 1
            length = arguments.context if decodes else point.load.new
            prompts = [
                [5 + i] + [3 + j % 500 for j in range(length - 1)]
                for i in range(point.load.requests)
            ]
            for system in systems:
                first, further = seconds(system, prompts, arguments.tokens if decodes else 2)
                turns.update()
                if turn:
                    point.measured[system.name].append(further if decodes else first)
    turns.close()
    for system in systems:
        system.stop()


def rows(found: list[Point]) -> tuple[list[Row], float]:
    """Return the table's lines, and the host's milliseconds a step."""
    first = found[0]
    host = spread(first.measured[BASE]).median - first.predicted[BASE]
    result = []
    for point in found:
        for system in (PROXY, BASE):
            measured = spread(1e3 * one for one in point.measured[system])
            predicted = 1e3 * point.predicted[system]
            known = point is first and system == BASE
            with_host = None if known else predicted + 1e3 * host
            result.append(Row(point.name, system, measured, predicted, with_host))
        proxy, base = (point.predicted[system] for system in (PROXY, BASE))
        measured = ratios(point.measured[PROXY], point.measured[BASE])
        with_host = (proxy + host) / (base + host)
        result.append(Row(point.name, RATIO, measured, proxy / base, with_host))
    return result, 1e3 * host


def paper() -> list[dict[str, Any]]:
    """Return the authors' times per token next to the plan's for the bandwidth of one A100."""
    found = []
    with tempfile.TemporaryDirectory() as directory:
        small = str(Path(directory, "7b"))
        write_shape(Path(small), LLAMA_7B)
        for name, run in PAPER.items():
            base = str(Path(directory, name))
            write_shape(Path(base), run.base)
            config = ProxyConfig.parse(
                {"base": base, "expert": small, "antiexpert": small}
                | {"engine": {"dtype": "bfloat16"}},
                name,
            )
            demand = Demand(1, PAPER_TOKENS, PAPER_TOKENS)
            choice = plan(config, "A100-80G", demand, tp=1, pp=run.pp).throughput
            alone, proxy = choice.base.step_seconds, choice.proxy.step_seconds
            found.append(
                {
                    "members": f"{name} with two 7B",
                    "ms_per_token": [1e3 * t / PAPER_TOKENS for t in (run.alone, run.proxy)],
                    "least_ms": [1e3 * alone, 1e3 * proxy],
                    "times_the_least": [
                        run.alone / PAPER_TOKENS / alone,
                        run.proxy / PAPER_TOKENS / proxy,
                    ],
                    "ratio": run.proxy / run.alone,
                    "least_ratio": proxy / alone,
                }
            )
    return found


def paper_table(found: list[dict[str, Any]]) -> Any:
    """Return the paper's figures next to the plan's."""
    shown = table(
        *("members", "authors' code (ms/token)", "plan (ms/token)", "times the plan"),
        *("authors' ratio", "plan's ratio"),
        title="arXiv 2401.08565, A100, one request: large model alone / proxy-tuned",
    )
    for one in found:
        pairs = (one[key] for key in ("ms_per_token", "least_ms", "times_the_least"))
        cells = ("{:.3g} / {:.3g}".format(*pair) for pair in pairs)
        shown.add_row(one["members"], *cells, f"{one['ratio']:.2f}", f"{one['least_ratio']:.2f}")
    return shown


def main() -> None:
    """Measure, print tables, and one JSON line with everything."""
    command = options()
    arguments = command.parse_args()
    if arguments.tokens < 2:
        command.error("--tokens 1: at least 2 are needed, for there to be a further one")
    device = require_device(command, arguments.device)
    members = prepare(command, arguments.models, arguments.dtype, device, reference=False)
    longest = max(arguments.context, *arguments.prompt_tokens)
    members.require_context(command, longest + arguments.tokens)
    shapes, engine = read(members)
    here = find_hardware(HERE, arguments.dtype)
    found = points(arguments, shapes, engine, here)
    measure(arguments, members, device, found)
    lines, host = rows(found)
    shown = table(
        *("", "", "measured", "plan", "error", "with host", "error"),
        title=f"{arguments.models}, {arguments.dtype}: ms, and proxy-tuned over base alone",
    )
    for line in lines:
        cells = [str(line.measured)]
        for value in (line.predicted, line.with_host):
            error = line.error(value)
            cells += ["", ""] if value is None else [f"{value:.2f}", f"{error:+.0%}"]
        shown.add_row(line.point, line.system, *cells)
    authors = paper()
    finish(
        "plan",
        arguments,
        [shown, paper_table(authors)],
        results=[
            {
                **line._asdict(),
                "error": line.error(line.predicted),
                "error_with_host": line.error(line.with_host),
            }
            for line in lines
        ],
        host_ms=host,
        roofline=asdict(here.roofline),
        paper=authors,
    )


if __name__ == "__main__":
    main()
