"""Whether a member's adapter fits its model."""

from typing import TYPE_CHECKING

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.roles import Role
from vllm_proxy.config.schema import ProxySection

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.config import ModelConfig


def require_possible_adapter(config: "ModelConfig", role: Role, section: ProxySection) -> None:
    """Reject an adapter of a quantized member that does not run in one pass.

    Its products are then added to those of the quantized layers. Elsewhere it would be merged.

    Raises:
        ProxyConfigError: names role, model and remedy.
    """
    lora = None if role == "base" else getattr(section, role).lora
    if config.quantization is None or lora is None:
        return
    if role == "expert" and section.may_run_as_one:
        return
    remedy = "use the unquantized checkpoint"
    if role == "expert" and section.model_copy(update={"one_pass": None}).may_run_as_one:
        remedy += ", or remove `one_pass: false`"
    elif role == "expert" and section.antiexpert is not None:
        remedy += ", or the same model as antiexpert"
    raise ProxyConfigError(
        f"it is quantized ({config.quantization}), and the adapter {lora!r} cannot be merged into "
        "it",
        field=f"{role} {config.model!r}",
        remedy=remedy,
    )


def architecture_tensors(config: "ModelConfig") -> "dict[str, Tensor]":
    """Return the unquantized tensors that config.json describes, on the meta device.

    Empty if names and shapes are known only when weights are loaded.
    """
    from vllm_proxy.members.weights import is_converted, meta_model

    model = meta_model(config)
    return {} if model is None or is_converted(model) else model.state_dict()


def require_fitting_adapter(config: "ModelConfig", lora: str, owner: str) -> None:
    """Merge the adapter, by shapes only, into the architecture that config.json describes.

    Raises:
        ProxyConfigError: it does not fit; names the owner, a member or an expert.
    """
    from vllm_proxy.members.lora import LoraAdapter

    try:
        adapter = LoraAdapter.read(lora, device="meta")
        adapter.require_mergeable(config.quantization)
        if tensors := architecture_tensors(config):
            for _ in adapter.merge(tensors.items(), config.hf_text_config):
                pass  # meta tensors: nothing is computed
    except ProxyConfigError as error:
        raise error.within(owner) from None
