"""The model class in vLLM's registry: `ProxyModel` with the request state of Model Runner V2."""

from typing import TYPE_CHECKING

from vllm.config import VllmConfig

from vllm_proxy.engine.compatibility import require_part, require_supported_vllm
from vllm_proxy.model.proxy_model import ProxyModel
from vllm_proxy.model.states import has_states

if TYPE_CHECKING:
    from vllm_proxy.engine.runner_v2 import ProxyModelState


class ProxyTunedForCausalLM(ProxyModel):
    """The class of `config.schema.ARCHITECTURE`, in vLLM's registry of models.

    Raises:
        ProxyConfigError: the installed vLLM lacks a name that we use or replace.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        require_supported_vllm()
        require_part("V2" if vllm_config.use_v2_model_runner else "V1")
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def get_model_state_cls(self) -> "type[ProxyModelState]":
        """Return the class of this model's state under Model Runner V2, which vLLM asks for."""
        from vllm_proxy.engine.runner_v2 import ProxyHybridState, ProxyModelState

        return ProxyHybridState if has_states(self) else ProxyModelState
