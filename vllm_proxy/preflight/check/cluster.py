"""Whether a Ray cluster can be reached, and is large enough for the engine."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm_proxy.config.errors import ProxyConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_PATIENCE_S = 5.0
"""Most seconds to wait for an answer from the address of a cluster."""


def cluster_problem(config: "VllmConfig") -> str | None:
    """Return why the engine cannot start its workers on Ray; None if it can, or does not use Ray.

    vLLM (0.32) waits half an hour for devices that a cluster does not have.
    """
    parallel = config.parallel_config
    if parallel.distributed_executor_backend != "ray":
        return None
    import ray  # installed, or vLLM would not have built this config
    from vllm.platforms import current_platform

    address = os.environ.get("RAY_ADDRESS")
    device = current_platform.ray_device_key
    if not address or not device or ray.is_initialized():
        return None  # vLLM starts Ray on this machine, has no workers for it, or runs in a cluster
    where = f"`engine.distributed_executor_backend` is 'ray' and RAY_ADDRESS {address!r}"
    try:
        with ray_session(address, where, log_to_driver=False):
            there = int(ray.cluster_resources().get(device, 0))
    except ProxyConfigError as error:
        return str(error)
    if there < parallel.world_size:
        sizes = f"{parallel.tensor_parallel_size} x {parallel.pipeline_parallel_size}"
        return (
            f"`engine.tensor_parallel_size` x `pipeline_parallel_size` is {sizes}: the Ray cluster "
            f"at {address} has {there} {device}s for {parallel.world_size} workers; set smaller "
            "ones, or add nodes"
        )
    return None


@contextmanager
def ray_session(address: str | None, source: str, **options: Any) -> Iterator[None]:
    """Connect to Ray as a driver for the body. Raises `ProxyConfigError` that names *source*."""
    import ray

    if address and (reason := _unreachable(address)):
        raise ProxyConfigError(reason).within(source)
    try:
        try:
            ray.init(address, logging_level=logging.ERROR, **options)
        except (ConnectionError, ValueError) as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise ProxyConfigError(
                f"no cluster answers there ({reason})", remedy="correct it"
            ).within(source) from None
        yield
    finally:
        ray.shutdown()


def _unreachable(address: str) -> str | None:
    """Return why a host and port cannot be reached, or None; Ray would try for a long time."""
    host, colon, port = address.rpartition(":")
    if not (colon and port.isdecimal()):
        return None
    try:
        socket.create_connection((host.rpartition("/")[2], int(port)), _PATIENCE_S).close()
    except OSError as error:
        return (
            f"no cluster answers there ({error.strerror or error}); correct it, or start one with "
            "`ray start --head`"
        )
    return None
