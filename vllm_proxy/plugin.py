"""The entry point that vLLM calls in each of its processes (`vllm.general_plugins`)."""

import logging

from vllm_proxy.config.schema import ARCHITECTURE, IMAGE_ARCHITECTURE


def register() -> None:
    """Register our model classes with vLLM. May be called again; changes no other model.

    They are named, not imported: one is loaded only when a configuration uses it.
    """
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    if ARCHITECTURE in MODELS_CONFIG_MAP:
        return
    from vllm_proxy.engine.config_hook import ProxyModelConfigHook
    from vllm_proxy.members.images import FAMILIES, class_of

    for name in (ARCHITECTURE, IMAGE_ARCHITECTURE, *map(class_of, FAMILIES)):
        ModelRegistry.register_model(name, f"vllm_proxy.engine.registered:{name}")
        MODELS_CONFIG_MAP[name] = ProxyModelConfigHook
    # vLLM warns that a custom scheduler class may not support asynchronous scheduling. Ours does.
    logging.getLogger("vllm.config.scheduler").addFilter(
        lambda record: "vllm_proxy." not in str(record.args)
    )
