"""`vllm-proxy` as a user runs it: short commands in this process, jobs in sessions of their own."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml
from typer.testing import CliRunner, Result

from support.engines import ENGINE_ENV
from support.forks import Fork
from support.jobs import JOB_ENGINE
from vllm_proxy.cli.app import app

VLLM_PROXY = str(Path(sys.executable).with_name("vllm-proxy"))
KILLS = int(os.environ.get("KILLS", "6"))
"""How often a job is killed at random moments; twenty is a good number before a release."""


def run(*words: object) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(word) for word in words])


COMMAND_ENV = {**os.environ, **ENGINE_ENV, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
"""Variables of a command whose engine has a process, as it has by default."""


class Command:
    """`vllm-proxy generate` as a user runs it, in a session of its own."""

    def __init__(self, directory: Path, members: dict, *words: str, engine: dict = JOB_ENGINE):
        sampling = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
        settings = {**members, "engine": engine, "sampling": sampling}
        (directory / "proxy.yaml").write_text(yaml.safe_dump(settings))
        self.words = [VLLM_PROXY, "generate"]
        self.words += [str(directory / "proxy.yaml"), *words]
        self.env = dict(COMMAND_ENV)
        self.sessions: list[int] = []
        self.directory = directory

    def start(self) -> subprocess.Popen:
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(self.words, env=self.env, start_new_session=True, **pipe)
        self.sessions.append(process.pid)
        return process

    def fork(self) -> Fork:
        """Start it in a fork, whose engine is another one."""
        number = len(self.sessions)
        output = (self.directory / f"{name}-{number}.txt" for name in ("stdout", "stderr"))
        process = Fork(self.words[1:], self.env, *output)
        self.sessions.append(process.pid)
        return process

    def kill_at_random_moments(
        self, out: Path, rows: int, starting: float, kills: int = KILLS
    ) -> None:
        """Run the command and kill it, so often, and then let it end; it must go on every time.

        Args:
            out: its output.
            rows: number of them.
            starting: seconds in which it does not write yet; there every fourth kill falls.
            kills: number of them.
        """
        moments, kept, log = random.Random(0), b"", out.parent / "killed.txt"
        for kill in range(kills):
            fork = Fork(self.words[1:], self.env, log, log)
            if kill % 4 == 0:
                time.sleep(moments.uniform(0, starting))
            else:
                # In lines, not in seconds: a busy machine may be slow, or look here but seldom.
                more = kept.count(b"\n") + moments.randrange(1, rows // (4 * kills))
                while not out.exists() or out.read_bytes().count(b"\n") < more:
                    assert fork.is_running(), log.read_text()
                    time.sleep(0.01)
            sign = moments.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT])
            os.kill(fork.pid, sign)
            status = fork.wait()
            assert status == -sign or (sign == signal.SIGINT and status == 130), log.read_text()
            now = out.read_bytes() if out.exists() else b""
            assert now.startswith(kept[: kept.rfind(b"\n") + 1])
            kept = now
        lines = kept.count(b"\n")
        assert 0 < lines < rows, "too early or too late to matter"
        assert Fork(self.words[1:], self.env, log, log).wait() == 0
        assert f"; {lines} rows were there before" in log.read_text().splitlines()[-1]

    def survivors(self) -> list[str]:
        """Return what is left of all sessions, after some patience."""
        deadline = time.monotonic() + 30
        while True:
            alive = [cmd for session in self.sessions for cmd in living(session)]
            if not alive or time.monotonic() > deadline:
                return alive
            time.sleep(0.5)

    def processes_of(self, process: subprocess.Popen | Fork) -> list[psutil.Process]:
        """Return all that a process has started, and these."""
        return psutil.Process(process.pid).children(recursive=True)

    def engine_of(self, process: subprocess.Popen | Fork) -> psutil.Process:
        """Return the engine's process."""
        every = self.processes_of(process)
        (found,) = [child for child in every if "EngineCore" in title(child)]
        return found


def title(process: psutil.Process) -> str:
    """Return what a process calls itself; nothing if it has just ended."""
    try:
        return " ".join([process.name(), *process.cmdline()])
    except psutil.Error:
        return ""


def living(session: int) -> list[str]:
    """Return the processes of a session that are no zombies."""
    listing = subprocess.run(["ps", "-eo", "sid,stat,cmd"], capture_output=True, text=True)
    lines = [line.split(maxsplit=2) for line in listing.stdout.splitlines()[1:]]
    return [cmd for sid, stat, cmd in lines if int(sid) == session and "Z" not in stat]


def require_complete(got: list[dict], rows: list[dict], reference) -> None:
    """Every row has one record, in order, and the twenty looked at are the reference's."""
    assert [record["index"] for record in got] == list(range(len(rows)))
    for index in range(0, len(rows), len(rows) // 20):
        answer = reference.greedy(rows[index]["prompt_token_ids"], 12).token_ids
        assert got[index]["token_ids"] == answer
