"""vLLM's NIXL connectors, which compare all members when two engines first meet.

vLLM (0.32) compares the base's name and shape only. The engines of a pair also need the same number
of tensor-parallel ranks: NIXL splits all caches as the base's KV heads are split.
"""

import copy
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlPullConnector as PullConnector
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlPushConnector as PushConnector

from vllm_proxy.engine.compatibility import require_part
from vllm_proxy.members.identity import members_digest

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


class NixlPullConnector(PullConnector):
    """The connector with which a decoding engine fetches KV caches."""

    def __init__(
        self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig"
    ) -> None:
        super().__init__(_named_by_all_members(vllm_config), role, kv_cache_config)


class NixlPushConnector(PushConnector):
    """The connector with which an engine that reads prompts sends KV caches."""

    def __init__(
        self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig"
    ) -> None:
        super().__init__(_named_by_all_members(vllm_config), role, kv_cache_config)


NixlConnector = NixlPullConnector
"""vLLM's older name of it."""


def _named_by_all_members(vllm_config: "VllmConfig") -> "VllmConfig":
    """Return a copy in which the model's name, which vLLM compares, stands for all members."""
    require_part("NIXL")
    config, ranks = copy.copy(vllm_config), vllm_config.parallel_config.tensor_parallel_size
    config.model_config = copy.copy(config.model_config)
    config.model_config.model += f":{members_digest(vllm_config)}:{ranks}"
    return config
