"""A job's rows, spread by Ray Data over engines of their own: on this machine, or on a cluster.

Rows are read on the node of the driver, in blocks of a few; Ray Data hands these to a pool of
actors, each with an engine, and brings their records back as they come, to the one writer. An actor
that dies is started again by Ray, which hands it its unfinished blocks once more.
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
from vllm_proxy.jobs.inputs import Input, Line, taken
from vllm_proxy.jobs.prompt_job import PromptJob
from vllm_proxy.jobs.ray_cluster import Placement, connected, placed, replicas_problem

if TYPE_CHECKING:
    import pyarrow
    import ray.data

_ROWS_A_BLOCK = 64
"""At most: a block's records come back together, and Ray hands out some tens of blocks a second."""
_MOST_RUNNING = 1024
"""Requests that an engine runs at once, where `max_num_seqs` is not configured: vLLM's largest."""
_DIED = "a replica died; see its stack trace for the root cause"


class Replicas(NamedTuple):
    """How many engines, and where.

    Attributes:
        least: the job starts with so many.
        most: Ray Data adds engines up to this number while rows wait.
        address: of a Ray cluster; None: RAY_ADDRESS's, one that runs on this machine, or a new one.
    """

    least: int
    most: int
    address: str | None = None


class Replica:
    """One of the engines: an actor of Ray Data, called by many threads, a block of rows each."""

    def __init__(self, config: ProxyConfig, directory: str) -> None:
        import ray

        from vllm_proxy.llm.proxy_llm import ProxyLLM

        _go_to(directory)
        context = ray.get_runtime_context()
        self._name = f"{context.get_actor_id()}-{os.getpid()}"
        self._is_restarted = context.was_current_actor_reconstructed
        # For the engine's own process, which asks Ray for workers: of several clusters, this one.
        os.environ["RAY_ADDRESS"] = context.gcs_address
        self._guard = guard()
        self._guard.__enter__()
        self._answerer = Answerer(ProxyLLM.from_config(config), config)
        self._inbox: SimpleQueue[tuple[Line, Future]] = SimpleQueue()
        self._waiting: dict[int, Future] = {}
        Thread(target=self._drive, daemon=True, name="proxy-engine").start()

    def __call__(self, blocks: "pyarrow.Table") -> "pyarrow.Table":
        """Return the records of a block of lines."""
        import pyarrow

        futures = []
        for line in blocks["lines"][0].as_py():
            futures.append(Future())
            self._inbox.put((Line(**line), futures[-1]))
        records = [json.dumps(future.result()) for future in futures]
        return pyarrow.table(
            {"records": [records], "replica": [self._name], "is_restarted": [self._is_restarted]}
        )

    def _drive(self) -> None:
        """Step the engine, for ever; one that dies takes the actor with it, so that Ray sees it."""
        try:
            while True:
                while not (len(self._answerer) and self._inbox.empty()):
                    line, future = self._inbox.get()
                    if record := self._answerer.ask(line):
                        future.set_result(record)
                    else:
                        self._waiting[line.index] = future
                for record in self._answerer.step():
                    self._waiting.pop(record["index"]).set_result(record)
        except BaseException:  # noqa: BLE001 - whatever it is, no row would be answered any more
            traceback.print_exc()
        finally:
            os._exit(1)


class ReplicatedJob(PromptJob):
    """A job of rows in our own format, answered by several engines at once."""

    restarts_engines = False  # Ray does, each of them

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
                f"--input {source.paths[0]!r}: replicas read files, and again if one dies; give "
                "one, or leave out --ray"
            )
        super().__init__(config, source, target, **options)
        self._replicas = replicas

    @contextmanager
    def engine(self) -> Iterator["ray.data.Dataset"]:
        """Connect to the cluster, make the cheap checks, and describe the work."""
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
        restarts, rows = self._restarts, self.input.rows - self.done
        running = config.engine.get("max_num_seqs", _MOST_RUNNING)
        # No more for one than its part of the job, or the last engine to start would find nothing.
        in_flight = min(4 * running, -(-rows // self._replicas.least))
        size = max(1, min(_ROWS_A_BLOCK, in_flight // 4))
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
                self._tell_of_deaths(block, lives)
                for record in map(json.loads, block["records"]):
                    if not self.output.done[record["index"]]:
                        self.write(record)
        except ray.exceptions.RayError as error:
            if isinstance(error, ProxyConfigError):  # of the rows' reader; Ray adds lines to it
                raise ProxyConfigError(str(error.cause).partition("\n")[0]) from None
            raise EngineDiedError(_DIED) from error

    def _tell_of_deaths(self, block: dict, lives: dict[str, set[str]]) -> None:
        actor, process = block["replica"].split("-")
        # One that died before it answered anything had a life too.
        known = lives.setdefault(actor, {"silent"} if block["is_restarted"] else set())
        if process not in known:
            known.add(process)
            if len(known) > 1:
                self._on_restart(EngineDiedError(_DIED), self._restarts - len(known) + 1)


def _go_to(directory: str) -> None:
    """Have relative paths mean what they mean to the driver, on its own node at least."""
    with suppress(OSError):
        os.chdir(directory)


def _blocks(
    directory: str, source: Input, done: bytes, size: int, _: Any
) -> Iterator["pyarrow.Table"]:
    """Yield blocks of at most *size* lines that have no record yet."""
    import pyarrow

    _go_to(directory)
    missing = source.missing(done)
    while block := taken(missing, size, lambda line: len(line.data)):
        yield pyarrow.table({"lines": [[line._asdict() for line in block]]})
