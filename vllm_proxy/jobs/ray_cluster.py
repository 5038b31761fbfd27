"""Where engines are placed on a Ray cluster."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.engine.compatibility import require_part
from vllm_proxy.preflight.check.cluster import ray_session


class Placement(NamedTuple):
    """The resources of a Ray cluster that each engine of a configuration needs.

    Attributes:
        device: Ray's name of the resource: `GPU`, `CPU`, ….
        sizes: tensor-parallel and pipeline-parallel size.
        is_spread: whether an engine's workers are Ray's, so that they can be on several nodes.
    """

    device: str
    sizes: tuple[int, int]
    is_spread: bool

    @property
    def world_size(self) -> int:
        """Number of devices of one engine."""
        return self.sizes[0] * self.sizes[1]

    def room(self, nodes: list[Mapping[str, float]]) -> int:
        """Return the number of engines that fit on nodes with these resources."""
        devices = [int(node.get(self.device, 0)) for node in nodes]
        if self.is_spread:
            return sum(devices) // self.world_size
        return sum(n // self.world_size for n in devices)

    def resources(self) -> dict[str, Any]:
        """Return the resources of an engine's actor, as arguments of Ray Data."""
        if self.is_spread:  # vLLM's workers take the devices of the actor's placement group
            return {"num_cpus": 0}
        if self.device == "CPU":
            return {"num_cpus": self.world_size}
        if self.device == "GPU":
            return {"num_cpus": 0, "num_gpus": self.world_size}
        return {"num_cpus": 0, "resources": {self.device: self.world_size}}

    def place(self) -> dict[str, Any]:
        """Return where the next actor starts, as arguments of Ray."""
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
    """Return the configuration of an actor's engine, and the placement of each engine.

    An engine with several devices uses Ray's workers unless `distributed_executor_backend` is set,
    as in Ray's own library for vLLM.
    """
    from vllm.platforms import current_platform

    engine = config.engine
    tensor, pipeline = (engine.get(f"{kind}_parallel_size") or 1 for kind in ("tensor", "pipeline"))
    sizes = tensor, pipeline
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
    """Connect to a cluster as its driver; yields the resources of its nodes.

    Workers get the same environment variables as vLLM's own workers.

    Args:
        address: of the cluster; None means the one in RAY_ADDRESS, or else one that runs on this
            machine, or else a new one.

    Raises:
        ProxyConfigError: Ray is not installed, or no cluster answers.
    """
    try:
        import ray.data
    except ModuleNotFoundError as error:
        raise ProxyConfigError(
            f"Ray Data needs {error.name}", field="--ray", remedy="pip install 'ray[data]'"
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
    """Return why *replicas* engines do not fit on *nodes*; None if they fit."""
    room = placement.room(nodes)
    if room >= replicas:
        return None
    devices = sum(int(node.get(placement.device, 0)) for node in nodes)
    together = placement.world_size > 1 and not placement.is_spread
    where = ", with all devices of an engine on one node" if together else ""
    return (
        f"--replicas {replicas}, each of tensor_parallel_size x pipeline_parallel_size = "
        f"{placement.sizes[0]} x {placement.sizes[1]} {placement.device}s{where}: the Ray cluster "
        f"has {devices} {placement.device}s on {len(nodes)} node{'s' * (len(nodes) != 1)}, enough "
        f"for {room}; use fewer replicas, or add nodes"
    )
