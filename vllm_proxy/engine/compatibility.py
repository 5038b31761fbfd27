"""The versions of vLLM that this package supports, and vLLM's names and parameters that it uses.

They are checked when an engine starts, so that a vLLM without one of them is one clear line and not
a traceback. What the package replaces in vLLM, and why, is listed in `replacements.py`.
"""

from collections.abc import Mapping
from importlib import import_module
from inspect import Parameter, signature, unwrap
from typing import Any

from vllm_proxy.config.engine_arguments import RESOURCES, SERVER_SAMPLING
from vllm_proxy.config.errors import ProxyConfigError

SUPPORTED_VLLM = ((0, 32), (0, 34))
"""First supported and first unsupported (major, minor) version."""
_RANGE = tuple(".".join(map(str, version)) for version in SUPPORTED_VLLM)

_EMBEDDING = "vllm.model_executor.layers.vocab_parallel_embedding"
_GPU = "vllm.v1.worker.gpu"
_DRAFTS = "vllm.v1.spec_decode"
_SPECULATOR = f"{_GPU}.spec_decode.standalone_ar.speculator"
_LOADED = "param", "loaded_weight"
_MIXTURE = "vllm.model_executor.layers.fused_moe"
_MODELS = "vllm.entrypoints.openai.models.serving"
_NIXL = "vllm.distributed.kv_transfer.kv_connector.v1.nixl"
_OUTPUT = "vllm.v1.engine.output_processor"
_RELOAD = "vllm.model_executor.model_loader.reload"
_RUNNER = "vllm.v1.worker.gpu_model_runner"
_TRANSFER = "vllm.distributed.weight_transfer.base:WeightTransferEngine"
_WORKER = "vllm.v1.worker.gpu_worker:Worker"
REQUIRED: Mapping[str, tuple[str, ...]] = {
    # the model, and how it is built and loaded
    "vllm.compilation.backends:set_model_tag": ("tag",),
    "vllm.compilation.breakable_cudagraph:is_breakable_cudagraph_enabled": (),
    "vllm.config.utils:replace": ("dataclass_instance", "model_config", "quant_config"),
    "vllm.distributed:get_pp_group": (),
    "vllm.distributed:tensor_model_parallel_all_gather": ("input_",),
    "vllm.distributed.parallel_state:GroupCoordinator.is_last_rank": (),
    "vllm.envs:VLLM_CPU_NUM_OF_RESERVED_CPU": (),
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
    "vllm.model_executor.model_loader:register_model_loader": ("load_format",),
    "vllm.model_executor.model_loader.utils:process_weights_after_loading": (),
    f"{_MIXTURE}.fused_moe_method_base:FusedMoEMethodBase.moe_kernel": (),
    f"{_MIXTURE}.unquantized_fused_moe_method:UnquantizedFusedMoEMethod": (),
    "vllm._custom_ops:create_onednn_scaled_mm": ("weight", "weight_scales"),
    f"{_RELOAD}:finalize_layerwise_reload": (),
    f"{_RELOAD}:initialize_layerwise_reload": ("model",),
    f"{_RELOAD}.layerwise:_get_original_loader": ("tensor",),
    f"{_RELOAD}.layerwise:get_layerwise_info": ("layer",),
    f"{_RELOAD}.meta:restore_layer_on_meta": ("layer", "info"),
    f"{_RELOAD}.meta:to_meta_tensor": ("tensor",),
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
    "vllm.transformers_utils.config:checkpoint_has_lm_head": ("model", "revision"),
    "vllm.platforms:current_platform": (),
    "vllm.platforms:CpuArchEnum.X86": (),
    "vllm.platforms.interface:Platform.get_cpu_architecture": (),
    "vllm.platforms.interface:Platform.is_cpu": (),
    "vllm.platforms.interface:Platform.is_cuda": (),
    "vllm.platforms.interface:Platform.is_rocm": (),
    "vllm.sequence:IntermediateTensors": ("tensors",),
    "vllm.sequence:IntermediateTensors.items": (),
    # the fused head, which replaces the members' heads
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
    # small members in one pass
    "vllm.config:CompilationConfig.cache_dir": (),
    "vllm.config:CompilationConfig.compile_ranges_endpoints": (),
    "vllm.config:CompilationConfig.pass_config": (),
    "vllm.config:PassConfig.flashinfer_max_size": ("world_size",),
    "vllm.config:PassConfig.fuse_allreduce_rms": (),
    "vllm.model_executor.layers.attention:Attention.forward": ("query", "key", "value"),
    "vllm.model_executor.layers.linear:ColumnParallelLinear.weight_loader": _LOADED,
    "vllm.model_executor.layers.linear:ColumnParallelLinear.output_size_per_partition": (),
    "vllm.model_executor.layers.linear:LinearBase.output_size": (),
    "vllm.model_executor.layers.linear:LinearBase.params_dtype": (),
    "vllm.model_executor.layers.linear:LinearBase.quant_method": (),
    "vllm.model_executor.layers.linear:LinearBase.requires_unquantized_input": (),
    "vllm.model_executor.layers.linear:LinearMethodBase.apply": ("layer", "x", "bias"),
    "vllm.model_executor.layers.linear:QKVParallelLinear.weight_loader": (
        *_LOADED,
        "loaded_shard_id",
    ),
    "vllm.model_executor.layers.linear:RowParallelLinear.input_size_per_partition": (),
    "vllm.model_executor.layers.linear:RowParallelLinear.weight_loader": _LOADED,
    "vllm.model_executor.models.utils:PPMissingLayer": (),
    "vllm.model_executor.utils:set_weight_attrs": ("weight", "weight_attrs"),
    # quantization
    "vllm.model_executor.layers.quantization.base_config:QuantizationConfig.get_quant_method": (
        "layer",
        "prefix",
    ),
    "vllm.scalar_type:scalar_types.uint4": (),
    "vllm.scalar_type:scalar_types.uint4b8": (),
    # configurations
    "vllm.config:CacheConfig": ("sliding_window",),
    "vllm.config:CompilationConfig.mode": (),
    "vllm.config:CompilationConfig.static_all_moe_layers": (),
    "vllm.config:CompilationConfig.static_forward_context": (),
    "vllm.config:CompilationMode.NONE": (),
    "vllm.config:VllmConfig.compilation_config": (),
    "vllm.config:CacheConfig.cache_dtype": (),
    "vllm.config:CacheConfig.kv_offloading_size": (),
    "vllm.config:KVTransferConfig": (
        "kv_connector",
        "kv_connector_module_path",
        "kv_connector_extra_config",
    ),
    "vllm.config:VllmConfig.kv_transfer_config": (),
    "vllm.config.cache:CacheDType": (),
    "vllm.v1.kv_cache_interface:SlidingWindowSpec": ("sliding_window", "block_size"),
    "vllm.v1.outputs:LogprobsTensors": (),
    "vllm.v1.outputs:ModelRunnerOutput": ("prompt_logprobs_dict",),
    "vllm.config:LoadConfig": (),
    "vllm.config:LoadConfig.load_format": (),
    "vllm.config:LoadConfig.model_loader_extra_config": (),
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
    "vllm.config:ModelConfig.is_moe": (),
    "vllm.config:ModelConfig.is_multimodal_model": (),
    "vllm.config:ModelConfig.is_quantized": (),
    "vllm.config:ModelConfig.is_submodel_config": (),
    "vllm.config:ModelConfig.maybe_untie_word_embeddings": (),
    "vllm.config:ModelConfig.word_embeddings_untied_by_checkpoint": (),
    "vllm.config:ModelConfig.model_arch_config": (),
    "vllm.config:ModelConfig.model_weights": (),
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
    "vllm.config:VllmConfig.aux_output_config": (),
    "vllm.config:AuxOutputConfig.enable_return_routed_experts": (),
    "vllm.config:VllmConfig.try_verify_and_update_config": (),
    "vllm.config:VllmConfig.use_v2_model_runner": (),
    "vllm.config:VllmConfig.get_quantization_config": ("model_config", "load_config"),
    "vllm.config.model:try_match_architecture_defaults": ("architecture",),
    "vllm.config.model_arch:ModelArchitectureConfig.__getitem__": ("layer_idx",),
    "vllm.config.model_arch:ModelArchitectureConfig.head_size": (),
    "vllm.config.model_arch:ModelArchitectureConfig.total_num_attention_heads": (),
    "vllm.config.model_arch:ModelArchitectureConfig.total_num_kv_heads": (),
    "vllm.utils.torch_utils:async_tensor_h2d": ("data", "device", "dtype"),
    "vllm.utils.torch_utils:kv_cache_dtype_str_to_dtype": ("kv_cache_dtype", "model_config"),
    "vllm.utils.torch_utils:resolve_kv_cache_dtype_string": ("kv_cache_dtype", "model_config"),
    "vllm.config:CompilationConfig.cudagraph_mode": (),
    "vllm.config:CUDAGraphMode.NONE": (),
    "vllm.config:CUDAGraphMode.PIECEWISE": (),
    "vllm.config:ModelConfig.logits_processors": (),
    "vllm.config:ParallelConfig.data_parallel_size": (),
    "vllm.config:ParallelConfig.decode_context_parallel_size": (),
    "vllm.config:ParallelConfig.enable_dbo": (),
    "vllm.config:ParallelConfig.enable_eplb": (),
    "vllm.config:ParallelConfig.enable_ep_weight_filter": (),
    "vllm.config:ParallelConfig.enable_expert_parallel": (),
    "vllm.config:OffloadConfig.offload_backend": (),
    "vllm.config:OffloadConfig.prefetch": (),
    "vllm.config:VllmConfig.offload_config": (),
    "vllm.config.offload:PrefetchOffloadConfig.offload_group_size": (),
    "vllm.config:ModelConfig.get_num_experts": (),
    "vllm.config:ParallelConfig.ubatch_size": (),
    "vllm.config:ParallelConfig.is_moe_model": (),
    "vllm.config:ParallelConfig.prefill_context_parallel_size": (),
    "vllm.config:ParallelConfig.worker_cls": (),
    "vllm.config:ParallelConfig.worker_extension_cls": (),
    "vllm.config:CacheConfig.kv_sharing_fast_prefill": (),
    "vllm.v1.worker.worker_base:WorkerBase.get_model": (),
    "vllm.config:SchedulerConfig.async_scheduling": (),
    "vllm.config:SchedulerConfig.get_scheduler_cls": (),
    "vllm.config:SchedulerConfig.scheduler_cls": (),
    "vllm.config:SpeculativeConfig.enable_adaptive_verification": (),
    "vllm.config:SpeculativeConfig": (
        "method",
        "model",
        "revision",
        "num_speculative_tokens",
        "num_speculative_tokens_per_batch_size",
    ),
    "vllm.config:get_layers_from_vllm_config": ("vllm_config", "layer_type"),
    "vllm.forward_context:set_forward_context": (
        "attn_metadata",
        "vllm_config",
        "num_tokens",
        "cudagraph_runtime_mode",
        "slot_mapping",
    ),
    "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase": (),
    # prompts of members: attention as one member sees it
    "vllm.forward_context:ForwardContext": (
        "attn_metadata",
        "slot_mapping",
        "cudagraph_runtime_mode",
        "batch_descriptor",
        "is_padding",
    ),
    "vllm.forward_context:ForwardContext.moe_layer_index": (),
    "vllm.forward_context:get_forward_context": (),
    "vllm.forward_context:override_forward_context": ("forward_context",),
    "vllm.v1.attention.backend:CommonAttentionMetadata": (
        "query_start_loc",
        "query_start_loc_cpu",
        "seq_lens",
        "seq_lens_cpu_upper_bound",
        "num_reqs",
        "num_actual_tokens",
        "max_query_len",
        "max_seq_len",
        "block_table_tensor",
        "slot_mapping",
        "positions",
        "is_prefilling",
    ),
    "vllm.v1.worker.utils:AttentionGroup.build_metadata": ("common_attn_metadata",),
    "vllm.v1.worker.utils:AttentionGroup.layer_names": (),
    # requests: where they are admitted and scheduled
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler": (),
    "vllm.v1.core.sched.output:NewRequestData": ("req_id", "prompt_token_ids", "sampling_params"),
    "vllm.v1.core.sched.scheduler:Scheduler": ("vllm_config", "block_size"),
    "vllm.v1.core.sched.scheduler:Scheduler.add_request": ("request",),
    "vllm.v1.core.sched.output:SchedulerOutput.num_scheduled_tokens": (),
    "vllm.v1.core.sched.output:SchedulerOutput.num_spec_tokens_to_schedule": (),
    "vllm.v1.core.sched.scheduler:Scheduler.block_size": (),
    "vllm.v1.core.sched.scheduler:Scheduler.dynamic_sd_lookup": (),
    "vllm.v1.core.sched.scheduler:Scheduler.make_spec_decoding_stats": (
        "spec_decoding_stats",
        "num_draft_tokens",
        "num_accepted_tokens",
    ),
    "vllm.v1.core.sched.scheduler:Scheduler.schedule": (),
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": ("scheduler_output",),
    "vllm.v1.core.sched.scheduler:Scheduler.max_model_len": (),
    "vllm.v1.request:Request": ("request_id", "prompt_token_ids", "sampling_params", "cache_salt"),
    "vllm.v1.request:Request._all_token_ids": (),
    "vllm.v1.request:Request.block_hashes": (),
    "vllm.v1.request:Request.num_prompt_tokens": (),
    "vllm.v1.request:Request.update_block_hashes": (),
    "vllm.v1.sample.logits_processor.interface:LogitsProcessor.validate_params": (
        "sampling_params",
    ),
    f"{_GPU}.sample.logits_processor.interface:LogitsProcessor.validate_params": (
        "sampling_params",
    ),
    f"{_GPU}.sample.logits_processor.interface:LogitsProcessor.add_request": (
        "req_idx",
        "sampling_params",
    ),
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
        "model_loader_extra_config",
        "model_impl",
        "override_generation_config",
        "quantization",
        "runner",
        "skip_tokenizer_init",
        "tokenizer",
        "tokenizer_mode",
        "tokenizer_revision",
        "trust_remote_code",
        "worker_extension_cls",
        *sorted(RESOURCES),  # where a batch job runs
    ),
    "vllm:EngineArgs.create_engine_config": ("usage_context",),
    "vllm:ModelRegistry.models": (),
    "vllm:EngineArgs.create_model_config": (),
    "vllm:LLM": ("model", "revision", "hf_overrides"),
    "vllm:LLM.default_sampling_params": (),
    "vllm:LLM.beam_search": ("prompts", "params"),
    "vllm:LLM.chat": ("messages", "sampling_params", "use_tqdm"),
    "vllm:LLM.generate": ("prompts", "sampling_params"),
    "vllm:LLM.enqueue": ("prompts", "sampling_params", "use_tqdm"),
    "vllm:LLM._preprocess_chat": (
        "conversations",
        "chat_template",
        "chat_template_content_format",
        "chat_template_kwargs",
        "add_generation_prompt",
        "continue_final_message",
        "tools",
        "tokenization_kwargs",
        "mm_processor_kwargs",
    ),
    "vllm:LLM._preprocess_cmpl": ("prompts",),
    "vllm:LLM.collective_rpc": ("method", "args"),
    "vllm:LLM.chat_template": (),
    "vllm:LLM.enqueue_chat": (
        "messages",
        "sampling_params",
        "use_tqdm",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template_kwargs",
    ),
    "vllm:LLM.get_default_sampling_params": (),
    "vllm:LLM.get_tokenizer": (),
    "vllm:LLM.llm_engine": (),
    "vllm:LLM.model_config": (),
    "vllm:LLM.renderer": (),
    "vllm:LLMEngine.engine_core": (),
    "vllm:LLMEngine.step": (),
    "vllm:LLMEngine.abort_request": ("request_ids", "internal"),
    "vllm:LLMEngine.has_unfinished_requests": (),
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
        *sorted(SERVER_SAMPLING),
        # that `generate` has options for
        "max_tokens",
        "seed",
        # of a request that inspects
        "detokenize",
        "extra_args",
        # that limit what may be generated
        "allowed_token_ids",
        "logit_bias",
        "min_tokens",
    ),
    "vllm:SamplingParams.all_stop_token_ids": (),
    "vllm:SamplingParams.bad_words_token_ids": (),
    "vllm:SamplingParams.eos_token_id": (),
    "vllm:SamplingParams.verify": (
        "model_config",
        "speculative_config",
        "structured_outputs_config",
        "tokenizer",
    ),
    "vllm.entrypoints.cli.main:main": (),
    "vllm.inputs:EmbedsPrompt": (),
    "vllm.inputs:TokensPrompt": (),
    "vllm.exceptions:VLLMClientError": (),
    "vllm.exceptions:VLLMValidationError": (),
    "vllm.logprobs:Logprob": ("logprob", "decoded_token"),
    "vllm.renderers:ChatParams": (
        "chat_template",
        "chat_template_content_format",
        "chat_template_kwargs",
    ),
    "vllm.renderers:TokenizeParams": ("add_special_tokens",),
    "vllm.renderers:merge_kwargs": (),
    "vllm.renderers.base:BaseRenderer": ("config", "tokenizer"),
    "vllm.renderers.base:BaseRenderer.config": (),
    "vllm.renderers.base:BaseRenderer.default_chat_tok_params": (),
    "vllm.renderers.base:BaseRenderer.model_config": (),
    "vllm.renderers.base:BaseRenderer.render_chat": ("conversations", "chat_params", "tok_params"),
    "vllm.renderers.base:BaseRenderer.tokenizer": (),
    "vllm.renderers.chat_utils:has_non_text_content": ("messages",),
    "vllm.sampling_params:RepetitionDetectionParams": (),
    "vllm.sampling_params:SamplingParams": (),
    "vllm.sampling_params:StructuredOutputsParams": (),
    "vllm.sampling_params:StructuredOutputsParams.all_constraints_none": (),
    "vllm.tokenizers:TokenizerLike": (),
    "vllm.tokenizers:TokenizerLike.max_chars_per_token": (),
    "vllm.tokenizers:get_tokenizer": (
        "tokenizer_name",
        "tokenizer_mode",
        "trust_remote_code",
        "revision",
    ),
    "vllm.usage.usage_lib:UsageContext.LLM_CLASS": (),
    "vllm.v1.engine.core_client:EngineCoreClient.shutdown": (),
    "vllm.v1.engine.core_client:SyncMPClient.output_queue_thread": (),
    "vllm.v1.engine.core_client:SyncMPClient.outputs_queue": (),
    "vllm.v1.engine.exceptions:EngineDeadError": (),
    "vllm.v1.engine:EngineCoreRequest": ("prompt_token_ids", "sampling_params"),
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs": (),
}
"""What must exist in the installed vLLM: `module:attribute` -> the parameters that we pass, or that
vLLM passes to our replacement. `tests/test_compatibility.py` also looks all of it up in the newest
supported vLLM."""


REQUIRED_BY_PART: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "V1": {
        "vllm.v1.worker.gpu_worker:Worker.init_device": (),
        "vllm.v1.worker.gpu_worker:Worker": ("vllm_config",),
        f"{_RUNNER}:GPUModelRunner._model_forward": ("input_ids", "positions"),
        f"{_RUNNER}:GPUModelRunner._update_states": ("scheduler_output",),
        f"{_RUNNER}:GPUModelRunner.get_kv_cache_spec": (),
        f"{_RUNNER}:GPUModelRunner.get_model": (),
        f"{_RUNNER}:GPUModelRunner.input_batch": (),
        f"{_RUNNER}:GPUModelRunner.query_start_loc": (),
        f"{_RUNNER}:GPUModelRunner.seq_lens": (),
        f"{_RUNNER}:GPUModelRunner.attn_groups": (),
        "vllm.v1.core.sched.output:SchedulerOutput.finished_req_ids": (),
        "vllm.v1.core.sched.output:SchedulerOutput.scheduled_new_reqs": (),
        "vllm.v1.worker.gpu_input_batch:InputBatch.req_ids": (),
        "vllm.v1.worker.gpu_input_batch:InputBatch.num_reqs": (),
        "vllm.v1.worker.gpu_input_batch:InputBatch.num_computed_tokens_cpu": (),
        "vllm.v1.worker.gpu_input_batch:InputBatch.num_prompt_tokens_cpu_tensor": (),
        "vllm.v1.worker.gpu_input_batch:InputBatch.block_table": (),
        "vllm.v1.worker.block_table:BlockTable.get_device_tensor": ("num_reqs",),
        "vllm.v1.worker.block_table:BlockTable.block_size": (),
    },
    "drafts of V1": {
        f"{_DRAFTS}.draft_model:DraftModelProposer": ("vllm_config", "device", "runner"),
        f"{_DRAFTS}.draft_model:DraftModelProposer.load_model": ("target_model",),
        f"{_DRAFTS}.draft_model:DraftModelProposer.dummy_run": ("num_tokens",),
        f"{_DRAFTS}.draft_model:DraftModelProposer.propose": (
            "num_speculative_tokens",
            "target_positions",
            "next_token_ids",
            "token_indices_to_sample",
            "common_attn_metadata",
            "sampling_metadata",
        ),
        f"{_DRAFTS}.llm_base_proposer:SpecDecodeBaseProposer._last_draft_probs": (),
        f"{_DRAFTS}.draft_model:DraftModelProposer._sample_draft_tokens": (
            "hidden_states",
            "sampling_metadata",
        ),
        f"{_DRAFTS}.llm_base_proposer:SpecDecodeBaseProposer.draft_attn_groups": (),
        f"{_DRAFTS}.llm_base_proposer:SpecDecodeBaseProposer.max_model_len": (),
        f"{_RUNNER}:GPUModelRunner.drafter": (),
        "vllm.v1.sample.metadata:SamplingMetadata": (),
    },
    "drafts of V2": {
        f"{_SPECULATOR}:StandaloneARSpeculator": ("vllm_config", "device"),
        f"{_SPECULATOR}:StandaloneARSpeculator.num_extra_query_per_req": (),
        f"{_SPECULATOR}:StandaloneARSpeculator._accepted_last_indices": (
            "input_batch",
            "num_rejected",
            "num_reqs",
        ),
        f"{_SPECULATOR}:StandaloneARSpeculator._copy_request_inputs": (
            "num_reqs",
            "idx_mapping",
            "temperature",
            "seeds",
            "dummy_run",
        ),
        f"{_SPECULATOR}:StandaloneARSpeculator._validate_local_argmax_reduction": (),
        f"{_SPECULATOR}:StandaloneARSpeculator.init_cudagraph_manager": ("cudagraph_mode",),
        f"{_SPECULATOR}:StandaloneARSpeculator.current_draft_step": (),
        f"{_GPU}.spec_decode.speculator:DraftModelSpeculator.draft_logits": (),
        f"{_GPU}.spec_decode.speculator:DraftModelSpeculator.draft_tokens": (),
        f"{_SPECULATOR}:StandaloneARSpeculator.load_model": ("target_model",),
        f"{_SPECULATOR}:StandaloneARSpeculator.propose": (
            "input_batch",
            "attn_metadata",
            "slot_mappings",
            "last_hidden_states",
            "aux_hidden_states",
            "num_sampled",
            "num_rejected",
            "last_sampled",
            "next_prefill_tokens",
            "temperature",
            "seeds",
            "dummy_run",
            "skip_attn_for_dummy_run",
            "num_speculative_tokens",
        ),
        f"{_SPECULATOR}:StandaloneARSpeculator.sample_draft": (
            "hidden_states",
            "sample_src_positions",
            "idx_mapping",
            "temperature",
            "seeds",
            "draft_step",
            "draft_logits",
        ),
        f"{_GPU}.block_table:BlockTables.block_sizes": (),
        f"{_GPU}.block_table:BlockTables.input_block_tables": (),
        f"{_GPU}.input_batch:InputBatch.seq_lens_cpu_upper_bound": (),
        f"{_GPU}.model_runner:GPUModelRunner.speculator": (),
        # the graphs of passes that verify drafts
        f"{_GPU}.cudagraph_utils:BatchExecutionDescriptor": (
            "cg_mode",
            "num_tokens",
            "num_reqs",
            "uniform_token_count",
        ),
        f"{_GPU}.cudagraph_utils:CudaGraphManager._candidates": (),
        f"{_GPU}.cudagraph_utils:CudaGraphManager._capture_descs": (),
        f"{_GPU}.cudagraph_utils:CudaGraphManager.cudagraph_mode": (),
        f"{_GPU}.cudagraph_utils:CudaGraphManager.max_num_reqs": (),
        f"{_GPU}.model_runner:GPUModelRunner.cudagraph_manager": (),
        "vllm.config:CompilationConfig.cudagraph_capture_sizes": (),
        "vllm.config:CompilationConfig.max_cudagraph_capture_size": (),
        "vllm.config:CUDAGraphMode.FULL": (),
        "vllm.config:CUDAGraphMode.decode_mode": (),
        "vllm.config:CUDAGraphMode.separate_routine": (),
    },
    "V2": {
        f"{_GPU}.model_states.default:DefaultModelState": (
            "vllm_config",
            "model",
            "encoder_cache",
            "device",
        ),
        f"{_GPU}.model_states.default:DefaultModelState.add_request": (
            "req_index",
            "new_req_data",
        ),
        f"{_GPU}.model_states.default:DefaultModelState.remove_request": ("req_id",),
        f"{_GPU}.model_states.default:DefaultModelState.initialize_kv_cache": (
            "kv_cache_config",
            "block_tables",
        ),
        f"{_GPU}.model_states.default:DefaultModelState.prepare_attn": (
            "input_batch",
            "cudagraph_mode",
            "block_tables",
            "slot_mappings",
            "attn_groups",
            "kv_cache_config",
            "for_capture",
        ),
        f"{_GPU}.model_states.default:DefaultModelState.prepare_inputs": (
            "input_batch",
            "req_states",
        ),
        f"{_GPU}.block_table:BlockTables.block_sizes": (),
        f"{_GPU}.block_table:BlockTables.input_block_tables": (),
        f"{_GPU}.cudagraph_utils:BatchExecutionDescriptor": (
            "cg_mode",
            "num_tokens",
            "num_reqs",
            "num_active_loras",
        ),
        f"{_GPU}.cudagraph_utils:ModelCudaGraphManager": (),
        f"{_GPU}.cudagraph_utils:CudaGraphManager.dispatch": (
            "num_reqs",
            "num_tokens",
            "uniform_token_count",
            "num_active_loras",
        ),
        f"{_GPU}.cudagraph_utils:CudaGraphManager.use_breakable_cg": (),
        f"{_GPU}.model_runner:GPUModelRunner.cudagraph_manager": (),
        f"{_GPU}.model_runner:GPUModelRunner.gather_batch_req_state": (
            "scheduler_output",
            "dummy_run",
        ),
        f"{_GPU}.model_runner:GPUModelRunner.get_kv_cache_spec": (),
        f"{_GPU}.model_runner:GPUModelRunner.initialize_kv_cache": (),
        f"{_GPU}.model_runner:BatchReqState.req_ids": (),
        f"{_GPU}.model_runner:BatchReqState.is_prefilling_np": (),
        f"{_GPU}.model_states.interface:ModelState.max_num_tokens": (),
        f"{_GPU}.input_batch:InputBatch.req_ids": (),
        f"{_GPU}.input_batch:InputBatch.seq_lens_cpu_upper_bound": (),
        f"{_GPU}.input_batch:InputBatch.num_reqs": (),
        f"{_GPU}.input_batch:InputBatch.idx_mapping": (),
        f"{_GPU}.input_batch:InputBatch.num_scheduled_tokens": (),
        f"{_GPU}.input_batch:InputBatch.num_computed_tokens_np": (),
        f"{_GPU}.input_batch:InputBatch.is_prefilling_np": (),
        f"{_GPU}.input_batch:InputBatch.input_ids": (),
        f"{_GPU}.input_batch:InputBatch.positions": (),
        f"{_GPU}.input_batch:InputBatch.query_start_loc": (),
        f"{_GPU}.input_batch:InputBatch.seq_lens": (),
        f"{_GPU}.mm.encoder_cache:EncoderCache": (),
        f"{_GPU}.model_runner:GPUModelRunner.model_state": (),
        f"{_GPU}.states:RequestState.prompt_len": (),
        "vllm.v1.kv_cache_interface:KVCacheConfig": (),
    },
    "live weights": {
        "vllm.config:set_current_vllm_config": ("vllm_config",),
        "vllm.distributed.parallel_state:get_pcp_group": (),
        "vllm.distributed.parallel_state:get_tp_group": (),
        "vllm.distributed.parallel_state:GroupCoordinator.cpu_group": (),
        "vllm.entrypoints.rl.offline:RLOfflineMixin.finish_weight_update": ("weight_version",),
        "vllm.model_executor.model_loader:get_model_loader": ("load_config",),
        f"{_TRANSFER}.set_weight_update_target": ("model", "model_config"),
        f"{_WORKER}._weight_update_active": (),
        f"{_WORKER}.finish_weight_update": (),
        f"{_WORKER}.reload_weights": (),
        f"{_WORKER}.start_draft_weight_update": (),
        f"{_WORKER}.start_weight_update": (),
        f"{_WORKER}.weight_transfer_engine": (),
    },
    "NIXL": {
        f"{_NIXL}:NixlPullConnector": ("vllm_config", "role", "kv_cache_config"),
        f"{_NIXL}:NixlPushConnector": ("vllm_config", "role", "kv_cache_config"),
        f"{_NIXL}.metadata:compute_nixl_compatibility_hash": ("vllm_config",),
        "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorRole": (),
        "vllm.v1.kv_cache_interface:KVCacheConfig": (),
    },
    "start without weights": {
        "vllm.config:OffloadConfig": (),
        "vllm.config:VllmConfig.device_config": (),
        "vllm.config:set_current_vllm_config": ("vllm_config",),
        "vllm.distributed.parallel_state:init_distributed_environment": (
            "world_size",
            "rank",
            "distributed_init_method",
            "local_rank",
            "backend",
        ),
        "vllm.distributed.parallel_state:initialize_model_parallel": (),
        "vllm.platforms.interface:Platform.get_device_total_memory": (),
        "vllm.platforms.interface:Platform.update_block_size_for_backend": ("vllm_config",),
        "vllm.model_executor.model_loader:get_model_loader": ("load_config",),
        "vllm.utils.import_utils:resolve_obj_by_qualname": ("qualname",),
        "vllm.utils.torch_utils:set_default_torch_dtype": ("dtype",),
        # one cache, and kernels that take every layer
        "vllm.config:CacheConfig.kv_cache_memory_bytes": (),
        "vllm.v1.attention.backend:AttentionBackend": (),
        "vllm.v1.attention.backend:AttentionBackend.get_supported_head_sizes": (),
        "vllm.v1.attention.backend:AttentionBackend.get_supported_kernel_block_sizes": (),
        "vllm.v1.attention.backend:AttentionBackend.supported_kv_cache_dtypes": (),
        "vllm.v1.attention.backend:AttentionBackend.supports_head_size": ("head_size",),
        "vllm.v1.attention.backend:AttentionBackend.supports_kv_cache_dtype": ("kv_cache_dtype",),
        "vllm.v1.attention.backends.utils:get_supported_kv_cache_layouts": ("backends",),
        "vllm.v1.attention.backends.utils:resolve_kv_cache_layout": (
            "vllm_config",
            "supported_layouts",
            "kv_cache_specs",
        ),
        "vllm.v1.engine.core:get_kv_cache_configs": (
            "vllm_config",
            "kv_cache_specs",
            "available_memory",
        ),
        "vllm.v1.kv_cache_interface:AttentionSpec": ("head_size",),
        "vllm.v1.kv_cache_interface:KVCacheSpec": (),
        "vllm.v1.worker.utils:AttentionGroup": (
            "backend",
            "layer_names",
            "kv_cache_spec",
            "kv_cache_group_id",
        ),
        "vllm.v1.worker.utils:AttentionGroup.create_metadata_builders": ("vllm_config", "device"),
        "vllm.v1.worker.utils:AttentionGroup.get_metadata_builder": (),
        "vllm.v1.worker.utils:customize_attention_spec": ("backend", "spec"),
        "vllm.v1.worker.utils:prepare_kernel_block_sizes": ("kv_cache_config", "attn_groups"),
    },
    "V1 on a CPU": {"vllm.v1.worker.cpu_worker:CPUWorker.init_device": ()},
    "rejection on a CPU": {
        "vllm.v1.outputs:SamplerOutput": (),
        "vllm.v1.sample.metadata:SamplingMetadata": ("temperature", "all_greedy", "top_k", "top_p"),
        "vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_top_p": ("logits", "k", "p"),
        "vllm.v1.sample.rejection_sampler:RejectionSampler.forward": (
            "metadata",
            "draft_probs",
            "logits",
            "sampling_metadata",
        ),
        "vllm.v1.sample.rejection_sampler:RejectionSampler.apply_logits_processors": (
            "logits",
            "sampling_metadata",
            "metadata",
        ),
        "vllm.v1.spec_decode.metadata:SpecDecodeMetadata": ("num_draft_tokens",),
    },
    "Ray": {
        "vllm.platforms.interface:Platform.ray_device_key": (),
        "vllm.ray.ray_env:get_env_vars_to_copy": ("exclude_vars",),
        "vllm.v1.executor.ray_utils:WORKER_SPECIFIC_ENV_VARS": (),
    },
    "metrics": {
        "vllm.v1.engine:EngineCoreRequest": ("request_id", "sampling_params"),
        "vllm.v1.engine.async_llm:AsyncLLM.from_vllm_config": ("vllm_config",),
        "vllm.v1.engine.async_llm:AsyncLLM.log_stats": (),
        "vllm.v1.engine.async_llm:AsyncLLM.model_config": (),
        "vllm.v1.engine.async_llm:AsyncLLM.output_processor": (),
        "vllm.v1.engine.async_llm:AsyncLLM.vllm_config": (),
        f"{_OUTPUT}:OutputProcessor._finish_request": ("req_state",),
        f"{_OUTPUT}:OutputProcessor.abort_requests": ("request_ids", "internal"),
        f"{_OUTPUT}:OutputProcessor.add_request": ("request",),
        f"{_OUTPUT}:OutputProcessor.request_states": (),
        f"{_OUTPUT}:OutputProcessor.update_scheduler_stats": ("scheduler_stats",),
        f"{_OUTPUT}:RequestState.prompt_len": (),
        f"{_OUTPUT}:RequestState.stats": (),
        "vllm.v1.metrics.stats:RequestStateStats.num_generation_tokens": (),
        "vllm.v1.metrics.stats:SchedulerStats.spec_decoding_stats": (),
        "vllm.v1.spec_decode.metrics:SpecDecodingStats.num_draft_tokens_per_pos": (),
    },
    "HTTP": {
        "vllm.exceptions:VLLMNotFoundError": (),
        f"{_MODELS}:OpenAIServingModels.base_model_paths": (),
        f"{_MODELS}:OpenAIServingModels.is_base_model": ("model_name",),
        f"{_MODELS}:OpenAIServingModels.model_name": ("lora_request",),
        "vllm.renderers.online_renderer:OnlineRenderer.chat_template": (),
        "vllm.renderers.online_renderer:OnlineRenderer.renderer": (),
        "vllm.renderers.online_renderer:OnlineRenderer.adjust_harmony_request": ("request",),
        "vllm.renderers.online_renderer:OnlineRenderer.preprocess_chat": ("request", "messages"),
        "vllm.renderers.base:BaseRenderer.render_chat_async": (
            "conversations",
            "chat_params",
            "tok_params",
        ),
    },
}
"""The same for parts that not every engine has (a model runner, Ray, the server), to be checked
where their modules are imported anyway."""


def require_part(part: str) -> None:
    """Check the names of one part of `REQUIRED_BY_PART`. Raises `ProxyConfigError`."""
    low, high = _RANGE
    _require(REQUIRED_BY_PART[part], f"install a version >= {low}, < {high}")


def require_supported_vllm() -> None:
    """Check the installed vLLM's version, and that it has every name in `REQUIRED`.

    Raises:
        ProxyConfigError: naming the version, or the first missing name or parameter.
    """
    import vllm

    low, high = _RANGE
    remedy = f"install a version >= {low}, < {high}"
    try:
        installed = tuple(int(part) for part in vllm.__version__.split(".")[:2])
    except ValueError:
        installed = None  # a source build ("dev"): only the names below decide
    if installed is not None and not SUPPORTED_VLLM[0] <= installed < SUPPORTED_VLLM[1]:
        raise ProxyConfigError(f"vllm {vllm.__version__} is not supported; {remedy}")
    _require(REQUIRED, remedy)


def _require(names: Mapping[str, tuple[str, ...]], remedy: str) -> None:
    import vllm

    for path, parameters in names.items():
        module, _, attributes = path.partition(":")
        try:
            target: Any = import_module(module)
            for name in attributes.split("."):
                if not hasattr(target, name) and name in _instance_names(target):
                    target = None
                else:
                    target = getattr(target, name)
        except (ImportError, AttributeError):
            raise ProxyConfigError(f"vllm {vllm.__version__} has no `{path}`; {remedy}") from None
        known = signature(target).parameters if parameters else {}
        if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in known.values()):
            continue
        for name in parameters:
            if name not in known:
                raise ProxyConfigError(
                    f"vllm {vllm.__version__}: `{path}` has no parameter `{name}`; {remedy}"
                )


def _instance_names(owner: object) -> set[str]:
    """Return the attributes that instances of a class may have: declared, or used in its making."""
    names = {*getattr(owner, "__annotations__", ()), *getattr(owner, "__dataclass_fields__", ())}
    for maker in ("__init__", "__post_init__", "load_model"):
        function = getattr(owner, maker, None)
        code = getattr(unwrap(function), "__code__", None) if function is not None else None
        names.update(code.co_names if code else ())
    return names
