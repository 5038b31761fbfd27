"""The model classes in vLLM's registry: `ProxyModel` with the request state of Model Runner V2.

vLLM asks a class, not a model, how prompts with images are processed. So there is one for each
family, made from its name.
"""

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModal

from vllm_proxy.engine.compatibility import require_part, require_supported_vllm
from vllm_proxy.members.images import FAMILIES, require_family, vllm_class_of
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


class _Processors:
    """How prompts with images are processed before the base's family is known: like that family's.

    vLLM asks for the limits of a class's modalities while it reads the base's config.
    """

    @staticmethod
    def info(ctx: Any) -> Any:
        """Return what vLLM knows of the processor of the base."""
        family = require_family(ctx.model_config)
        return _vllm_class(FAMILIES[family])._processor_factory.info(ctx)


class ProxyTunedForConditionalGeneration(ProxyTunedForCausalLM, SupportsMultiModal, SupportsMRoPE):
    """The class of `config.schema.IMAGE_ARCHITECTURE`: members, of which some see images.

    Only vLLM's configuration begins with it. The engine's model is of a subclass, one for each
    family, which `__getattr__` makes.
    """

    requires_raw_input_tokens = True  # for members that see none
    _processor_factory = _Processors

    def embed_multimodal(self, **kwargs: object) -> list[torch.Tensor]:
        """Return the members' embeddings of each image side by side; see `Sight`."""
        assert self.sight is not None  # the base sees
        return self.sight.embed_images(**kwargs)

    def get_mrope_input_positions(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, int]:
        """Return a prompt's positions as the base's family counts them; arguments as in vLLM."""
        assert self.sight is not None  # the base sees
        return self.sight.towers["base"].get_mrope_input_positions(*args, **kwargs)

    def get_language_model(self) -> "ProxyTunedForConditionalGeneration":
        """Return what generates text: the whole."""
        return self


def _vllm_class(name: str) -> Any:
    return ModelRegistry.models[name].load_model_cls()


@cache
def __getattr__(name: str) -> type:
    """Make the class for a family; called by Python for an unknown module attribute."""
    if (known := vllm_class_of(name)) is None:
        raise AttributeError(name)
    theirs = _vllm_class(known)
    own = {
        "_processor_factory": theirs._processor_factory,
        "get_placeholder_str": theirs.get_placeholder_str,
    }
    return type(name, (ProxyTunedForConditionalGeneration,), {"__module__": __name__, **own})
