"""The entry point that vLLM calls in every one of its processes (`vllm.general_plugins`)."""

import logging

from vllm_proxy.config.schema import ARCHITECTURE


def register() -> None:
    """Make `ProxyTunedForCausalLM` known to vLLM; re-entrant, and touches no other model.

    The model class is named, not imported: it is loaded only when a configuration asks for it.
    """
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    if ARCHITECTURE in MODELS_CONFIG_MAP:
        return
    from vllm_proxy.engine.config_hook import ProxyModelConfigHook

    ModelRegistry.register_model(ARCHITECTURE, f"vllm_proxy.engine.registered:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = ProxyModelConfigHook
    # vLLM warns of every scheduler class that is not its own, that it may not be asynchronous. Ours
    # is where vLLM's would be.
    logging.getLogger("vllm.config.scheduler").addFilter(
        lambda record: "vllm_proxy." not in str(record.args)
    )
