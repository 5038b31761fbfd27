"""vLLM's config hooks for architectures (`MODELS_CONFIG_MAP`), run for each member.

vLLM runs the hook of the engine's architecture, which is ours. A member's hook chooses, for
example, an attention backend that has its head sizes.
"""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vllm_proxy.config.errors import ProxyConfigError, one_line
from vllm_proxy.config.roles import Role

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


def run_member_hooks(config: "VllmConfig", members: Mapping[Role, "ModelConfig"]) -> None:
    """Let each member's hook change the engine's configuration, the base's first.

    Raises:
        ProxyConfigError: a hook rejects the configuration.
    """
    for role, member in members.items():
        view = copy.copy(config)
        view.model_config = member
        if role != "base":
            # Copies, for what a small member's hook must not change: the KV cache's default dtype
            # is the base's, and answers are parsed like the base's.
            view.cache_config = copy.copy(config.cache_config)
            view.speculative_config = copy.copy(config.speculative_config)
            view.structured_outputs_config = copy.copy(config.structured_outputs_config)
        try:
            view.try_verify_and_update_config()
        except (AssertionError, ValueError) as error:
            raise ProxyConfigError(one_line(error), field=f"{role} {member.model!r}") from error
