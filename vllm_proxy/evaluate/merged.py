"""A vLLM model loader that merges an adapter into an ordinary model, as we do for an expert.

vLLM's own adapters support fewer kinds, and no prompt log-probabilities on a CPU (0.32).

This is not part of `tuned.py` because vLLM's workers import this module, and it imports vLLM, which
`tuned.py` must not do when it reads `--tuned`.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from vllm_proxy.members.lora import LoraAdapter

if TYPE_CHECKING:
    import torch
    from vllm.config import LoadConfig, ModelConfig


@register_model_loader("proxy_merged")
class MergingLoader(DefaultModelLoader):
    """Loads a checkpoint and the adapter that `model_loader_extra_config` names."""

    def __init__(self, load_config: "LoadConfig") -> None:
        extra = dict(load_config.model_loader_extra_config)
        self._lora = extra.pop("lora")
        load_format = extra.pop("load_format")
        config = replace(load_config, load_format=load_format, model_loader_extra_config=extra)
        super().__init__(config)

    def get_all_weights(
        self, model_config: "ModelConfig", model: "torch.nn.Module"
    ) -> "Iterator[tuple[str, torch.Tensor]]":
        """Yield the checkpoint's tensors; those that the adapter changes are in float32."""
        weights = super().get_all_weights(model_config, model)
        yield from LoraAdapter.read(self._lora).merge(weights, model_config.hf_text_config)


class Extension:
    """Adds nothing to workers. They import this module to find it, which registers the loader."""


def engine_args(lora: str, engine: dict[str, Any]) -> dict[str, Any]:
    """Return *engine* with the arguments that merge the adapter *lora* in every worker."""
    extra = {
        **engine.get("model_loader_extra_config", {}),
        "lora": lora,
        "load_format": engine.get("load_format", "auto"),
    }
    return {
        **engine,
        "load_format": "proxy_merged",
        "model_loader_extra_config": extra,
        "worker_extension_cls": f"{__name__}.{Extension.__name__}",
    }
