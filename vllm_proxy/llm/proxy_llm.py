"""`ProxyLLM`: `vllm.LLM` for a proxy-tuned model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import Any, Self

from pydantic import ValidationError
from vllm import LLM, RequestOutput, SamplingParams
from vllm.exceptions import VLLMClientError
from vllm.inputs import EmbedsPrompt, TokensPrompt
from vllm.renderers import ChatParams, merge_kwargs
from vllm.renderers.chat_utils import has_non_text_content
from vllm.v1.engine.core_client import SyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_proxy.config.errors import ProxyConfigError, unknown_key
from vllm_proxy.config.media import no_media
from vllm_proxy.config.request import FIELDS, PROMPT_KEYS, RequestControl
from vllm_proxy.config.roles import Role
from vllm_proxy.config.schema import ChatFormats, ProxyConfig, ProxySection
from vllm_proxy.config.strength import Schedule
from vllm_proxy.config.validation import validation_error
from vllm_proxy.llm.inspection import Inspection, inspect
from vllm_proxy.llm.sampling import sampling_params as build_sampling_params
from vllm_proxy.members.prompts import (
    PLAIN_TEMPLATE,
    chat_prompts,
    member_renderers,
    require_followed,
    require_text,
    require_variables,
    tokenized,
)
from vllm_proxy.preflight.check.run import require_valid

_PROMPT_FIELDS = tuple(FIELDS[key] for key in PROMPT_KEYS.values())
_TEMPLATE_OPTIONS = ("add_generation_prompt", "continue_final_message", "tools")
_RENDER_OPTIONS = (
    *_TEMPLATE_OPTIONS,
    "chat_template",
    "chat_template_content_format",
    "chat_template_kwargs",
    "mm_processor_kwargs",
    "tokenization_kwargs",
)
_PROMPT_KEYS = {*TokensPrompt.__annotations__, *EmbedsPrompt.__annotations__, *_PROMPT_FIELDS}


class ProxyLLM(LLM):
    """A `vllm.LLM` whose next-token logits are `base + alpha * (expert - antiexpert)`.

    The methods are those of `vllm.LLM`: `generate`, `chat`, `beam_search`, and scoring with
    `SamplingParams(prompt_logprobs=…)`. All of them use the fused distribution.

        llm = ProxyLLM(
            base="meta-llama/Llama-2-70b-hf",
            expert="meta-llama/Llama-2-7b-chat-hf",
            antiexpert="meta-llama/Llama-2-7b-hf",
            tensor_parallel_size=8,
        )

    `generate`, `chat`, `enqueue` and `enqueue_chat` accept per-request values. Each one is a single
    value for all prompts, or a list with one entry per prompt (None: the model's default):

        alpha: a number, `"adaptive"`, a `Schedule`, or a mapping with the fields of a `Schedule`.
        weights: three numbers, for base, expert and antiexpert, instead of alpha.
        filters: a mapping with `top_p` and `plausibility`.
        expert: a name in *experts*.

    A prompt that is a mapping can also have `expert_prompt` and `antiexpert_prompt`, text or token
    ids: these members read them instead of the base's prompt. With `limit_mm_per_prompt={"image":
    n}` it can have `multi_modal_data`, and messages can have images. Mistakes are
    `ProxyConfigError`s, raised before the first request is submitted.

    Args:
        base: the large model: a path, a Hub id, or a mapping `{"model": …, "revision": …}`.
        expert: the small model after fine-tuning.
        antiexpert: the same small model before fine-tuning. One of these two may be missing.
        alpha: strength of requests that set none; 1.0 is the paper's, 0.0 gives the base.
        filters: which tokens to remove, by the base's probabilities.
        experts: adapters of the antiexpert's model by name, of which each request may choose one.
        chat: `{role: "template" | "plain"}`: how each member sees a conversation.
        speculate: `{"tokens": k, "requests": n}`: the expert drafts up to k tokens per step, while
            at most n requests are running.
        one_pass: whether an expert that is the antiexpert with an adapter runs in the same pass as
            the antiexpert; None means if possible.
        sampling: sampling parameters for calls without any; by default the base's generation
            config, as in vLLM.
        **engine_args: any argument of `vllm.LLM`.

    Raises:
        ProxyConfigError: a member cannot be part of this model; raised before weights are read.
    """

    def __init__(
        self,
        base: str | Mapping[str, Any],
        expert: str | Mapping[str, Any] | None = None,
        antiexpert: str | Mapping[str, Any] | None = None,
        alpha: float | str | Schedule | Mapping[str, Any] = 1.0,
        *,
        filters: Mapping[str, float] | None = None,
        experts: Mapping[str, str] | None = None,
        chat: Mapping[str, str] | None = None,
        speculate: Mapping[str, Any] | None = None,
        one_pass: bool | None = None,
        sampling: Mapping[str, Any] | None = None,
        **engine_args: Any,
    ) -> None:
        values = {
            "base": base,
            "expert": expert,
            "antiexpert": antiexpert,
            "alpha": alpha,
            "filters": filters,
            "experts": experts,
            "chat": chat,
            "speculate": speculate,
            "one_pass": one_pass,
            "engine": engine_args,
            "sampling": dict(sampling or {}),
        }
        given = {key: value for key, value in values.items() if value is not None}
        self.proxy_config = ProxyConfig.parse(given, "ProxyLLM")
        require_valid(self.proxy_config)
        build_sampling_params(self.proxy_config.sampling)
        super().__init__(**self.proxy_config.engine_args())
        watch_engine_process(self.llm_engine.engine_core)

    @property
    def _sees(self) -> bool:
        """Whether members read images."""
        return self.model_config.is_multimodal_model

    @cached_property
    def _renderers(self) -> Mapping[Role, Any]:
        """The members' renderers for `chat`; `require_valid` has checked that they exist."""
        return member_renderers(self.proxy_config, self.renderer, base_template=self.chat_template)

    @classmethod
    def from_config(cls, config: str | Path | ProxyConfig) -> Self:
        """Build from a YAML file or a `ProxyConfig`. Raises `ProxyConfigError`."""
        if not isinstance(config, ProxyConfig):
            config = ProxyConfig.from_yaml(config)
        fields = {"base", *ProxySection.model_fields}
        values = config.model_dump(include=fields, exclude_none=True)
        return cls(**values, sampling=config.sampling, **config.engine)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """As in vLLM, and drop the prefix caches: the old weights computed them."""
        super().finish_weight_update(weight_version)
        self.reset_prefix_cache()

    def collective_rpc(self, method: Any, *args: Any, **options: Any) -> list[Any]:
        """As in vLLM; `reload_weights` also drops the prefix caches."""
        results = super().collective_rpc(method, *args, **options)
        if method == "reload_weights":
            self.reset_prefix_cache()
        return results

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the parameters of calls without any: `sampling`, or else the base's defaults."""
        params = super().get_default_sampling_params()
        if not self.proxy_config.sampling:
            return params
        defaults = self.default_sampling_params or {}
        return build_sampling_params({**defaults, **self.proxy_config.sampling})

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        alpha: Any = None,
        weights: Any = None,
        filters: Any = None,
        expert: Any = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Generate; see `ProxyLLM` for *alpha* to *expert*, `vllm.LLM` for the rest.

        Raises:
            ProxyConfigError: a per-request value is wrong.
            VLLMValidationError: vLLM rejects a prompt or a parameter.
        """
        values = {"alpha": alpha, "weights": weights, "filters": filters, "expert": expert}
        prompts, params = self._completions(prompts, sampling_params, values, options)
        with unwrap_validation_error():
            return super().generate(prompts, params, **options)

    def enqueue(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        alpha: Any = None,
        weights: Any = None,
        filters: Any = None,
        expert: Any = None,
        **options: Any,
    ) -> list[str]:
        """Submit prompts without waiting for the answers; otherwise like `generate`."""
        values = {"alpha": alpha, "weights": weights, "filters": filters, "expert": expert}
        prompts, params = self._completions(prompts, sampling_params, values, options)
        with unwrap_validation_error():
            return super().enqueue(prompts, params, **options)

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: Any = True,
        *,
        alpha: Any = None,
        weights: Any = None,
        filters: Any = None,
        expert: Any = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answer conversations; `chat` in the configuration decides how each member sees them.

        See `ProxyLLM` for *alpha* to *expert*, `vllm.LLM` for the rest. Raises what
        `generate` raises.
        """
        values = {"alpha": alpha, "weights": weights, "filters": filters, "expert": expert}
        messages, params, options = self._conversations(messages, sampling_params, values, options)
        with unwrap_validation_error():
            return super().chat(messages, params, use_tqdm, **options)

    def enqueue_chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: Any = True,
        *,
        alpha: Any = None,
        weights: Any = None,
        filters: Any = None,
        expert: Any = None,
        **options: Any,
    ) -> list[str]:
        """Submit conversations without waiting for the answers; otherwise like `chat`."""
        values = {"alpha": alpha, "weights": weights, "filters": filters, "expert": expert}
        messages, params, options = self._conversations(messages, sampling_params, values, options)
        with unwrap_validation_error():
            return super().enqueue_chat(messages, params, use_tqdm, **options)

    def inspect(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        completions: Any = None,
        top_k: int = 5,
        alpha: Any = None,
        weights: Any = None,
        filters: Any = None,
        expert: Any = None,
        use_tqdm: Any = False,
    ) -> list[Inspection]:
        """Generate, and report what each member and the proxy predicted for every token.

        Log-probabilities are those before temperature and other sampling parameters, over the token
        ids that all members have.

        Args:
            prompts: see `generate`.
            sampling_params: see `generate`.
            completions: answers to inspect instead of generated ones, one per prompt: text, which
                is encoded separately and without special tokens, or token ids.
            top_k: number of the most likely tokens to keep of each distribution, at most 100.
            alpha: see `ProxyLLM`.
            weights: see `ProxyLLM`.
            filters: see `ProxyLLM`.
            expert: see `ProxyLLM`.
            use_tqdm: whether to show progress while answers are generated.

        Raises:
            ProxyConfigError: a per-request value is wrong, or the engine does not support it.
            VLLMValidationError: vLLM rejects a prompt or a parameter.
        """
        values = {"alpha": alpha, "weights": weights, "filters": filters, "expert": expert}
        requests = self.render(prompts, sampling_params, values)
        if completions is not None:
            if isinstance(completions, str) or (
                completions and all(isinstance(token, int) for token in completions)
            ):
                completions = [completions]
            completions = _one_per_prompt("completions", list(completions), len(requests))
        return inspect(self, requests, completions, top_k, use_tqdm=use_tqdm)

    def render(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        values: Mapping[str, Any],
        *,
        chat_options: Mapping[str, Any] | None = None,
    ) -> list[tuple[list[int], SamplingParams]]:
        """Return the base's prompt ids and the final parameters of each request; submit nothing.

        Args:
            prompts: as for `generate`; or conversations, as for `chat`.
            sampling_params: as for these methods.
            values: `alpha`, `weights`, `filters` and `expert`, as for these methods.
            chat_options: None for prompts; for conversations, further arguments of `chat`.
        """
        with unwrap_validation_error():
            if chat_options is not None:
                prompts, params, options = self._conversations(
                    prompts, sampling_params, values, dict(chat_options)
                )
                _require_text_alone("messages", any(map(has_non_text_content, prompts)))
                inputs = self._preprocess_chat(prompts, **options)
            else:
                prompts, params = self._completions(prompts, sampling_params, values, {})
                _require_text_alone("multi_modal_data", any(map(_has_media, prompts)))
                inputs = self._preprocess_cmpl(prompts)
        ids = (list(entry["prompt_token_ids"]) for entry in inputs)
        return list(zip(ids, params, strict=True))

    def beam_search(self, prompts: Any, params: Any, *args: Any, **options: Any) -> list[Any]:
        """Search as `vllm.LLM` does, with the model's default strength.

        vLLM submits one request per token, without any per-request values.

        Raises:
            ProxyConfigError: the strength changes with the number of tokens, or a prompt has
                members' prompts.
        """
        alpha = self.proxy_config.alpha
        if isinstance(alpha, Schedule):
            raise ProxyConfigError(
                "beam search submits one request per token, so the strength would stay that of the "
                "first token",
                field="alpha",
                value=alpha.model_dump(),
                remedy="use a model with a constant alpha",
            )
        prompts = list(prompts)
        for prompt in prompts:
            for field in _split(prompt)[1]:
                raise ProxyConfigError(
                    "all members read the same prompt in beam search",
                    field=field,
                    remedy="remove it",
                )
        return super().beam_search(prompts, params, *args, **options)

    def _completions(
        self,
        prompts: Any,
        sampling_params: Any,
        values: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> tuple[list[Any], list[SamplingParams]]:
        """Return the prompts as vLLM takes them, and the parameters of each."""
        prompts = [prompts] if isinstance(prompts, str | bytes | Mapping) else list(prompts)
        if prompts and all(isinstance(token, int) for token in prompts):
            prompts = [prompts]
        if not self._sees and any(map(_has_media, prompts)):
            raise no_media("multi_modal_data")
        split = [_split(prompt) for prompt in prompts]
        if options.get("tokenization_kwargs") and any(fields for _, fields in split):
            raise ProxyConfigError(
                "they would apply to the base's prompt only",
                field="tokenization_kwargs",
                remedy="remove them, or the members' prompts",
            )
        params = self._request_params(sampling_params, values, [fields for _, fields in split])
        return [prompt for prompt, _ in split], params

    def _conversations(
        self,
        messages: Any,
        sampling_params: Any,
        values: Mapping[str, Any],
        options: dict[str, Any],
    ) -> tuple[list[Any], list[SamplingParams], dict[str, Any]]:
        """Return the conversations, the parameters of each, and the options for vLLM's `chat`."""
        conversations = list(messages)
        if conversations and all(isinstance(message, Mapping) for message in conversations):
            conversations = [conversations]
        if not self._sees and any(map(has_non_text_content, conversations)):
            raise no_media("messages")
        no_fields: list[dict[str, Any]] = [{}] * len(conversations)
        rendered = no_fields
        if chat := self.proxy_config.chat:
            rendered, options = self._rendered(conversations, chat, options)
        params = self._request_params(sampling_params, values, no_fields, rendered)
        return conversations, params, options

    def _rendered(
        self, conversations: Sequence[Any], chat: ChatFormats, options: Mapping[str, Any]
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Render conversations for the members, in the formats of *chat*.

        Returns:
            The members' prompts by key of `extra_args`, for each conversation; and the options with
            which vLLM renders them for the base.

        Raises:
            ProxyConfigError: an option does not apply to the members' formats.
        """
        roles = self.proxy_config.roles
        for name in ("chat_template", "tokenization_kwargs"):
            if options.get(name):
                raise ProxyConfigError(
                    "cannot be combined with `chat` in the configuration, which already decides "
                    "what each member sees",
                    field=name,
                    remedy="remove one of them",
                )
        variables = options.get("chat_template_kwargs")
        require_variables(variables)
        values = {"add_generation_prompt": True, "tokenize": False}
        values |= {name: options[name] for name in _TEMPLATE_OPTIONS if name in options}
        params = ChatParams(chat_template_kwargs=merge_kwargs(variables, values))
        require_followed(params, chat, roles)
        for messages in conversations:
            require_text(messages)
        options = dict(options)
        if chat.of("base") == "plain":
            options |= {
                "chat_template": PLAIN_TEMPLATE,
                "continue_final_message": False,
                "tokenization_kwargs": {"add_special_tokens": True},
            }
        if all(chat.of(role) == "plain" for role in roles):
            return [{}] * len(conversations), options
        shown = {name: options[name] for name in _RENDER_OPTIONS if name in options}
        inputs = self._preprocess_chat(conversations, **shown)
        return [
            chat_prompts(messages, chat, self._renderers, params, entry["prompt_token_ids"])
            for messages, entry in zip(conversations, inputs, strict=True)
        ], options

    def _request_params(
        self,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        values: Mapping[str, Any],
        prompts: Sequence[Mapping[str, Any]],
        rendered: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[SamplingParams]:
        """Return the parameters of each request, with its values in `extra_args`.

        Args:
            sampling_params: as vLLM takes them; they are not changed.
            values: arguments `alpha`, `weights`, `filters` and `expert`.
            prompts: the members' prompts of each request, by field.
            rendered: the members' renderings of each conversation, by key of `extra_args`; values
                of the request take precedence.
        """
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        count = len(prompts)
        every = _one_per_prompt("sampling_params", sampling_params, count)
        columns = {n: _one_per_prompt(n, value, count) for n, value in values.items()}
        result = []
        for index, params in enumerate(every):
            fields = {name: column[index] for name, column in columns.items()}
            fields |= prompts[index]
            defaults = rendered[index] if rendered else {}
            try:
                result.append(self._with_values(params, fields, defaults))
            except ProxyConfigError as error:
                raise (error.within(f"prompt {index}") if count > 1 else error) from None
        return result

    def _with_values(
        self, params: SamplingParams, values: Mapping[str, Any], defaults: Mapping[str, Any]
    ) -> SamplingParams:
        """Return *params* with fields of `RequestControl` in `extra_args`.

        `extra_args` of *params* take precedence over *defaults*.
        """
        try:
            ours = RequestControl.model_validate(values).to_extra_args()
        except ValidationError as error:
            raise validation_error(RequestControl, error) from None
        extra_args = params.extra_args or {}
        fields = {FIELDS[key] for key in ours}
        for key in extra_args:
            if FIELDS.get(key) in fields:
                raise ProxyConfigError(
                    f"`extra_args` has `{key}`", field=FIELDS[key], remedy="give one of them"
                )
        merged = {**defaults, **extra_args, **ours}
        merged = tokenized(merged, self.llm_engine.tokenizer, self.model_config.max_model_len)
        if merged == extra_args:
            return params
        params = copy(params)
        params.extra_args = merged
        return params


def watch_engine_process(client: Any) -> None:
    """Make `step` raise `EngineDeadError` if the engine's process is killed.

    vLLM (0.32) notices a killed process, marks it as dead and ends the thread that receives its
    outputs. But a `step` that waits for outputs would wait for ever.
    """
    if not isinstance(client, SyncMPClient):
        return
    receiver, outputs = client.output_queue_thread, client.outputs_queue

    def report() -> None:
        receiver.join()
        outputs.put(EngineDeadError())

    Thread(target=report, daemon=True, name="proxy-engine-death").start()


@contextmanager
def unwrap_validation_error() -> Iterator[None]:
    """Raise our own error about a request instead of the vLLM error that wraps it."""
    try:
        yield
    except VLLMClientError as error:
        if isinstance(error.__cause__, ProxyConfigError):
            raise error.__cause__ from None
        raise


def _has_media(prompt: Any) -> bool:
    """Whether a prompt has more than text."""
    return isinstance(prompt, Mapping) and bool(prompt.get("multi_modal_data"))


def _require_text_alone(field: str, has_more: bool) -> None:
    """Reject requests whose rendered ids are not all of them. Raises `ProxyConfigError`."""
    if has_more:
        raise ProxyConfigError("only text can be inspected", field=field, remedy="send text")


def _split(prompt: Any) -> tuple[Any, dict[str, Any]]:
    """Return a prompt as vLLM takes it, and the members' prompts by field.

    Raises:
        ProxyConfigError: an unknown key, which vLLM would ignore.
    """
    if not isinstance(prompt, Mapping):
        return prompt, {}
    for key in prompt:
        if key not in _PROMPT_KEYS:
            is_argument = key in ("alpha", "weights", "filters", "expert")
            remedy = f"give `{key}` as an argument of the method" if is_argument else "remove it"
            raise unknown_key(str(key), _PROMPT_KEYS, remedy=remedy)
    fields = {key: prompt[key] for key in _PROMPT_FIELDS if key in prompt}
    return {key: prompt[key] for key in prompt if key not in fields}, fields


def _one_per_prompt(name: str, value: Any, count: int) -> Sequence[Any]:
    """Return *count* values: a list as it is, a single value repeated."""
    is_list = isinstance(value, list | tuple)
    if name == "weights" and is_list and value and isinstance(value[0], int | float):
        is_list = False
    if not is_list:
        return [value] * count
    if len(value) != count:
        raise ProxyConfigError.worded(
            f"`{name}` has {len(value)} entries for {count} prompts",
            field=name,
            remedy="give one for each, or one for all",
        )
    return value
