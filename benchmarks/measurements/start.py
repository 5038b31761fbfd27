"""From command to first token: proxy-tuned and base alone.

`python benchmarks/measurements/start.py`

Each start is a separate process: one cold, with empty compile caches, then warm ones that use what
the cold start left there. The engine runs in the process that was started (vLLM's usual engine and
worker processes add the time of two more imports, to both systems). The script also prints how long
loading took, and how many graphs were compiled, by TorchInductor's counters.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from shared.members import Members, prepare
from shared.options import parser, require_device
from shared.report import finish, spread, table
from shared.systems import BASE, PROXY, engine_args
from vllm_proxy.engine.defaults import set_cpu_defaults

_STARTED = "VLLM_PROXY_BENCH_STARTED"


def start(args: dict[str, Any], cache: Path) -> dict[str, Any]:
    """Start an engine in a new process with this cache, and return what it measured."""
    caches = {"VLLM_CACHE_ROOT": cache / "vllm", "TORCHINDUCTOR_CACHE_DIR": cache / "inductor"}
    # In one process, so that compilations can be counted; a clock that all processes share.
    environment = os.environ | {name: str(path) for name, path in caches.items()}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", _STARTED: str(time.time())}
    words = [sys.executable, __file__, "--child", json.dumps(args)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"the engine did not start: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def child(args: dict[str, Any]) -> None:
    """Start, generate a token, and print the seconds since the command."""
    from torch._dynamo.utils import counters
    from vllm import LLM, SamplingParams
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    started = float(os.environ[_STARTED])
    times = {"imports": time.time() - started}
    load = BaseModelLoader.load_model

    def timed(*args: Any, **kwargs: Any) -> Any:
        before = time.time()
        model = load(*args, **kwargs)
        times["load"] = time.time() - before
        return model

    BaseModelLoader.load_model = timed
    llm = LLM(**args)
    times["engine"] = time.time() - started
    llm.generate(
        [{"prompt_token_ids": [5, 6, 7]}],
        SamplingParams(max_tokens=1, temperature=0.0),
        use_tqdm=False,
    )
    times["first token"] = time.time() - started
    inductor = counters["inductor"]
    print(
        json.dumps(
            times
            | {
                "compiled": inductor["fxgraph_cache_miss"] + inductor["fxgraph_cache_bypass"],
                "from cache": inductor["fxgraph_cache_hit"],
            }
        )
    )


def main() -> None:
    """Measure, print a table, and one JSON line with everything."""
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]))
        return
    command = parser(__doc__)
    arguments = command.parse_args()
    device = require_device(command, arguments.device)
    members = prepare(command, arguments.models, arguments.dtype, device, reference=False)
    if device == "cpu":
        set_cpu_defaults()  # for the base as well, which would compile again at every start
    results = measure(members, device, arguments.repeats, eager=arguments.eager)
    shown = table(
        *("start", "system", "to first token (s)", "of it loading (s)", "compiled", "from cache"),
        title=f"{arguments.models}, {arguments.dtype}",
    )
    for kind in ("cold", "warm"):
        for name in (PROXY, BASE):
            runs = [one[name] for one in results[kind]]
            shown.add_row(
                kind,
                name,
                str(spread(run["first token"] for run in runs)),
                str(spread(run["load"] for run in runs)),
                *(str(max(run[key] for run in runs)) for key in ("compiled", "from cache")),
            )
    finish("start", arguments, [shown], results=results)


def measure(
    members: Members, device: str, repeats: int, *, eager: bool
) -> dict[str, list[dict[str, Any]]]:
    """Start each engine cold, once, and then warm, in turn."""
    args = {
        name: engine_args(members, device, {"enforce_eager": eager}, proxy=name == PROXY)
        for name in (PROXY, BASE)
    }
    with tempfile.TemporaryDirectory() as directory:
        # No spaces: vLLM's ahead-of-time compilation hands paths to the compiler unquoted.
        caches = {name: Path(directory, name.replace(" ", "-")) for name in args}
        rounds = [
            {name: start(args[name], caches[name]) for name in args}
            for _ in tqdm(range(repeats + 1), unit="round")
        ]
    return {"cold": rounds[:1], "warm": rounds[1:]}


if __name__ == "__main__":
    main()
