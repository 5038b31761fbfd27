"""What drafts by the expert save: `python benchmarks/drafting.py --models profiles-10x`.

Few requests at a time describe cities of countries that no small member was trained on. Answered by
the base alone, proxy-tuned, and proxy-tuned with so many drafts before each pass, in turn. Beside
what is measured stands what weight bytes let expect: a pass reads all members, a draft the expert,
and as many tokens come of a pass as there really came.
"""

from collections.abc import Iterable
from typing import Any

from members import Members, prepare
from options import Parser, parser, positive, require_device
from report import Spread, finish, ratios, spread, table
from systems import Request, System, start_base, start_proxy
from transformers import AutoTokenizer


def requests_of(members: Members, count: int, tokens: int) -> list[Request]:
    """Return *count* requests for *tokens* each."""
    from gap.profiles import profiles

    tokenizer = AutoTokenizer.from_pretrained(members.config.base.model)
    items = profiles().test[:count]
    return [Request(tokenizer(item.prompt).input_ids, tokens) for item in items]


def drafts_so_far(engine: Any) -> tuple[int, int]:
    """Return passes with drafts, and accepted drafts; runs where the engine is."""
    found = {
        metric.name: metric.value
        for metric in engine.llm.get_metrics()
        if metric.name.startswith("vllm:spec_decode") and hasattr(metric, "value")
    }
    return (
        found.get("vllm:spec_decode_num_drafts", 0),
        found.get("vllm:spec_decode_num_accepted_tokens", 0),
    )


def expected(members: Members, drafts: int, tokens_a_pass: float) -> float:
    """Return tokens a second over the base's, by bytes of weights alone."""
    read = members.bytes_read() + drafts * members.bytes_read("expert")
    return tokens_a_pass * members.bytes_read("base") / read


def systems_of(
    members: Members, device: str, drafts: Iterable[int], **engine: object
) -> dict[int | None, System]:
    """Start the base (None), proxy-tuned (0), and with drafts."""
    engine |= {"disable_log_stats": False}
    started: dict[int | None, System] = {None: start_base(members, device, **engine)}
    for tokens in (0, *drafts):
        started[tokens] = start_proxy(members, device, drafts=tokens, **engine)
    return started


def options() -> Parser:
    """Return the command line."""
    command = parser(__doc__, models="profiles-10x")
    command.add_argument("--at-once", nargs="+", type=positive, default=[1, 4], metavar="N")
    command.add_argument("--drafts", nargs="+", type=positive, default=[2, 4, 6], metavar="K")
    command.add_argument("--requests", type=positive, default=12, metavar="N")
    command.add_argument("--tokens", type=positive, default=48, help="of each answer")
    return command


def main() -> None:
    """Measure, print a table, and one JSON line with everything."""
    command = options()
    arguments = command.parse_args()
    device = require_device(command, arguments.device)
    members = prepare(command, arguments.models, arguments.dtype, device, reference=False)
    requests = requests_of(members, arguments.requests, arguments.tokens)
    systems = systems_of(members, device, arguments.drafts, enforce_eager=arguments.eager)
    shown = table(
        *("at once", "system", "tokens/s", "over base", "expected", "tokens a pass", "accepted"),
        "as without drafts",
        title=f"{arguments.models}, {arguments.dtype}; bytes of base over expert: "
        f"{members.bytes_read('base') / members.bytes_read('expert'):.1f}",
    )
    results = []
    for at_once in arguments.at_once:
        for system in systems.values():
            system.answer(requests[:at_once], at_once)
        times: dict[int | None, list[float]] = {key: [] for key in systems}
        tokens, before = {}, {key: s.call(drafts_so_far) for key, s in systems.items()}
        for _ in range(arguments.repeats):
            for key, system in systems.items():
                answer = system.answer(requests, at_once)
                times[key].append(answer.seconds_per_token)
                tokens[key] = answer.tokens
        for key, system in systems.items():
            passes, accepted = (
                now - then
                for now, then in zip(system.call(drafts_so_far), before[key], strict=True)
            )
            a_pass = 1 + accepted / passes if passes else 1.0
            speed: Spread = spread(1 / t for t in times[key])
            faster = ratios(times[None], times[key])
            hoped = None if key is None else expected(members, key, a_pass)
            same = sum(a == b for a, b in zip(tokens[key], tokens[0], strict=True))
            shown.add_row(
                str(at_once),
                system.name,
                str(speed),
                "" if key is None else f"{faster}x",
                "" if hoped is None else f"{hoped:.2f}x",
                f"{a_pass:.2f}" if key else "",
                f"{accepted / passes / key:.0%}" if key else "",
                f"{same}/{len(requests)}" if key else "",
            )
            results.append(
                {
                    "at_once": at_once,
                    "system": system.name,
                    "drafts": key,
                    "tokens_per_second": speed,
                    "over_base": faster,
                    "expected_over_base": hoped,
                    "over_plain": ratios(times[0], times[key]),
                    "tokens_a_pass": a_pass,
                    "answers_as_without_drafts": same,
                }
            )
    for system in systems.values():
        system.stop()
    finish("drafting", arguments, [shown], results=results, weight_bytes=members.bytes_of())


if __name__ == "__main__":
    main()
