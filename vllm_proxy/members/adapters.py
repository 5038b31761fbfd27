"""Whether a member's adapter fits its model."""

from typing import TYPE_CHECKING

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.roles import Role

if TYPE_CHECKING:
    from vllm.config import ModelConfig


def require_fitting_adapter(config: "ModelConfig", lora: str, role: Role) -> None:
    """Merge the adapter, by shapes only, into the architecture that config.json describes.

    Raises:
        ProxyConfigError: it does not fit; names the member.
    """
    from vllm_proxy.members.lora import LoraAdapter
    from vllm_proxy.members.weights import is_converted, meta_model

    try:
        adapter = LoraAdapter.read(lora, device="meta")
        model = meta_model(config)
        if model is None or is_converted(model):
            return  # names and shapes are known only when its weights are loaded
        for _ in adapter.merge(model.state_dict().items(), config.hf_text_config):
            pass  # meta tensors: nothing is computed
    except ProxyConfigError as error:
        raise error.within(role) from None
