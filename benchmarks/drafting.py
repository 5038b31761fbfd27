"""What drafts by the expert save: `python benchmarks/drafting.py --models profiles-10x`.

Few requests at a time describe cities of countries that no small member was trained on. Answered by
the base alone, proxy-tuned, and proxy-tuned with so many drafts before each pass, in turn. Beside
what is measured stands what weight bytes let expect: a pass reads all members, a draft the expert,
and as many tokens come of a pass as there really came. Timers in the worker tell what of a pass is
drafting, so that where the two differ it can be seen why. On a GPU they wait for the device, around
each step and each draft of all systems.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import psutil
import timers
from members import Members, prepare
from options import Parser, parser, positive, require_device
from report import finish, ratios, spread, table
from systems import BASE, Request, System, start_base, start_proxy
from tqdm import tqdm
from transformers import AutoTokenizer

PROCESSES = 2**30
"""Bytes that an engine's processes take beside weights and KV cache."""
KV_BYTES = 2**27
"""Bytes of each engine's KV cache where engines are side by side in a CPU's memory."""
_PREFIX = "vllm:spec_decode_num_"


class Counts(NamedTuple):
    """What happened in an engine since it started.

    Attributes:
        steps: of the engine, whatever ran in them.
        seconds: in the worker.
        drafting: seconds of them.
        passes: with drafts, of one request each.
        accepted: drafts.
    """

    steps: float
    seconds: float
    drafting: float
    passes: float
    accepted: float

    def since(self, before: "Counts") -> "Counts":
        """Return what happened since *before*."""
        return Counts(*(now - then for now, then in zip(self, before, strict=True)))


def start_timers(engine: Any) -> None:
    """Start timing, where the engine is."""
    engine.llm.collective_rpc("time_step")


def counts(engine: Any) -> Counts:
    """Return what happened so far, where the engine is."""
    found = {
        metric.name.removeprefix(_PREFIX): metric.value
        for metric in engine.llm.get_metrics()
        if metric.name.startswith(_PREFIX) and hasattr(metric, "value")
    }
    steps, seconds = engine.llm.collective_rpc("timers")[0]
    return Counts(
        steps,
        seconds["runner"],
        seconds.get("drafting", 0.0),
        found.get("drafts", 0),
        found.get("accepted_tokens", 0),
    )


def requests_of(members: Members, count: int, tokens: int) -> list[Request]:
    """Return *count* requests for *tokens* each."""
    from gap.profiles import profiles

    tokenizer = AutoTokenizer.from_pretrained(members.config.base.model)
    items = profiles().test[:count]
    return [Request(tokenizer(item.prompt).input_ids, tokens) for item in items]


def expected(members: Members, drafts: int, tokens_a_pass: float) -> float:
    """Return tokens a second over the base's, by bytes of weights alone."""
    read = members.bytes_read() + drafts * members.bytes_read("expert")
    return tokens_a_pass * members.bytes_read("base") / read


def start_all(
    members: Members, device: str, drafts: Iterable[int], **engine: object
) -> dict[int | None, System]:
    """Start the base (None), proxy-tuned (0), and with so many drafts."""
    engine |= {"disable_log_stats": False, "worker_extension_cls": timers.extension()}
    systems: dict[int | None, System] = {None: start_base(members, device, **engine)}
    for tokens in (0, *drafts):
        systems[tokens] = start_proxy(members, device, drafts=tokens, **engine)
    for system in systems.values():
        system.call(start_timers)
    return systems


def require_memory(command: Parser, members: Members, engines: int) -> None:
    """End the program by one line if so many engines do not fit the memory side by side."""
    # On a CPU, products keep weights in a layout of their own, and loading holds both for a while.
    needed = engines * (2 * members.bytes_of() + members.kv_bytes + PROCESSES)
    if needed > (there := psutil.virtual_memory().available):
        command.error(
            f"--drafts: {engines} engines take {needed / 2**30:.0f} GiB, {there / 2**30:.0f} GiB "
            "are free; give fewer numbers of drafts at a time"
        )


def options() -> Parser:
    """Return the command line."""
    command = parser(__doc__, models="profiles-10x")
    command.add_argument("--at-once", nargs="+", type=positive, default=[1, 4], metavar="N")
    command.add_argument("--drafts", nargs="+", type=positive, default=[4], metavar="K")
    command.add_argument("--requests", type=positive, default=12, metavar="N")
    command.add_argument("--tokens", type=positive, default=48, help="of each answer")
    return command


def main() -> None:
    """Measure, print a table, and one JSON line with everything."""
    command = options()
    arguments = command.parse_args()
    device = require_device(command, arguments.device)
    members = prepare(command, arguments.models, arguments.dtype, device, reference=False)
    if device == "cpu":
        members.kv_bytes = KV_BYTES
        require_memory(command, members, len(arguments.drafts) + 2)
    requests = requests_of(members, arguments.requests, arguments.tokens)
    systems = start_all(members, device, arguments.drafts, enforce_eager=arguments.eager)
    size = members.bytes_read("base") / members.bytes_read("expert")
    shown = table(
        *("at once", "system", "tokens/s", "over base", "expected", "over plain"),
        *("tokens a pass", "accepted", "ms a step", "of it a draft", "same answers"),
        title=f"{arguments.models}, {arguments.dtype}; the base reads {size:.1f} times the expert",
    )
    results = []
    for at_once in arguments.at_once:
        for system in systems.values():
            system.answer(requests[:at_once], at_once)
        before = {key: system.call(counts) for key, system in systems.items()}
        times: dict[int | None, list[float]] = {key: [] for key in systems}
        tokens = {}
        for _ in tqdm(range(arguments.repeats), f"{at_once} at once", unit="round", leave=False):
            for key, system in systems.items():
                answer = system.answer(requests, at_once)
                times[key].append(answer.seconds_per_token)
                tokens[key] = answer.tokens
        generated = arguments.repeats * len(requests) * (arguments.tokens - 1)  # after prefills
        for key, system in systems.items():
            found = system.call(counts).since(before[key])
            a_pass = generated / found.passes if key else 1.0
            result = {
                "at_once": at_once,
                "system": system.name,
                "drafts": key,
                "tokens_per_second": spread(1 / t for t in times[key]),
                "over_base": ratios(times[None], times[key]),
                "expected_over_base": 1.0 if key is None else expected(members, key, a_pass),
                "over_plain": ratios(times[0], times[key]),
                "tokens_a_pass": a_pass,
                "accepted": found.accepted / found.passes / key if key else None,
                "ms_a_step": 1e3 * found.seconds / found.steps,
                "ms_a_draft": 1e3 * found.drafting / found.steps / key if key else None,
                "same_answers": sum(a == b for a, b in zip(tokens[key], tokens[0], strict=True)),
            }
            results.append(result)
            shown.add_row(
                str(at_once),
                system.name,
                str(result["tokens_per_second"]),
                "" if system.name == BASE else f"{result['over_base']}x",
                "" if system.name == BASE else f"{result['expected_over_base']:.2f}x",
                f"{result['over_plain']}x" if key else "",
                f"{a_pass:.2f}" if key else "",
                f"{result['accepted']:.0%}" if key else "",
                f"{result['ms_a_step']:.1f}",
                f"{result['ms_a_draft']:.1f}" if key else "",
                f"{result['same_answers']}/{len(requests)}" if key else "",
            )
    for system in systems.values():
        system.stop()
    finish("drafting", arguments, [shown], results=results, weight_bytes=members.bytes_of())


if __name__ == "__main__":
    main()
