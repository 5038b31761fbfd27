"""vLLM's config hooks for architectures (`MODELS_CONFIG_MAP`), run for each member.

vLLM runs the hook of the engine's architecture, which is ours. A member's hook chooses, for
example, an attention backend that has its head sizes.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vllm_proxy.config.errors import ProxyConfigError, one_line
from vllm_proxy.config.roles import Role
from vllm_proxy.members.recurrent import is_recurrent, member_view, share_state_settings

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


def run_member_hooks(config: "VllmConfig", members: Mapping[Role, "ModelConfig"]) -> None:
    """Let each member's hook change the engine's configuration, the base's first.

    Raises:
        ProxyConfigError: a hook rejects the configuration.
    """
    cache, recurrent = config.cache_config, []
    wanted = cache.mamba_ssm_cache_dtype
    for role, member in members.items():
        view = member_view(config, member)
        if role == "base":
            # The KV cache's default dtype is the base's, and answers are parsed like the base's.
            view.cache_config = cache
            view.speculative_config = config.speculative_config
            view.structured_outputs_config = config.structured_outputs_config
        try:
            view.try_verify_and_update_config()
        except (AssertionError, ValueError) as error:
            raise ProxyConfigError(one_line(error), field=f"{role} {member.model!r}") from error
        if is_recurrent(member):
            recurrent.append(view.cache_config)
    cache.mamba_ssm_cache_dtype = wanted  # each member has its own: `member_vllm_config`
    share_state_settings(cache, recurrent)
