"""Which vLLM this is written for: its versions, and every name and parameter that must be there."""

from collections.abc import Mapping
from importlib import import_module
from inspect import Parameter, signature

from vllm_proxy.errors import ProxyConfigError

SUPPORTED_VLLM = ((0, 32), (0, 34))
"""First supported and first unsupported (major, minor) version."""

_EMBEDDING = "vllm.model_executor.layers.vocab_parallel_embedding"
SEAMS: Mapping[str, tuple[str, ...]] = {
    # the model, and how it is built and loaded
    "vllm.compilation.backends:set_model_tag": ("tag",),
    "vllm.config.utils:replace": ("dataclass_instance", "model_config", "quant_config"),
    "vllm.distributed:get_pp_group": (),
    "vllm.distributed.parallel_state:GroupCoordinator.is_last_rank": (),
    "vllm.envs:VLLM_LOGGING_LEVEL": (),
    "vllm.envs:VLLM_LOGGING_STREAM": (),
    "vllm.envs:VLLM_USE_AOT_COMPILE": (),
    "vllm.logger:_VllmLogger.info_once": ("msg", "args"),
    "vllm.logger:init_logger": ("name",),
    "vllm.model_executor.model_loader.default_loader:DefaultModelLoader.Source": (
        "model_or_path",
        "revision",
        "prefix",
    ),
    "vllm.model_executor.model_loader.default_loader:DefaultModelLoader.get_all_weights": (),
    "vllm.model_executor.model_loader.utils:process_weights_after_loading": (),
    "vllm.model_executor.models:ModelRegistry.register_model": ("model_arch", "model_cls"),
    "vllm.model_executor.models.config:MODELS_CONFIG_MAP": (),
    "vllm.model_executor.models.config:VerifyAndUpdateConfig.verify_and_update_config": (
        "vllm_config",
    ),
    "vllm.model_executor.models.config:VerifyAndUpdateConfig.verify_and_update_model_config": (
        "model_config",
    ),
    "vllm.model_executor.models.interfaces_base:VllmModel": ("vllm_config", "prefix"),
    "vllm.model_executor.models.interfaces_base:VllmModel.embed_input_ids": ("input_ids",),
    "vllm.model_executor.models.interfaces_base:VllmModel.forward": ("input_ids", "positions"),
    "vllm.model_executor.models.interfaces_base:VllmModelForTextGeneration.compute_logits": (
        "hidden_states",
    ),
    "vllm.model_executor.models.interfaces:SupportsPP.make_empty_intermediate_tensors": (),
    "vllm.model_executor.models.interfaces:SupportsPP.supports_pp": (),
    "vllm.model_executor.models.utils:init_vllm_registered_model": ("vllm_config", "prefix"),
    "vllm.platforms:current_platform": (),
    "vllm.platforms:CpuArchEnum.X86": (),
    "vllm.platforms.interface:Platform.get_cpu_architecture": (),
    "vllm.platforms.interface:Platform.is_cpu": (),
    "vllm.platforms.interface:Platform.is_cuda": (),
    "vllm.platforms.interface:Platform.is_rocm": (),
    "vllm.sequence:IntermediateTensors": ("tensors",),
    "vllm.sequence:IntermediateTensors.items": (),
    # the fused head, in the place of the members' own
    "vllm.envs:VLLM_BATCH_INVARIANT": (),
    "vllm.model_executor.layers.linear:UnquantizedLinearMethod": (),
    "vllm.model_executor.layers.logits_processor:LogitsProcessor._gather_logits": ("logits",),
    "vllm.model_executor.layers.logits_processor:LogitsProcessor.forward": (
        "lm_head",
        "hidden_states",
        "embedding_bias",
        "skip_gather",
    ),
    "vllm.model_executor.layers.logits_processor:LogitsProcessor.head_dtype": (),
    "vllm.model_executor.layers.logits_processor:LogitsProcessor.scale": (),
    "vllm.model_executor.layers.logits_processor:LogitsProcessor.soft_cap": (),
    "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm": ("layer", "remove_weight"),
    f"{_EMBEDDING}:ParallelLMHead": (),
    f"{_EMBEDDING}:UnquantizedEmbeddingMethod.apply": ("layer", "x"),
    f"{_EMBEDDING}:UnquantizedEmbeddingMethod.process_weights_after_loading": ("layer",),
    f"{_EMBEDDING}:VocabParallelEmbedding.num_embeddings_per_partition": (),
    f"{_EMBEDDING}:VocabParallelEmbedding.org_vocab_size": (),
    f"{_EMBEDDING}:VocabParallelEmbedding.params_dtype": (),
    f"{_EMBEDDING}:VocabParallelEmbedding.quant_method": (),
    f"{_EMBEDDING}:VocabParallelEmbedding.shard_indices": (),
    f"{_EMBEDDING}:VocabParallelEmbedding.tp_size": (),
    f"{_EMBEDDING}:VocabParallelEmbedding.use_fused_embedding": (),
    f"{_EMBEDDING}:VocabParallelEmbeddingShardIndices": (
        "padded_org_vocab_start_index",
        "padded_org_vocab_end_index",
        "padded_added_vocab_start_index",
        "padded_added_vocab_end_index",
        "org_vocab_start_index",
        "org_vocab_end_index",
        "added_vocab_start_index",
        "added_vocab_end_index",
    ),
    # adapters
    "vllm.lora.peft_helper:PEFTHelper.from_dict": ("config_dict",),
    "vllm.lora.peft_helper:PEFTHelper.get_rank_and_scaling": ("module_name",),
    "vllm.lora.peft_helper:PEFTHelper.use_dora": (),
    "vllm.lora.utils:get_adapter_absolute_path": ("lora_path",),
    # quantization
    "vllm.model_executor.layers.quantization.base_config:QuantizationConfig.get_quant_method": (
        "layer",
        "prefix",
    ),
    "vllm.scalar_type:scalar_types.uint4": (),
    "vllm.scalar_type:scalar_types.uint4b8": (),
    # configurations
    "vllm.config:CacheConfig": ("sliding_window",),
    "vllm.config:CacheConfig.cache_dtype": (),
    "vllm.config:LoadConfig": (),
    "vllm.config:LoadConfig.load_format": (),
    "vllm.config:ModelConfig": (
        "model",
        "revision",
        "served_model_name",
        "tokenizer",
        "tokenizer_revision",
        "tokenizer_mode",
        "trust_remote_code",
        "hf_config_path",
        "hf_overrides",
        "code_revision",
        "quantization",
        "dtype",
        "max_model_len",
        "enable_prompt_embeds",
    ),
    "vllm.config:ModelConfig.architecture": (),
    "vllm.config:ModelConfig.get_and_verify_max_len": ("max_model_len",),
    "vllm.config:ModelConfig.get_diff_sampling_param": (),
    "vllm.config:ModelConfig.get_hidden_size": (),
    "vllm.config:ModelConfig.get_sliding_window": (),
    "vllm.config:ModelConfig.get_total_num_hidden_layers": (),
    "vllm.config:ModelConfig.get_vocab_size": (),
    "vllm.config:ModelConfig.has_inner_state": (),
    "vllm.config:ModelConfig.hf_config": (),
    "vllm.config:ModelConfig.hf_text_config": (),
    "vllm.config:ModelConfig.is_encoder_decoder": (),
    "vllm.config:ModelConfig.is_hybrid": (),
    "vllm.config:ModelConfig.is_multimodal_model": (),
    "vllm.config:ModelConfig.is_quantized": (),
    "vllm.config:ModelConfig.is_submodel_config": (),
    "vllm.config:ModelConfig.model_arch_config": (),
    "vllm.config:ModelConfig.runner_type": (),
    "vllm.config:ModelConfig.try_get_generation_config": (),
    "vllm.config:ModelConfig.use_mla": (),
    "vllm.config:ModelConfig.verify_with_parallel_config": ("parallel_config",),
    "vllm.config:ModelConfig.enforce_eager": (),
    "vllm.config:ParallelConfig.pipeline_parallel_size": (),
    "vllm.config:ParallelConfig.tensor_parallel_size": (),
    "vllm.config:SchedulerConfig.disable_hybrid_kv_cache_manager": (),
    "vllm.config:SchedulerConfig.max_num_batched_tokens": (),
    "vllm.config:SchedulerConfig.max_num_seqs": (),
    "vllm.config:VllmConfig": (
        "model_config",
        "cache_config",
        "load_config",
        "lora_config",
        "parallel_config",
        "quant_config",
        "scheduler_config",
        "speculative_config",
        "structured_outputs_config",
    ),
    "vllm.config:VllmConfig.use_v2_model_runner": (),
    "vllm.config:VllmConfig.get_quantization_config": ("model_config", "load_config"),
    "vllm.config.model:try_match_architecture_defaults": ("architecture",),
    "vllm.config.model_arch:ModelArchitectureConfig.__getitem__": ("layer_idx",),
    "vllm.config.model_arch:ModelArchitectureConfig.head_size": (),
    "vllm.config.model_arch:ModelArchitectureConfig.total_num_attention_heads": (),
    "vllm.config.model_arch:ModelArchitectureConfig.total_num_kv_heads": (),
    "vllm.utils.torch_utils:kv_cache_dtype_str_to_dtype": ("kv_cache_dtype", "model_config"),
    # engine and requests
    "vllm:EngineArgs": (
        "model",
        "revision",
        "hf_overrides",
        # that a check looks at, or reads members with
        "allow_deprecated_quantization",
        "code_revision",
        "config_format",
        "convert",
        "disable_sliding_window",
        "enable_lora",
        "enable_prompt_embeds",
        "hf_config_path",
        "hf_token",
        "load_format",
        "max_model_len",
        "model_impl",
        "override_generation_config",
        "quantization",
        "runner",
        "skip_tokenizer_init",
        "tokenizer",
        "tokenizer_mode",
        "tokenizer_revision",
        "trust_remote_code",
        # that say where a batch job runs
        "cpu_offload_gb",
        "disable_log_stats",
        "distributed_executor_backend",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "max_num_batched_tokens",
        "max_num_seqs",
        "pipeline_parallel_size",
        "tensor_parallel_size",
        "use_tqdm_on_load",
    ),
    "vllm:EngineArgs.create_engine_config": ("usage_context",),
    "vllm:EngineArgs.create_model_config": (),
    "vllm:LLM": ("model", "revision", "hf_overrides"),
    "vllm:LLM.default_sampling_params": (),
    "vllm:LLM.enqueue": ("prompts", "sampling_params", "use_tqdm"),
    "vllm:LLM.enqueue_chat": ("messages", "sampling_params", "use_tqdm"),
    "vllm:LLM.get_default_sampling_params": (),
    "vllm:LLM.llm_engine": (),
    "vllm:LLM.model_config": (),
    "vllm:LLMEngine.engine_core": (),
    "vllm:LLMEngine.step": (),
    "vllm:LLMEngine.tokenizer": (),
    "vllm:LLMEngine.vllm_config": (),
    "vllm:CompletionOutput": ("text", "token_ids", "logprobs", "finish_reason"),
    "vllm:RequestOutput.finished": (),
    "vllm:RequestOutput.outputs": (),
    "vllm:RequestOutput.prompt_logprobs": (),
    "vllm:RequestOutput.prompt_token_ids": (),
    "vllm:RequestOutput.request_id": (),
    "vllm:SamplingParams": (
        "n",
        "stop",
        "bad_words",
        "logprobs",
        "prompt_logprobs",
        "structured_outputs",
        "repetition_detection",
        # the engine's own, or of no use in a batch job
        "output_kind",
        "stream_interval",
        "skip_clone",
        "output_text_buffer_length",
        # that a server has defaults for
        "frequency_penalty",
        "min_p",
        "presence_penalty",
        "repetition_penalty",
        "temperature",
        "top_k",
        "top_p",
        # that `generate` has options for
        "max_tokens",
        "seed",
    ),
    "vllm:SamplingParams.verify": (
        "model_config",
        "speculative_config",
        "structured_outputs_config",
        "tokenizer",
    ),
    "vllm.entrypoints.cli.main:main": (),
    "vllm.exceptions:VLLMClientError": (),
    "vllm.logprobs:Logprob": ("logprob", "decoded_token"),
    "vllm.sampling_params:RepetitionDetectionParams": (),
    "vllm.sampling_params:SamplingParams": (),
    "vllm.sampling_params:StructuredOutputsParams": (),
    "vllm.tokenizers:get_tokenizer": ("tokenizer_name", "tokenizer_mode", "trust_remote_code"),
    "vllm.usage.usage_lib:UsageContext.LLM_CLASS": (),
    "vllm.v1.engine.core_client:EngineCoreClient.shutdown": (),
}
"""What must exist in the installed vLLM: `module:attribute` -> the parameters that we pass, or that
vLLM passes to what we put in its place. `tests/test_compatibility.py` looks it all up in the newest
supported vLLM, too."""


def require_supported_vllm() -> None:
    """Check the installed vLLM's version and the presence of every seam.

    Raises:
        ProxyConfigError: naming the version, or the first missing seam or parameter.
    """
    import vllm

    low, high = (".".join(map(str, version)) for version in SUPPORTED_VLLM)
    remedy = f"install a version >= {low}, < {high}"
    try:
        installed = tuple(int(part) for part in vllm.__version__.split(".")[:2])
    except ValueError:
        installed = None  # a source build ("dev"): the seams below decide
    if installed is not None and not SUPPORTED_VLLM[0] <= installed < SUPPORTED_VLLM[1]:
        raise ProxyConfigError(f"vllm {vllm.__version__} is not supported; {remedy}")
    for seam, parameters in SEAMS.items():
        module, _, path = seam.partition(":")
        try:
            target = import_module(module)
            for name in path.split("."):
                if not hasattr(target, name) and name in _instance_names(target):
                    target = None
                else:
                    target = getattr(target, name)
        except (ImportError, AttributeError):
            raise ProxyConfigError(f"vllm {vllm.__version__} has no `{seam}`; {remedy}") from None
        known = signature(target).parameters if parameters else {}
        if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in known.values()):
            continue
        for name in parameters:
            if name not in known:
                raise ProxyConfigError(
                    f"vllm {vllm.__version__}: `{seam}` has no parameter `{name}`; {remedy}"
                )


def _instance_names(owner: object) -> set[str]:
    """Return what instances of a class may have: what it declares, or names while it makes one."""
    names = {*getattr(owner, "__annotations__", ()), *getattr(owner, "__dataclass_fields__", ())}
    for maker in ("__init__", "__post_init__"):
        code = getattr(getattr(owner, maker, None), "__code__", None)
        names.update(code.co_names if code else ())
    return names
