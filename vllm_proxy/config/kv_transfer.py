"""Which of vLLM's KV connectors can serve several members. Imports no vLLM."""

from collections.abc import Iterator, Mapping
from typing import Any

from vllm_proxy.config.errors import ProxyConfigError

NIXL = ("NixlConnector", "NixlPullConnector", "NixlPushConnector")
"""They compare what the engines of a pair have, when these first meet."""
CONNECTORS = (
    *NIXL,
    *("OffloadingConnector", "SimpleCPUOffloadConnector", "MooncakeStoreConnector"),
    *("LMCacheMPConnector", "MultiConnector", "DecodeBenchConnector"),
)
"""Those that find blocks by vLLM's hashes of them or by a request's salt, or compare the engines.
Others would give one engine the keys and values of another's expert."""
OURS = "vllm_proxy.engine.nixl"
"""The module of the classes that are used for `NIXL`."""


def connector_problem(config: Any, section: str = "") -> ProxyConfigError | None:
    """Return the error for a connector that does not tell engines of different members apart.

    Args:
        config: the engine argument `kv_transfer_config`, as a mapping.
        section: what precedes its name where the user wrote it: `engine.`, or nothing.
    """
    for one in _connectors(config):
        name = one.get("kv_connector")
        path, extra = one.get("kv_connector_module_path"), _extra(one)
        if name not in CONNECTORS or path not in (None, OURS):
            field, value = "kv_connector", name if path is None else f"{path}.{name}"
            problem = "it does not tell engines with the same base and different experts apart"
            remedy = f"use one of {', '.join(CONNECTORS)}"
        elif name in NIXL and not extra.get("enforce_handshake_compat", True):
            field, value = "kv_connector_extra_config.enforce_handshake_compat", False
            problem = "engines with different experts would send each other their KV caches"
            remedy = "remove it"
        else:
            continue
        field = f"{section}kv_transfer_config.{field}"
        return ProxyConfigError(problem, field=field, value=value, remedy=remedy)
    return None


def _connectors(config: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the settings of each connector, also of those that a `MultiConnector` holds."""
    if not isinstance(config, Mapping) or config.get("kv_connector") is None:
        return  # vLLM reports what it cannot parse
    yield config
    if config["kv_connector"] == "MultiConnector":
        for child in _extra(config).get("connectors") or ():
            yield from _connectors(child)


def _extra(config: Mapping[str, Any]) -> Mapping[str, Any]:
    extra = config.get("kv_connector_extra_config")
    return extra if isinstance(extra, Mapping) else {}


def with_our_nixl(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a connector with our class instead of vLLM's, where we have one."""
    changed = dict(config)
    if config.get("kv_connector") in NIXL:
        changed["kv_connector_module_path"] = OURS
    extra = dict(_extra(config))
    if extra.get("connectors"):
        extra["connectors"] = [with_our_nixl(child) for child in extra["connectors"]]
        changed["kv_connector_extra_config"] = extra
    return changed
