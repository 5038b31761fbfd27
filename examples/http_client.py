"""Serve a configuration and send it requests over HTTP: `python examples/http_client.py [CONFIG]`.

One server answers as the proxy-tuned model, at any strength, and as each member alone. Any client
of the OpenAI API works; this one needs the standard library only.
"""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

PROMPT = "Question: What is the capital of Spain?\nAnswer:"


@contextmanager
def server(config: str) -> Iterator[str]:
    """Start `vllm-proxy serve` under the name `demo`; yield its address when it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = ["serve", config, "--host", "127.0.0.1", "--port", port, "--served-model-name", "demo"]
    program = Path(sys.executable).with_name("vllm-proxy")
    process = subprocess.Popen([program, *words], stdout=sys.stderr.fileno())
    try:
        while not is_ready(f"http://127.0.0.1:{port}"):
            if process.poll() is not None:
                sys.exit("the server ended; its log says why")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def is_ready(address: str) -> bool:
    """Return whether the server answers."""
    try:
        return urlopen(f"{address}/health", timeout=5).status == 200
    except (URLError, OSError):
        return False


def complete(address: str, model: str, **values: object) -> str:
    """Return a greedy completion; *values* are the request's `proxy_…` fields."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
    request = Request(
        f"{address}/v1/completions",
        json.dumps({**body, "vllm_xargs": values}).encode(),
        {"Content-Type": "application/json"},
    )
    with urlopen(request, timeout=300) as response:
        return json.load(response)["choices"][0]["text"]


def main(config: str) -> None:
    """Print the proxy's answers at two strengths, and the members' answers."""
    with server(config) as address:
        for alpha in (0.5, 1.0):
            print(f"proxy, alpha {alpha}: {complete(address, 'demo', proxy_alpha=alpha)!r}")
        for role in ("base", "expert", "antiexpert"):
            print(f"{role}: {complete(address, f'demo:{role}')!r}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "configs/demo.yaml")
