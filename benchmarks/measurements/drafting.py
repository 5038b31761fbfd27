"""What drafts by the expert save.

`python benchmarks/measurements/drafting.py --models profiles-10x`

A few requests at a time describe cities of countries that no small member was trained on. The base
alone, the proxy, and the proxy with K drafts before each pass answer them in turn. Next to each
measured time is the time that weight bytes predict: a pass reads all members, a draft reads the
expert, and each pass yields as many tokens as were really accepted. Timers in the worker show how
much of a pass is drafting, which explains differences between the two. On a GPU the timers wait for
the device, around each step and each draft of all systems. `--adapt` adds an engine that chooses
the number of drafts; with members whose expert predicts nothing (smollm2) it should be as fast as
without drafts. `--random N` replaces N questions by prompts of random ids, whose continuations the
expert hardly predicts.
"""

import sys
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from tqdm import tqdm
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from shared.members import Members, prepare
from shared.options import Parser, parser, positive, require_device
from shared.report import finish, ratios, spread, table
from shared.systems import System, ask, start_base, start_proxy, worker_extension
from shared.workload import Request, Workload

PROCESSES = 2**30
"""Bytes of an engine's processes in addition to weights and KV cache."""
KV_BYTES = 2**28
"""Bytes of each engine's KV cache where engines are side by side in a CPU's memory."""
_PREFIX = "vllm:spec_decode_num_"


class Counts(NamedTuple):
    """What happened in an engine since it started.

    Attributes:
        steps: of the engine, whatever ran in them.
        seconds: in the worker.
        drafting: seconds of them.
        passes: with drafts, of one request each.
        drafted: tokens.
        accepted: of these.
    """

    steps: float
    seconds: float
    drafting: float
    passes: float
    drafted: float
    accepted: float

    def since(self, before: "Counts") -> "Counts":
        """Return what happened since *before*."""
        return Counts(*(now - then for now, then in zip(self, before, strict=True)))


class Way(NamedTuple):
    """A way to answer: K drafts before each pass (None: the base alone), or as many as pay."""

    drafts: int | None
    adapt: bool = False


ALONE, PLAIN = Way(None), Way(0)


def counts(engine: Any) -> Counts:
    """Return what happened so far, where the engine is."""
    found = {
        metric.name.removeprefix(_PREFIX): metric.value
        for metric in engine.llm.get_metrics()
        if metric.name.startswith(_PREFIX) and hasattr(metric, "value")
    }
    steps, seconds = ask(engine, "timers")
    return Counts(
        steps,
        seconds["runner"],
        seconds.get("drafting", 0.0),
        found.get("drafts", 0),
        found.get("draft_tokens", 0),
        found.get("accepted_tokens", 0),
    )


def requests_of(members: Members, arguments: Namespace) -> list[Request]:
    """Return as many requests as are asked for; some of them, here and there, of random ids."""
    from experiments.gap.profiles import profiles

    tokenizer = AutoTokenizer.from_pretrained(members.config.base.model)
    items, tokens = profiles().test[: arguments.requests], arguments.tokens
    requests = [Request(tokenizer(item.prompt).input_ids, tokens) for item in items]
    length = len(requests[0].prompt)
    workload = Workload((length, length), (tokens, tokens))
    drawn = workload.draw(arguments.random, members.vocab_size, arguments.seed)
    for i, request in enumerate(drawn):
        requests[i * len(requests) // len(drawn)] = request
    return requests


def expected(members: Members, way: Way, tokens_a_pass: float | None) -> float:
    """Return tokens a second over the base's, by bytes of weights alone."""
    if way == ALONE:
        return 1.0
    read = members.bytes_read() + way.drafts * members.bytes_read("expert")
    return (tokens_a_pass or 1.0) * members.bytes_read("base") / read


def start_all(
    members: Members, device: str, ways: Iterable[Way], **engine: object
) -> dict[Way, System]:
    """Start an engine for each way."""
    engine |= {
        "disable_log_stats": False,
        "worker_extension_cls": worker_extension("shared.timers.Timers"),
    }
    systems: dict[Way, System] = {}
    for way in ways:
        if way == ALONE:
            systems[way] = start_base(members, device, **engine)
        else:
            systems[way] = start_proxy(
                members, device, drafts=way.drafts, adapt=way.adapt, **engine
            )
    for system in systems.values():
        system.call(ask, "time_step")
    return systems


def require_memory(command: Parser, members: Members, engines: int) -> None:
    """End the program with one line if the engines do not fit into memory together."""
    # On a CPU, products keep weights in a layout of their own, and loading holds both for a while.
    needed = engines * (2 * members.bytes_of() + members.kv_bytes + PROCESSES)
    if needed > (there := psutil.virtual_memory().available):
        command.error(
            f"--drafts: {engines} engines take {needed / 2**30:.0f} GiB, {there / 2**30:.0f} GiB "
            "are free; give fewer numbers of drafts at a time"
        )


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def options() -> Parser:
    """Return the command line."""
    command = parser(__doc__, models="profiles-10x")
    command.add_argument("--at-once", nargs="+", type=positive, default=[1, 4], metavar="N")
    command.add_argument("--drafts", nargs="+", type=positive, default=[4], metavar="K")
    command.add_argument(
        "--adapt", action="store_true", help="add an engine that chooses the number of drafts"
    )
    command.add_argument(
        "--running", type=positive, metavar="N", help="run at most N requests; others wait"
    )
    command.add_argument("--requests", type=positive, default=12, metavar="N")
    command.add_argument(
        "--random",
        type=positive,
        default=0,
        metavar="N",
        help="replace N questions by random prompts",
    )
    command.add_argument("--tokens", type=positive, default=48, help="tokens per answer")
    return command


def main() -> None:
    """Measure, print a table, and one JSON line with everything."""
    command = options()
    arguments = command.parse_args()
    if arguments.random > arguments.requests:
        command.error(
            f"--random: {arguments.random} of {arguments.requests} requests; ask for fewer, or for "
            "more --requests"
        )
    device = require_device(command, arguments.device)
    members = prepare(command, arguments.models, arguments.dtype, device, reference=False)
    ways = [ALONE, PLAIN, *map(Way, arguments.drafts)]
    if arguments.adapt:
        ways.append(Way(max(arguments.drafts), adapt=True))
    if device == "cpu":
        members.kv_bytes = KV_BYTES
        require_memory(command, members, len(ways))
    requests = requests_of(members, arguments)
    if len(requests) < arguments.requests:
        command.error(f"--requests: {arguments.requests}; there are {len(requests)} questions")
    running = {"max_num_seqs": arguments.running} if arguments.running else {}
    systems = start_all(members, device, ways, enforce_eager=arguments.eager, **running)
    size = members.bytes_read("base") / members.bytes_read("expert")
    shown = table(
        *("at once", "system", "tokens/s", "over base", "expected", "over plain"),
        *("tokens a pass", "accepted", "drafts", "ms a step", "of it a draft", "same answers"),
        title=f"{arguments.models}, {arguments.dtype}; the base reads {size:.1f} times the expert",
    )
    results = []
    for at_once in arguments.at_once:
        for system in systems.values():
            system.answer(requests[:at_once], at_once)
        before = {way: system.call(counts) for way, system in systems.items()}
        times: dict[Way, list[float]] = {way: [] for way in systems}
        tokens = {}
        for _ in tqdm(range(arguments.repeats), f"{at_once} at once", unit="round", leave=False):
            for way, system in systems.items():
                answer = system.answer(requests, at_once)
                times[way].append(answer.seconds_per_token)
                tokens[way] = answer.tokens
        generated = arguments.repeats * len(requests) * (arguments.tokens - 1)  # after prefills
        for way, system in systems.items():
            found, drafts = system.call(counts).since(before[way]), way.drafts
            fixed = (
                drafts and not way.adapt
            )  # else passes have different numbers of drafts, or none
            a_pass = generated / found.passes if fixed else None
            result = {
                "at_once": at_once,
                "system": system.name,
                **way._asdict(),
                "tokens_per_second": spread(1 / t for t in times[way]),
                "over_base": ratios(times[ALONE], times[way]),
                "expected_over_base": None if way.adapt else expected(members, way, a_pass),
                "over_plain": ratios(times[PLAIN], times[way]),
                "tokens_a_pass": a_pass,
                "accepted": found.accepted / found.drafted if found.drafted else None,
                "drafts_a_step": found.drafted / found.steps,
                "ms_a_step": 1e3 * found.seconds / found.steps,
                "ms_a_draft": 1e3 * found.drafting / found.steps / drafts if fixed else None,
                "same_answers": sum(
                    a == b for a, b in zip(tokens[way], tokens[PLAIN], strict=True)
                ),
            }
            results.append(result)
            shown.add_row(
                str(at_once),
                system.name,
                str(result["tokens_per_second"]),
                "" if way == ALONE else f"{result['over_base']}x",
                _shown(result["expected_over_base"], "{:.2f}x") if way != ALONE else "",
                f"{result['over_plain']}x" if drafts else "",
                _shown(a_pass, "{:.2f}"),
                _shown(result["accepted"], "{:.0%}"),
                f"{result['drafts_a_step'] / at_once:.2f}" if drafts else "",
                f"{result['ms_a_step']:.1f}",
                _shown(result["ms_a_draft"], "{:.1f}"),
                f"{result['same_answers']}/{len(requests)}" if drafts else "",
            )
    for system in systems.values():
        system.stop()
    finish("drafting", arguments, [shown], results=results, weight_bytes=members.bytes_of())


if __name__ == "__main__":
    main()
