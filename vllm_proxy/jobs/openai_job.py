"""The job that answers an OpenAI batch file, with a server in the background, in OpenAI's format.

Each row is a request to an OpenAI endpoint, so it goes to vLLM's server (`vllm-proxy serve`), which
this process starts on a private socket. A row can contain whatever a client of the server can send.
"""

import asyncio
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_proxy.config.engine_arguments import SERVER_SAMPLING
from vllm_proxy.config.errors import EngineDiedError, ProxyConfigError
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.config.validation import validation_error
from vllm_proxy.jobs.answerer import reraise_as_row_error
from vllm_proxy.jobs.inputs import Input, Line
from vllm_proxy.jobs.job import Job
from vllm_proxy.jobs.media import with_file_urls
from vllm_proxy.jobs.records import RecordFormat, row_number
from vllm_proxy.jobs.rows import is_json, row_id
from vllm_proxy.server.command import environment, serve_command

if TYPE_CHECKING:
    import aiohttp

_ID = "batch_req_"
_IN_BODY = frozenset({"ignore_eos", "max_tokens", "min_tokens", "seed", "stop", "stop_token_ids"})
"""Sampling parameters with the same name in a body, and without a default in a server."""
_IN_FLIGHT = 512
"""Concurrent requests if `max_num_seqs` is not configured: more than the engine runs."""
_MOST_IN_FLIGHT = 900
"""Each request is a connection, and a process usually can open 1024 files."""
_GONE = "the server ended; see its stack trace for the root cause"


class BatchRow(BaseModel):
    """One line of an OpenAI batch file.

    Attributes:
        custom_id: repeated in the row's record.
        method: always POST.
        url: the endpoint.
        body: the request as the server accepts it, including `vllm_xargs`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    custom_id: str
    method: Literal["POST"] | None = "POST"
    url: Literal["/v1/chat/completions", "/v1/completions"]
    body: dict[str, Any]


def record(
    index: int,
    custom_id: Any,
    response: dict[str, Any] | None = None,
    error: str | None = None,
) -> dict[str, Any]:
    """Return a row's record in OpenAI's format; its `id` contains the row's number."""
    reason = None if error is None else {"code": "invalid_request", "message": error}
    return {"id": f"{_ID}{index}", "custom_id": custom_id, "response": response, "error": reason}


def _index(record: dict[str, Any]) -> int:
    number = record["id"].removeprefix(_ID)
    if record["id"] != f"{_ID}{int(number)}":  # `int` also accepts signs and blanks
        raise ValueError(number)
    return row_number(int(number))


def _tokens(record: dict[str, Any]) -> tuple[int, int]:
    usage = ((record["response"] or {}).get("body") or {}).get("usage") or {}
    return usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0


FORMAT = RecordFormat(
    index=_index,
    is_error=lambda record: record["error"] is not None or record["response"]["status_code"] != 200,
    tokens=_tokens,
    failure=lambda index, custom_id, reason: record(index, custom_id, error=reason),
)


def is_batch_row(line: Line) -> bool:
    """Return whether this is a row of an OpenAI batch file."""
    try:
        row = None if line.is_text else json.loads(line.data)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and "custom_id" in row


def parse(data: bytes) -> BatchRow:
    """Read one line. Raises `ProxyConfigError`, in one line."""
    try:
        row = BatchRow.model_validate_json(data)
    except ValidationError as error:
        raise validation_error(BatchRow, error) from None
    if not is_json(row.body):
        raise ProxyConfigError(
            "it has NaN or Infinity, which are not JSON", field="body", remedy="remove them"
        )
    if row.body.get("stream"):
        raise ProxyConfigError(
            "a row gets one answer", field="body.stream", value=True, remedy="remove it"
        )
    return row


class Server:
    """A server on a private socket, in its own process."""

    def __init__(self, command: list[str], socket: Path, additions: Mapping[str, str]) -> None:
        self.socket = str(socket)
        # Only this user can open the socket; with a key, the server would reject our requests.
        inherited = {key: value for key, value in os.environ.items() if key != "VLLM_API_KEY"}
        self.process = subprocess.Popen(
            [*command, "--uds", self.socket], env={**inherited, **additions}
        )

    def session(self, connections: int) -> "aiohttp.ClientSession":
        """Return a client with this many connections and no timeout."""
        import aiohttp

        return aiohttp.ClientSession(
            "http://localhost",
            connector=aiohttp.UnixConnector(self.socket, limit=connections),
            timeout=aiohttp.ClientTimeout(total=None),
        )

    async def is_healthy(self, client: "aiohttp.ClientSession") -> bool:
        """Return whether the server and its engine answer."""
        import aiohttp

        try:
            async with client.get("/health") as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False

    async def wait(self) -> None:
        """Wait until the server is ready. Raises `RuntimeError` if it ends before that."""
        async with self.session(1) as client:
            while not await self.is_healthy(client):
                if self.process.poll() is not None:
                    raise RuntimeError(_GONE)
                await asyncio.sleep(0.2)

    def stop(self) -> None:
        """Stop the server; kill it if it does not end in 30 s."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class OpenAIJob(Job):
    """A job whose rows and records are in OpenAI's batch format."""

    record_format = FORMAT

    def __init__(self, config: ProxyConfig, source: Input, target: str, **options: bool) -> None:
        for key in config.sampling:
            if key not in SERVER_SAMPLING | _IN_BODY:
                raise ProxyConfigError(
                    "rows of an OpenAI batch file set it in their own `body`",
                    field=f"sampling.{key}",
                    remedy="remove it",
                )
        super().__init__(config, source, target, **options)
        self._defaults = {k: v for k, v in config.sampling.items() if k in _IN_BODY}

    @contextmanager
    def engine(self) -> Iterator[Server]:
        """Start a server, after the cheap checks."""
        from vllm_proxy.preflight.check.run import require_valid

        require_valid(self.config)
        command = serve_command(self.config, ["--disable-uvicorn-access-log"])
        with tempfile.TemporaryDirectory(prefix="vllm-proxy-") as directory:
            server = Server(command, Path(directory, "socket"), environment(self.config))
            try:
                asyncio.run(server.wait())
                yield server
            finally:
                server.stop()

    def answer(self, engine: Server) -> None:
        """See `Job`."""
        try:
            asyncio.run(self._answer(engine))
        except ExceptionGroup as errors:  # the first failing task has cancelled the others
            raise errors.exceptions[0] from None

    async def _answer(self, server: Server) -> None:
        at_once = 2 * self.config.engine.get("max_num_seqs", _IN_FLIGHT // 2)
        at_once = min(at_once, _MOST_IN_FLIGHT)
        running: set[asyncio.Task[None]] = set()
        async with server.session(at_once + 1) as client, asyncio.TaskGroup() as group:
            for line in self.lines():
                if len(running) >= at_once:
                    done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    running -= done
                running.add(group.create_task(self._ask(server, client, line)))

    async def _ask(self, server: Server, client: "aiohttp.ClientSession", line: Line) -> None:
        try:
            with reraise_as_row_error():
                if line.problem:
                    raise ProxyConfigError(line.problem)
                row = parse(line.data)
                body = {**self._defaults, **row.body}
                if isinstance(messages := body.get("messages"), list):
                    body["messages"] = with_file_urls(messages, line.directory)
                request = json.dumps(body).encode()
            response = await _response(server, client, row.url, request)
        except ProxyConfigError as error:
            custom_id = row_id(line.data, "custom_id")
            self.finish(record(line.index, custom_id, error=str(error)))
        else:
            self.finish(record(line.index, row.custom_id, response))


async def _response(
    server: Server, client: "aiohttp.ClientSession", url: str, request: bytes
) -> dict[str, Any]:
    """Send *request*, a body, and return the `response` of its record.

    Raises:
        EngineDiedError: the server has ended.
        ProxyConfigError: the server runs, but twice gave no answer to this request.
    """
    import aiohttp

    headers = {"Content-Type": "application/json"}
    for is_last in (False, True):  # the server may have closed a connection that was idle
        try:
            async with client.post(url, data=request, headers=headers) as answer:
                status, text = answer.status, await answer.text(errors="replace")
                break
        except aiohttp.ClientError as error:
            if not await server.is_healthy(client):
                raise EngineDiedError(_GONE) from error
            if is_last:
                raise ProxyConfigError(
                    f"the server gave no answer to this row ({error})", remedy="change the row"
                ) from None
    if status >= 500 and not await server.is_healthy(client):
        raise EngineDiedError(_GONE)
    body = _body(text)
    return {"status_code": status, "request_id": body.get("id"), "body": body}


def _body(text: str) -> dict[str, Any]:
    """Return an answer's body, or its text as an error if it is not a JSON object."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        body = None
    return body if isinstance(body, dict) and is_json(body) else {"error": {"message": text}}
