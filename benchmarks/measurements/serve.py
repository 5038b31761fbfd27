"""Serving under load: proxy-tuned and base alone.

`python benchmarks/measurements/serve.py`

Two real servers, `vllm-proxy serve` and `vllm serve`, take turns answering vLLM's load generator,
`vllm bench serve`: random prompts, varying lengths, N streams at once. On a GPU the server that
waits sleeps.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
from tqdm import tqdm
from vllm.utils.network_utils import get_open_port

sys.path.insert(0, str(Path(__file__).parents[1]))

from shared.members import Members, prepare
from shared.options import parser, positive, require_device
from shared.report import finish, ratios, spread, table
from shared.systems import BASE, PROXY
from vllm_proxy.config.engine_arguments import serve_arguments
from vllm_proxy.server.command import serve_command, vllm_command

START_SECONDS = 900
FIGURES = {
    "output_throughput": "tokens/s",
    "median_ttft_ms": "first token (ms)",
    "median_tpot_ms": "each further token (ms)",
    "p99_itl_ms": "99% between tokens (ms)",
}
"""Keys of the load generator's result, and what they are."""


@contextmanager
def server(command: list[str], port: int, log: Path, *, sleeps: bool) -> Iterator["Server"]:
    """Run a server until the block is left; raises `RuntimeError` if it does not come up."""
    words = [*command, "--host", "127.0.0.1", "--port", str(port)]
    if sleeps:
        words.append("--enable-sleep-mode")
    with log.open("w") as output:
        process = subprocess.Popen(
            words,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"VLLM_SERVER_DEV_MODE": "1"},
        )
    try:
        yield Server(process, f"http://127.0.0.1:{port}", log, sleeps=sleeps)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


class Server:
    """A running server."""

    def __init__(self, process: subprocess.Popen, url: str, log: Path, *, sleeps: bool) -> None:
        self.url, self.sleeps = url, sleeps
        deadline = time.monotonic() + START_SECONDS
        while not self._is_healthy():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")
            time.sleep(0.5)
        self.model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        self.rest()

    def _is_healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health").status_code == 200
        except httpx.TransportError:
            return False

    def rest(self) -> None:
        """Give a GPU's memory back."""
        if self.sleeps:
            httpx.post(f"{self.url}/sleep?level=1", timeout=300).raise_for_status()

    def wake(self) -> None:
        """Take it again."""
        if self.sleeps:
            httpx.post(f"{self.url}/wake_up", timeout=300).raise_for_status()

    def load(self, words: list[str]) -> dict[str, float]:
        """Run the load generator and return its result.

        Raises:
            RuntimeError: it failed, or one of its requests did.
        """
        with tempfile.TemporaryDirectory() as directory:
            command = [
                *vllm_command(),
                "bench",
                "serve",
                "--base-url",
                self.url,
                "--model",
                self.model,
            ]
            command += ["--save-result", "--result-dir", directory, "--result-filename", "r.json"]
            self.wake()
            done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
            self.rest()
            if done.returncode:
                raise RuntimeError(f"the load generator failed: {done.stderr[-2000:]}")
            result = json.loads(Path(directory, "r.json").read_text())
        if result["failed"]:
            raise RuntimeError(f"{result['failed']} requests failed")
        return result


def flags(members: Members, *, eager: bool) -> list[str]:
    """Return what both servers are started with."""
    words = ["--dtype", members.dtype, "--kv-cache-memory-bytes", str(members.kv_bytes)]
    words += ["--no-enable-prefix-caching"]
    return [*words, "--enforce-eager"] if eager else words


def base_command(members: Members) -> list[str]:
    """Return the stock command that serves the base alone."""
    config = members.config
    overrides = config.engine.get("hf_overrides", {})
    words = serve_arguments({**config.engine_args(), "hf_overrides": overrides})
    return [*vllm_command(), "serve", *words]


def main() -> None:
    """Measure, print a table, and one JSON line with everything."""
    command = parser(__doc__)
    command.add_argument("--at-once", nargs="+", type=positive, default=[1, 16], metavar="N")
    command.add_argument("--requests", type=positive, default=32, help="requests per round")
    command.add_argument(
        "--prompt-tokens", type=positive, default=64, help="tokens per prompt, +- 50 %%"
    )
    command.add_argument(
        "--output-tokens", type=positive, default=32, help="tokens per answer, +- 50 %%"
    )
    arguments = command.parse_args()
    device = require_device(command, arguments.device)
    members = prepare(command, arguments.models, arguments.dtype, device, reference=False)
    # The load generator draws lengths of half more and half less.
    tokens = arguments.prompt_tokens + arguments.output_tokens
    members.require_context(command, tokens + tokens // 2)
    common = flags(members, eager=arguments.eager)
    commands = {
        PROXY: serve_command(members.config, common),
        BASE: [*base_command(members), *common],
    }
    load = ["--dataset-name", "random", "--ignore-eos", "--disable-tqdm", "--seed"]
    load += [str(arguments.seed), "--num-prompts", str(arguments.requests), "--temperature", "0"]
    load += ["--random-input-len", str(arguments.prompt_tokens)]
    load += ["--random-output-len", str(arguments.output_tokens), "--random-range-ratio", "0.5"]
    load += ["--percentile-metrics", "ttft,tpot,itl"]
    shown = table(
        *("at once", "system", *FIGURES.values(), "token time over base", "weights"),
        title=f"{arguments.models}, {arguments.dtype}, over HTTP",
    )
    results = []
    with ExitStack() as stack, tempfile.TemporaryDirectory() as logs:
        servers = {}
        for name, words in commands.items():
            log = Path(logs, name)
            running = server(words, get_open_port(), log, sleeps=device == "cuda")
            servers[name] = stack.enter_context(running)
        for at_once in arguments.at_once:
            words = [*load, "--max-concurrency", str(at_once)]
            rounds = [
                {name: one.load(words) for name, one in servers.items()}
                for _ in tqdm(range(arguments.repeats + 1), f"{at_once} at once", unit="round")
            ][1:]  # the first warms up
            for name in servers:
                figures = {key: spread(r[name][key] for r in rounds) for key in FIGURES}
                over = ratios(
                    (r[BASE]["output_throughput"] for r in rounds),
                    (r[name]["output_throughput"] for r in rounds),
                )
                ratio = members.bytes_ratio if name == PROXY else 1.0
                cells = [str(figure) for figure in figures.values()]
                shown.add_row(str(at_once), name, *cells, str(over), f"{ratio:.2f}")
                results.append(
                    {"at_once": at_once, "system": name, "over_base": over, "bytes_ratio": ratio}
                    | figures
                )
    finish("serve", arguments, [shown], results=results)


if __name__ == "__main__":
    main()
