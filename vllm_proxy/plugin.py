"""The entry point that vLLM calls in each of its processes (`vllm.general_plugins`)."""

import logging

from vllm_proxy.config.schema import ARCHITECTURE


def register() -> None:
    """Register `ProxyTunedForCausalLM` with vLLM. May be called again; changes no other model.

    The model class is named, not imported: it is loaded only when a configuration uses it.
    """
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    if ARCHITECTURE in MODELS_CONFIG_MAP:
        return
    from vllm_proxy.engine.config_hook import ProxyModelConfigHook

    ModelRegistry.register_model(ARCHITECTURE, f"vllm_proxy.engine.registered:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = ProxyModelConfigHook
    # vLLM warns that a custom scheduler class may not support asynchronous scheduling. Ours does.
    logging.getLogger("vllm.config.scheduler").addFilter(
        lambda record: "vllm_proxy." not in str(record.args)
    )
