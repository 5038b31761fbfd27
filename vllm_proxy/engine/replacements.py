"""Everything of vLLM that this package replaces at run time: where, by what, and why.

Subclasses that vLLM has options for (`scheduler_cls`, `worker_cls`, the model class and its
state class, `worker_extension_cls`, logits processors by name) are not replacements. That each name
exists in the installed vLLM is checked by `compatibility.py`. A test looks for replacements in the
source, and fails if one is not listed here.
"""

from typing import NamedTuple


class Replacement(NamedTuple):
    """One assignment that replaces something of vLLM's.

    Attributes:
        file: its file in the package.
        target: what is assigned to, as in the source.
        replaced: what that is in vLLM.
        why: what the replacement does, and why vLLM has no other way.
    """

    file: str
    target: str
    replaced: str
    why: str


REPLACEMENTS = (
    Replacement(
        "plugin.py",
        "MODELS_CONFIG_MAP[name]",
        "the config hook of a model architecture",
        "checks the engine's configuration and installs our scheduler, worker and validator; vLLM "
        "has no other hook that sees the whole configuration",
    ),
    Replacement(
        "members/text_part.py",
        "model_config.hf_overrides",
        "the engine's changes to the base's config, where the base is multimodal",
        "takes the config of the base's text model; vLLM applies it to a draft model's config as "
        "well, which is the base's",
    ),
    Replacement(
        "engine/admission.py",
        "InputProcessor.process_inputs",
        "admission of a request, of the class",
        "checks the prompt and the final parameters, which `validate_params` does not see",
    ),
    Replacement(
        "engine/metrics.py",
        "AsyncLLM.__init__",
        "the start of a server's engine client, of the class",
        "gives the client's output processor our meter; vLLM's plugins for statistics see engines "
        "and not requests",
    ),
    Replacement(
        "engine/metrics.py",
        "processor.__class__",
        "`OutputProcessor`, by `MeteredOutputProcessor`",
        "counts requests where they begin and end",
    ),
    Replacement(
        "engine/worker.py",
        "runner.__class__",
        "the model runner, by a class with `ProxyRunner` or `ProxyRunnerV2` mixed in",
        "passes per-request values to the model (V1) or chooses graphs by prompts (V2); a worker "
        "names its runner's class itself",
    ),
    Replacement(
        "engine/runner_v2.py",
        "self.cudagraph_manager.__class__",
        "`ModelCudaGraphManager`, by `MemberGraphs`",
        "replays no graph of all members in a step in which they have different rows; the runner "
        "names the manager's class itself",
    ),
    Replacement(
        "engine/worker_cpu.py",
        "sampler.__class__",
        "`RejectionSampler` on a CPU, by `CPURejectionSampler`",
        "vLLM (0.32) expands temperatures, top-k and top-p wrongly there",
    ),
    Replacement(
        "engine/drafting/v1.py",
        "runner.drafter.__class__",
        "`DraftModelProposer`, by `ExpertProposer`",
        "the expert drafts instead of a draft model; the runner chooses the class by method",
    ),
    Replacement(
        "engine/drafting/v2.py",
        "runner.speculator.__class__",
        "`StandaloneARSpeculator`, by `ExpertSpeculator`",
        "the same under Model Runner V2",
    ),
    Replacement(
        "engine/drafting/graphs.py",
        "manager._capture_descs[CUDAGraphMode.FULL]",
        "the FULL CUDA graphs that Model Runner V2 captures, of the instance",
        "one for each number of drafts; vLLM's option names one number per running request. Of the "
        "drafts' own graphs, those that no step would replay are taken out of the list",
    ),
    Replacement(
        "engine/drafting/graphs.py",
        "manager._candidates[tokens, 0]",
        "the CUDA graphs that Model Runner V2 tries for a number of tokens, of the instance",
        "vLLM tries only those with the nearest captured number of tokens",
    ),
    Replacement(
        "members/vllm_configs.py",
        "config.get_quant_method",
        "the lookup of layers in a member's quantization, of the instance",
        "removes the member's prefix from names, which its checkpoint does not have",
    ),
    Replacement(
        "model/projection.py",
        "setattr(parent, name, recorder)",
        "a member's `LogitsProcessor`, while the member's head is found",
        "records how the member computes logits, for every model class",
    ),
    Replacement(
        "model/projection.py",
        "setattr(parent, name, _LocalProcessor(self.processor))",
        "a member's `LogitsProcessor`",
        "skips gathering the logits of ranks, which `ProxyHead` does once",
    ),
    Replacement(
        "model/fused_product.py",
        "owner.quant_method",
        "how a head's weight is processed after loading",
        "the weight is a slice of the fused weight and must not be packed on its own",
    ),
    Replacement(
        "model/kernels.py",
        "layer.attn_backend",
        "the backend class of a small member's attention layer, by a subclass",
        "vLLM makes a metadata builder per class; a CUDA graph reads the plans of all members. On "
        "a CPU next to latent attention any member's: its kernels then take blocks of 16 tokens",
    ),
    Replacement(
        "model/kernels.py",
        "layer.get_attn_backend",
        "the backend class of a small member's recurrent layer, by a subclass",
        "as `layer.attn_backend`; its builder reads the size of chunks in the model's config",
    ),
    Replacement(
        "model/loading.py",
        "layer._parameters[name]",
        "a parameter of a member, while new weights are checked",
        "on the meta device vLLM's loaders check weights without changing the old ones",
    ),
    Replacement(
        "model/stages.py",
        "parallel_state._PP",
        "the process's pipeline, while a member that the last stage has whole is built or runs",
        "models ask for it and have no parameter for another one; drafts must not leave the stage",
    ),
    Replacement(
        "model/loading.py",
        "_custom_ops.create_onednn_scaled_mm",
        "what makes an int8 product of a CPU, while new weights are loaded",
        "keeps the scales, of which the product has the address; vLLM's reload frees them",
    ),
    Replacement(
        "model/one_pass.py",
        "setattr(antiexpert.get_submodule(parent), leaf, pair)",
        "the attention layers of the antiexpert, by `PairAttention`",
        "half of the rows go to each member's KV cache",
    ),
    Replacement(
        "model/one_pass.py",
        "layer.quant_method",
        "the product of a linear layer, by `_AdaptedMethod`",
        "adds the adapter's product to the expert's rows",
    ),
    Replacement(
        "server/middleware.py",
        "models.model_name",
        "the model name in a server's answers, of the instance",
        "an answer of one member has the name that the request had",
    ),
    Replacement(
        "server/middleware.py",
        "models.is_base_model",
        "the lookup of a model name in a server, of the instance",
        "an unknown name is rejected with the nearest known one",
    ),
    Replacement(
        "server/media.py",
        "online.preprocess_chat",
        "the rendering of a conversation in a server, of the instance",
        "an image that cannot be read is HTTP 400, and says how images are allowed",
    ),
    Replacement(
        "server/conversations.py",
        "online.preprocess_chat",
        "the rendering of a conversation in a server, of the instance",
        "members may have different chat formats",
    ),
    Replacement(
        "server/conversations.py",
        "online.renderer.render_chat_async",
        "the same, one level below",
        "members may have different chat formats",
    ),
    Replacement(
        "server/conversations.py",
        "online.adjust_harmony_request",
        "the rendering of a conversation for gpt-oss, of the instance",
        "rejects the request: it uses no chat template, so members cannot have different formats",
    ),
)
