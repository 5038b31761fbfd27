"""Where engines stand on a Ray cluster."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.engine.compatibility import require_part
from vllm_proxy.preflight.check.cluster import ray_session


class Placement(NamedTuple):
    """What each of several engines of one configuration takes of a Ray cluster.

    Attributes:
        device: Ray's name of the resource.
        sizes: tensor-parallel and pipeline-parallel.
        is_spread: whether the workers of an engine are Ray's, which may stand on several nodes.
    """

    device: str
    sizes: tuple[int, int]
    is_spread: bool

    @property
    def world_size(self) -> int:
        """Devices of one engine."""
        return self.sizes[0] * self.sizes[1]

    def room(self, nodes: list[Mapping[str, float]]) -> int:
        """Return how many engines fit on nodes with these resources."""
        devices = [int(node.get(self.device, 0)) for node in nodes]
        if self.is_spread:
            return sum(devices) // self.world_size
        return sum(n // self.world_size for n in devices)

    def resources(self) -> dict[str, Any]:
        """Return what an engine's actor takes, as Ray Data wants it said."""
        if self.is_spread:  # vLLM's workers take the devices, of the actor's placement group
            return {"num_cpus": 0}
        if self.device == "CPU":
            return {"num_cpus": self.world_size}
        if self.device == "GPU":
            return {"num_cpus": 0, "num_gpus": self.world_size}
        return {"num_cpus": 0, "resources": {self.device: self.world_size}}

    def place(self) -> dict[str, Any]:
        """Return where the next actor is to start, as Ray wants it said."""
        from ray.util import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        if not self.is_spread:
            return {}
        group = placement_group([{self.device: 1}] * self.world_size, strategy="PACK")
        return {
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                group, placement_group_capture_child_tasks=True
            )
        }


def placed(config: ProxyConfig) -> tuple[ProxyConfig, Placement]:
    """Return *config* as an actor's engine takes it, and what the engine takes of a cluster.

    Engines of several devices have workers of Ray's, unless `distributed_executor_backend` says
    otherwise; as Ray's own library for vLLM has it.
    """
    from vllm.platforms import current_platform

    engine = config.engine
    sizes = tuple(engine.get(f"{kind}_parallel_size") or 1 for kind in ("tensor", "pipeline"))
    device = current_platform.ray_device_key
    backend = engine.get("distributed_executor_backend")
    if backend is None and device and sizes != (1, 1):
        backend = "ray"
        config = config.model_copy(
            update={"engine": {**engine, "distributed_executor_backend": backend}}
        )
    return config, Placement(device or "CPU", sizes, backend == "ray")


@contextmanager
def connected(address: str | None) -> Iterator[list[Mapping[str, float]]]:
    """Be a driver of the cluster in the body; yields the resources of its nodes.

    Workers get the variables of this process that vLLM's workers get.

    Args:
        address: None for RAY_ADDRESS's, for one that runs on this machine, or else a new one.

    Raises:
        ProxyConfigError: Ray is not installed, or no cluster answers.
    """
    try:
        import ray.data
    except ModuleNotFoundError as error:
        raise ProxyConfigError(
            f"--ray: Ray Data needs {error.name}; install it: pip install 'ray[data]'"
        ) from None
    require_part("Ray")
    from vllm.ray.ray_env import get_env_vars_to_copy
    from vllm.v1.executor.ray_utils import WORKER_SPECIFIC_ENV_VARS

    names = get_env_vars_to_copy(exclude_vars=WORKER_SPECIFIC_ENV_VARS)
    env = {name: os.environ[name] for name in names if name in os.environ}
    given = address or os.environ.get("RAY_ADDRESS")
    source = "--ray" if address or not given else "RAY_ADDRESS"
    with ray_session(given, f"{source} {given!r}", runtime_env={"env_vars": env}):
        yield [node["Resources"] for node in ray.nodes() if node["Alive"]]


def replicas_problem(
    placement: Placement, nodes: list[Mapping[str, float]], replicas: int
) -> str | None:
    """Return why so many engines do not fit on *nodes*; None if they do."""
    room = placement.room(nodes)
    if room >= replicas:
        return None
    devices = sum(int(node.get(placement.device, 0)) for node in nodes)
    together = placement.world_size > 1 and not placement.is_spread
    where = ", all of an engine on one node" if together else ""
    return (
        f"--replicas {replicas}, each of tensor_parallel_size x pipeline_parallel_size = "
        f"{placement.sizes[0]} x {placement.sizes[1]} {placement.device}s{where}: the Ray cluster "
        f"has {devices} {placement.device}s on {len(nodes)} node{'s' * (len(nodes) != 1)}, enough "
        f"for {room}; ask for fewer, or add nodes"
    )
