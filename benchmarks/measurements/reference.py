"""The authors' way, and its best batch size.

`python benchmarks/measurements/reference.py`

A plain loop over three transformers models, as the paper's evaluation scripts run it: a static
batch, padded on the left, that ends with its slowest row; a KV cache for each model; the same dtype
as the engines; all cores. The other benchmarks compare with it.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[1]))

from shared.members import prepare
from shared.options import add_lengths, parser, positive, require_device
from shared.report import finish, spread, table
from shared.systems import System, start_reference
from shared.workload import Request, Workload

if TYPE_CHECKING:
    pass

BATCH_SIZES = (1, 4, 16, 64, 256)


def best_batch_size(system: System, requests: list[Request]) -> int:
    """Return the size of `BATCH_SIZES` that answers *requests* fastest, tried from large to small.

    Stops where a size is slower than the one before.
    """
    best, least = 1, float("inf")
    for size in (size for size in reversed(BATCH_SIZES) if size <= len(requests)):
        seconds = system.answer(requests, size).seconds
        if seconds > least:
            break
        best, least = size, seconds
    return best


def main() -> None:
    """Measure every batch size, print a table, and one JSON line with everything."""
    command = parser(__doc__)
    command.add_argument("--requests", type=positive, default=16)
    add_lengths(command)
    arguments = command.parse_args()
    device = require_device(command, arguments.device)
    members = prepare(command, arguments.models, arguments.dtype, device, reference=True)
    members.require_context(command, max(arguments.prompt_tokens) + max(arguments.output_tokens))
    workload = Workload(arguments.prompt_tokens, arguments.output_tokens)
    requests = workload.draw(arguments.requests, members.vocab_size, arguments.seed)
    system = start_reference(members, device)
    sizes = [size for size in BATCH_SIZES if size <= arguments.requests]
    for size in sizes:
        system.answer(requests[:size], size)  # warm up
    rounds = [
        {size: system.answer(requests, size).seconds_per_token for size in sizes}
        for _ in range(arguments.repeats)
    ]
    system.stop()
    shown, results = table("batch size", "ms a token", "tokens/s"), []
    for size in sizes:
        times = spread([1e3 * one[size] for one in rounds])
        shown.add_row(str(size), str(times), f"{1e3 / times.median:.1f}")
        results.append({"batch_size": size, "ms_per_token": times})
    finish("reference", arguments, [shown], results=results)


if __name__ == "__main__":
    main()
