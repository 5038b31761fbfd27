"""Time to the first token, and time per further token.

`python benchmarks/measurements/latency.py`

One request at a time, or a few at once, of one prompt length. Proxy-tuned, base alone and the
authors' way take turns. The time to the first token is that of requests for one token. The time per
further token is how much longer requests for more tokens take.
"""

import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from shared.members import prepare
from shared.options import parser, positive, require_device
from shared.report import finish, ratios, spread, table
from shared.systems import BASE, REFERENCE, System, start_base, start_proxy, start_reference
from shared.workload import Request


def seconds(system: System, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
    """Return the seconds to the first tokens, and for each further step."""
    first, whole = (
        system.answer([Request(prompt, count) for prompt in prompts], len(prompts)).seconds
        for count in (1, tokens)
    )
    return first, (whole - first) / (tokens - 1)


def main() -> None:
    """Measure, print a table, and one JSON line with everything."""
    command = parser(__doc__)
    command.add_argument("--at-once", nargs="+", type=positive, default=[1, 8], metavar="N")
    command.add_argument("--prompt-tokens", nargs="+", type=positive, default=[16, 256])
    command.add_argument("--tokens", type=positive, default=32)
    command.add_argument("--no-reference", action="store_true", help="leave transformers out")
    arguments = command.parse_args()
    if arguments.tokens < 2:
        command.error("--tokens 1: at least 2 are needed, for there to be a further one")
    device = require_device(command, arguments.device)
    with_reference = not arguments.no_reference
    members = prepare(command, arguments.models, arguments.dtype, device, reference=with_reference)
    members.require_context(command, max(arguments.prompt_tokens) + arguments.tokens)
    engine = {"enforce_eager": arguments.eager}
    systems = [start_proxy(members, device, **engine), start_base(members, device, **engine)]
    if with_reference:
        systems.append(start_reference(members, device))
    shown = table(
        *("at once", "prompt", "system", "first token (ms)", "over base", "each further (ms)"),
        *("over base", "weights"),
        title=f"{arguments.models}, {arguments.dtype}",
    )
    results = []
    loads = [(n, length) for n in arguments.at_once for length in arguments.prompt_tokens]
    progress = tqdm(total=len(loads) * len(systems) * (arguments.repeats + 1), unit="turn")
    for at_once, length in loads:
        # Every prompt its own, and none begins as another.
        prompts = [[5 + i] + [3 + j % 500 for j in range(length - 1)] for i in range(at_once)]
        rounds = []
        for _ in range(arguments.repeats + 1):
            rounds.append({})
            for system in systems:
                rounds[-1][system.name] = seconds(system, prompts, arguments.tokens)
                progress.update()
        rounds = rounds[1:]  # the first warms up
        for system in systems:
            name = system.name
            first, rest = zip(*(one[name] for one in rounds), strict=True)
            base_first, base_rest = zip(*(one[BASE] for one in rounds), strict=True)
            figures = {
                "first_ms": spread(1e3 * t for t in first),
                "first_over_base": ratios(first, base_first),
                "further_ms": spread(1e3 * t for t in rest),
                "further_over_base": ratios(rest, base_rest),
            }
            ratio = 1.0 if name == BASE else members.bytes_ratio
            label = f"{name}, one batch" if name == REFERENCE else name
            shown.add_row(
                str(at_once), str(length), label, *map(str, figures.values()), f"{ratio:.2f}"
            )
            results.append(
                {"at_once": at_once, "prompt": length, "system": name, "bytes_ratio": ratio}
                | figures
            )
    progress.close()
    for system in systems:
        system.stop()
    finish("latency", arguments, [shown], results=results)


if __name__ == "__main__":
    main()
