"""The job that spreads its rows over several engines with Ray Data, on one machine or a cluster.

Rows are read in small blocks on the driver's node. Ray Data passes the blocks to a pool of actors,
each with its own engine, and returns the records to the driver, which alone writes them. Ray
restarts an actor that dies, and passes its unfinished blocks to an actor again.
"""

import json
import os
import traceback
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_proxy.config.errors import EngineDiedError, ProxyConfigError
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.jobs.answerer import Answerer
from vllm_proxy.jobs.guard import guard
from vllm_proxy.jobs.inputs import Input, Line, take_block
from vllm_proxy.jobs.job import Job
from vllm_proxy.jobs.ray_cluster import Placement, connected, placed, replicas_problem
from vllm_proxy.llm.sampling import require_one_answer

if TYPE_CHECKING:
    import pyarrow
    import ray.data

_ROWS_PER_BLOCK = 64
"""At most: a block's records return together, and Ray schedules some tens of blocks per second."""
_MOST_RUNNING = 1024
"""Concurrent requests of an engine if `max_num_seqs` is not configured: vLLM's largest default."""
_DIED = "a replica died; see its stack trace for the root cause"


_Answer = Future[dict[str, Any]]
"""A row's record, once there is one."""


class Replicas(NamedTuple):
    """How many engines to start, and where.

    Attributes:
        least: number of engines at the start.
        most: Ray Data adds engines up to this number while rows are waiting.
        address: of a Ray cluster; None means the one in RAY_ADDRESS, or else one that runs on this
            machine, or else a new one.
    """

    least: int
    most: int
    address: str | None = None


class Replica:
    """One of the engines: an actor of Ray Data, called by many threads with one block each."""

    def __init__(self, config: ProxyConfig, directory: str) -> None:
        import ray

        from vllm_proxy.llm.proxy_llm import ProxyLLM

        _enter(directory)
        context = ray.get_runtime_context()
        self._name = f"{context.get_actor_id()}-{os.getpid()}"
        self._is_restarted = context.was_current_actor_reconstructed
        # The engine's process asks Ray for workers: make it use this cluster if there are several.
        os.environ["RAY_ADDRESS"] = context.gcs_address
        self._guard = guard()
        self._guard.__enter__()
        self._answerer = Answerer(ProxyLLM.from_config(config), config)
        self._inbox: SimpleQueue[tuple[Line, _Answer]] = SimpleQueue()
        self._waiting: dict[int, _Answer] = {}
        Thread(target=self._drive, daemon=True, name="proxy-engine").start()

    def __call__(self, blocks: "pyarrow.Table") -> "pyarrow.Table":
        """Return the records of a block of lines."""
        import pyarrow

        futures: list[_Answer] = []
        for line in blocks["lines"][0].as_py():
            futures.append(Future())
            self._inbox.put((Line(**line), futures[-1]))
        records = [json.dumps(future.result()) for future in futures]
        return pyarrow.table(
            {"records": [records], "replica": [self._name], "is_restarted": [self._is_restarted]}
        )

    def _drive(self) -> None:
        """Step the engine for ever; if it dies, end the actor's process, so that Ray notices."""
        try:
            while True:
                while not (len(self._answerer) and self._inbox.empty()):
                    line, future = self._inbox.get()
                    if record := self._answerer.submit(line):
                        future.set_result(record)
                    else:
                        self._waiting[line.index] = future
                for record in self._answerer.step():
                    self._waiting.pop(record["index"]).set_result(record)
        except BaseException:  # noqa: BLE001 - after any error, no more rows would be answered
            traceback.print_exc()
        finally:
            os._exit(1)


class ReplicatedJob(Job):
    """A job of rows in our own format, answered by several engines at the same time."""

    restarts_engines = False  # Ray restarts each of them

    def __init__(
        self,
        config: ProxyConfig,
        source: Input,
        target: str,
        replicas: Replicas,
        **options: bool,
    ) -> None:
        if source.is_stream:
            raise ProxyConfigError(
                "rows are read again after an engine died, which a stream does not allow",
                field=f"--input {source.paths[0]!r}",
                remedy="give a file, or leave out --ray",
            )
        require_one_answer(config.sampling.get("n", 1))
        super().__init__(config, source, target, **options)
        self._replicas = replicas

    @contextmanager
    def engine(self) -> Iterator["ray.data.Dataset"]:
        """Connect to the cluster, make the cheap checks, and yield the lazy data set of records."""
        from vllm_proxy.preflight.check.run import require_valid

        with connected(self._replicas.address) as nodes:
            config, placement = placed(self.config)
            require_valid(config)
            if problem := replicas_problem(placement, nodes, self._replicas.least):
                raise ProxyConfigError(problem)
            yield self._records(config, placement)

    def _records(self, config: ProxyConfig, placement: Placement) -> "ray.data.Dataset":
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.target_max_block_size = 1  # a block has one row: lines to be answered together
        restarts, rows = self._restarts, len(self.output.done) - self.done
        running = config.engine.get("max_num_seqs", _MOST_RUNNING)
        # At most its share of the job, or no rows would be left for the engine that starts last.
        in_flight = min(4 * running, -(-rows // self._replicas.least))
        size = max(1, min(_ROWS_PER_BLOCK, in_flight // 4))
        blocks = -(-in_flight // size)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        pool = ray.data.ActorPoolStrategy(
            min_size=self._replicas.least,
            max_size=self._replicas.most,
            max_concurrent_calls_per_actor=blocks,
            max_tasks_in_flight_per_actor=blocks,
            enable_true_multi_threading=True,
        )
        return (
            ray.data.from_items([0])
            .map_batches(
                partial(_blocks, os.getcwd(), self.input, bytes(self.output.done), size),
                num_cpus=0,  # engines may take every CPU
                ray_remote_args_fn=lambda: {"scheduling_strategy": here},
            )
            .map_batches(
                Replica,
                fn_constructor_args=(config, os.getcwd()),
                batch_size=1,
                batch_format="pyarrow",
                compute=pool,
                ray_remote_args_fn=lambda: {"max_restarts": restarts, **placement.place()},
                **placement.resources(),
            )
        )

    def answer(self, engine: "ray.data.Dataset") -> None:
        """See `Job`."""
        import ray

        lives: dict[str, set[str]] = {}
        try:
            for block in engine.iter_rows():
                self._report_deaths(block, lives)
                for record in map(json.loads, block["records"]):
                    if not self.output.done[record["index"]]:
                        self.write(record)
        except ray.exceptions.RayError as error:
            if isinstance(error, ProxyConfigError):  # from reading the rows; Ray adds lines to it
                cause = getattr(error, "cause", error)
                raise ProxyConfigError(str(cause).partition("\n")[0]) from None
            raise EngineDiedError(_DIED) from error

    def _report_deaths(self, block: dict[str, Any], lives: dict[str, set[str]]) -> None:
        actor, process = block["replica"].split("-")
        # An actor that died before it answered anything is not in the blocks, but counts too.
        known = lives.setdefault(actor, {"silent"} if block["is_restarted"] else set())
        if process not in known:
            known.add(process)
            if len(known) > 1:
                self._on_restart(EngineDiedError(_DIED), self._restarts - len(known) + 1)


def _enter(directory: str) -> None:
    """Resolve relative paths as the driver does, at least on its own node."""
    with suppress(OSError):
        os.chdir(directory)


def _blocks(
    directory: str, source: Input, done: bytes, size: int, _: Any
) -> Iterator["pyarrow.Table"]:
    """Yield blocks of at most *size* lines that have no record yet."""
    import pyarrow

    _enter(directory)
    missing = source.missing(done)
    while block := take_block(missing, size, lambda line: len(line.data)):
        yield pyarrow.table({"lines": [[line._asdict() for line in block]]})
