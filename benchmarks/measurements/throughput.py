"""Tokens per second: proxy-tuned, base alone, the authors' way.

`python benchmarks/measurements/throughput.py`

Requests of mixed prompt and output lengths, N at once. All systems answer the same requests, in
turn, in every round. Times are of whole batches, prompts included, per generated token. The ratio
to reach is that of bytes: what a decode step reads of all members' weights, and reads and writes of
the running requests' states if layers are recurrent, divided by the same for the base. On demand
also: up to K drafts by the expert (the prompts are random, so hardly any draft is accepted;
`drafting.py` has a task), and an expert that is an adapter, in one pass.
"""

import sys
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from measurements.one_pass import paired
from measurements.reference import best_batch_size
from shared.members import Members, prepare
from shared.options import Parser, add_lengths, parser, positive, require_device
from shared.report import finish, ratios, spread, table
from shared.systems import (
    BASE,
    ONE_PASS,
    PROXY,
    REFERENCE,
    System,
    count_cpu_time,
    start_base,
    start_proxy,
    start_reference,
)
from shared.workload import Answer, Request, Workload
from vllm_proxy.preflight.plan.roofline import Roofline, measure


def run(
    systems: list[System], requests: list[Request], at_once: int, batch_size: int, repeats: int
) -> list[dict[str, Answer]]:
    """Return every round's answers, by system."""
    rounds: list[dict[str, Answer]] = [{} for _ in range(repeats)]
    turns = [(answers, system) for answers in rounds for system in systems]
    for answers, system in tqdm(turns, f"{at_once} at once", unit="turn", leave=False):
        size = batch_size if system.name == REFERENCE else at_once
        answers[system.name] = system.answer(requests, size)
    return rounds


def least_seconds(
    roofline: Roofline, members: Members, requests: list[Request], at_once: int, name: str
) -> float:
    """Return what the device needs at least for *requests*, each weight read once a step.

    A group takes as many steps as its longest request has tokens; its prompts are the first one.
    """
    read, states, total = bytes_read(members, name), state_bytes(members, name), 0.0
    kv_roles = ("base",) if name == BASE else ()
    for start in range(0, len(requests), at_once):
        group = requests[start : start + at_once]
        for step in range(max(request.tokens for request in group)):
            running = [request for request in group if request.tokens > step]
            rows = sum(len(request.prompt) for request in group) if step == 0 else len(running)
            cached = sum(len(request.prompt) + step for request in running)
            kv = cached * members.kv_bytes_per_token(*kv_roles) + states * len(running)
            total += roofline.seconds(read + kv, 2 * rows * read / members.itemsize)
    return total


def bytes_read(members: Members, name: str) -> int:
    """Return what a decode step of a system reads of weights; an adapter's are left out."""
    roles = {BASE: ("base",), ONE_PASS: ("base", "antiexpert")}
    return members.bytes_read(*roles.get(name, ()))


def state_bytes(members: Members, name: str) -> int:
    """Return what a decode step of a system reads and writes of the states of one request."""
    return 2 * members.state_bytes(*(("base",) if name == BASE else ()))


def bytes_ratio(members: Members, name: str, requests: list[Request], at_once: int) -> float:
    """Return the bytes of a system's mean decode step over those of the base alone."""
    groups = [requests[i : i + at_once] for i in range(0, len(requests), at_once)]
    steps = sum(max(request.tokens for request in group) for group in groups)
    running = sum(request.tokens for request in requests) / steps

    def read(name: str) -> float:
        return bytes_read(members, name) + running * state_bytes(members, name)

    return read(name) / read(BASE)


def agreeing(one: Answer, other: Answer) -> int:
    """Return how many requests got the same tokens."""
    return sum(a == b for a, b in zip(one.tokens, other.tokens, strict=True))


def options() -> Parser:
    """Return the command line."""
    command = parser(__doc__)
    command.add_argument("--at-once", nargs="+", type=positive, default=[1, 64], metavar="N")
    add_lengths(command)
    command.add_argument(
        "--least-requests", type=positive, default=4, help="requests per round, even with 1 at once"
    )
    command.add_argument(
        "--cpu-time",
        action="store_true",
        help="one thread a system, and its processor time (for a machine with other work)",
    )
    command.add_argument("--no-reference", action="store_true", help="leave transformers out")
    command.add_argument(
        "--drafts", type=positive, metavar="K", help="also run with up to K drafts"
    )
    command.add_argument("--one-pass", action="store_true", help="also run an adapter in one pass")
    return command


def main() -> None:
    """Measure, print a table, and one JSON line with everything."""
    command = options()
    arguments = command.parse_args()
    device = require_device(command, arguments.device)
    with_reference = not arguments.no_reference
    if arguments.cpu_time:
        count_cpu_time()
    members = prepare(
        *(command, arguments.models, arguments.dtype, device),
        reference=with_reference,
        at_once=max(arguments.at_once),
    )
    members.require_context(command, max(arguments.prompt_tokens) + max(arguments.output_tokens))
    adapted = paired(command, members) if arguments.one_pass else None
    workload = Workload(arguments.prompt_tokens, arguments.output_tokens)
    roofline = measure(device, arguments.dtype)
    engine = {"enforce_eager": arguments.eager}
    systems = [start_proxy(members, device, **engine), start_base(members, device, **engine)]
    if arguments.drafts:
        systems.append(start_proxy(members, device, drafts=arguments.drafts, adapt=True, **engine))
    if adapted is not None:
        systems.append(start_proxy(adapted, device, name=ONE_PASS, **engine))
    if with_reference:
        systems.append(start_reference(members, device))
    shown = table(
        *("at once", "system", "tokens/s", "ms/token", "over base", "bytes", "over loop"),
        "roofline",
        title=f"{arguments.models}, {arguments.dtype}",
    )
    results = []
    for at_once in arguments.at_once:
        count = max(at_once, arguments.least_requests)
        requests = workload.draw(count, members.vocab_size, arguments.seed)
        warm_up = [Request(r.prompt[:16], 4) for r in requests]
        batch_size = 1
        for system in systems:
            if system.name == REFERENCE:
                batch_size = best_batch_size(system, requests)
            else:
                system.answer(warm_up, at_once)
        rounds = run(systems, requests, at_once, batch_size, arguments.repeats)
        times = {s.name: [r[s.name].seconds_per_token for r in rounds] for s in systems}
        total = sum(request.tokens for request in requests)
        for name, own in times.items():
            ms = spread(1e3 * t for t in own)
            over_base = ratios(own, times[BASE])
            faster = ratios(times[REFERENCE], own) if REFERENCE in times else None
            ratio = bytes_ratio(members, name, requests, at_once)
            least = least_seconds(roofline, members, requests, at_once, name)
            part = 1e3 * least / total / ms.median
            shown.add_row(
                str(at_once),
                f"{name}, {batch_size} a batch" if name == REFERENCE else name,
                f"{1e3 / ms.median:.1f}",
                str(ms),
                str(over_base),
                f"{ratio:.2f}",
                "" if faster is None else f"{faster}x",
                f"{part:.0%}",
            )
            results.append(
                {
                    "at_once": at_once,
                    "system": name,
                    "batch_size": batch_size if name == REFERENCE else None,
                    "ms_per_token": ms,
                    "over_base": over_base,
                    "bytes_ratio": ratio,
                    "times_the_loop": faster,
                    "of_roofline": part,
                    "rows_as_the_proxy": agreeing(rounds[0][name], rounds[0][PROXY]),
                    "requests": len(requests),
                }
            )
    for system in systems:
        system.stop()
    finish("throughput", arguments, [shown], results=results, roofline=asdict(roofline))


if __name__ == "__main__":
    main()
