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
from vllm.v1.engine.core_client import SyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_proxy.config.errors import ProxyConfigError, did_you_mean
from vllm_proxy.config.request import FIELDS, PROMPT_KEYS, RequestControl
from vllm_proxy.config.roles import Role
from vllm_proxy.config.schema import ProxyConfig, ProxySection
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
_KNOWN = {*TokensPrompt.__annotations__, *EmbedsPrompt.__annotations__, *_PROMPT_FIELDS}


class ProxyLLM(LLM):
    """A `vllm.LLM` whose logits are those of base, expert and antiexpert, fused.

    Every method is vLLM's own: `generate`, `chat`, `beam_search`, and scoring by
    `SamplingParams(prompt_logprobs=…)`, all of the fused distribution.

        llm = ProxyLLM(
            base="meta-llama/Llama-2-70b-hf",
            expert="meta-llama/Llama-2-7b-chat-hf",
            antiexpert="meta-llama/Llama-2-7b-hf",
            tensor_parallel_size=8,
        )

    `generate`, `chat`, `enqueue` and `enqueue_chat` take what requests have of their own. Each is
    one value for all prompts, or a list with one for each (None: as the model's):

        alpha: a number; `"adaptive"`; a `Schedule` or a mapping with its fields.
        weights: three numbers, of base, expert and antiexpert, instead of alpha.
        filters: a mapping with `top_p` and `plausibility`.

    A prompt that is a mapping may have `expert_prompt` and `antiexpert_prompt`, text or token ids,
    beside `prompt` or `prompt_token_ids`: what those members read instead. Mistakes are
    `ProxyConfigError`s, raised before the first request is made.

    Args:
        base: the large model: a path, a hub id, or a mapping `{"model": …, "revision": …}`.
        expert: the small model after fine-tuning.
        antiexpert: the same small model before it. One of the two may be missing.
        alpha: strength of requests without their own; 1.0 is the paper's, 0.0 gives the base.
        filters: tokens to leave out by the base's own probabilities.
        chat: `{role: "template" | "plain"}`: how each member sees a conversation.
        speculate: `{"tokens": k, "requests": n}`: the expert drafts up to k tokens before each
            pass, of n requests or fewer.
        one_pass: whether an expert that is the antiexpert and an adapter runs in one pass with it;
            None if it can.
        sampling: sampling parameters for calls that give none; by default the base's
            generation config, as in vLLM.
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
        tell_of_death(self.llm_engine.engine_core)

    @cached_property
    def _renderers(self) -> Mapping[Role, Any]:
        """The members' renderers for `chat`; `require_valid` has checked that they can be had."""
        return member_renderers(self.proxy_config, self.renderer, base_template=self.chat_template)

    @classmethod
    def from_config(cls, config: str | Path | ProxyConfig) -> Self:
        """Build from a YAML file or a `ProxyConfig`. Raises `ProxyConfigError`."""
        if not isinstance(config, ProxyConfig):
            config = ProxyConfig.from_yaml(config)
        fields = {"base", *ProxySection.model_fields}
        values = config.model_dump(include=fields, exclude_none=True)
        return cls(**values, sampling=config.sampling, **config.engine)

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the parameters of calls that give none: `sampling`, over the base's own."""
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
        **options: Any,
    ) -> list[RequestOutput]:
        """Generate; see `ProxyLLM` for *alpha*, *weights* and *filters*, `vllm.LLM` for the rest.

        Raises:
            ProxyConfigError: a value of a request is wrong.
            VLLMValidationError: vLLM refuses a prompt or a parameter.
        """
        own = {"alpha": alpha, "weights": weights, "filters": filters}
        prompts, params = self._completions(prompts, sampling_params, own, options)
        with _ours():
            return super().generate(prompts, params, **options)

    def enqueue(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        alpha: Any = None,
        weights: Any = None,
        filters: Any = None,
        **options: Any,
    ) -> list[str]:
        """Enqueue what `generate` would generate. Raises the same."""
        own = {"alpha": alpha, "weights": weights, "filters": filters}
        prompts, params = self._completions(prompts, sampling_params, own, options)
        with _ours():
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
        **options: Any,
    ) -> list[RequestOutput]:
        """Answer conversations, which members see as the configuration's `chat` says.

        See `ProxyLLM` for *alpha*, *weights* and *filters*, `vllm.LLM` for the rest. Raises what
        `generate` raises.
        """
        own = {"alpha": alpha, "weights": weights, "filters": filters}
        messages, params, options = self._conversations(messages, sampling_params, own, options)
        with _ours():
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
        **options: Any,
    ) -> list[str]:
        """Enqueue what `chat` would answer. Raises the same."""
        own = {"alpha": alpha, "weights": weights, "filters": filters}
        messages, params, options = self._conversations(messages, sampling_params, own, options)
        with _ours():
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
        use_tqdm: Any = False,
    ) -> list[Inspection]:
        """Generate, and say what each member and all together said of every token.

        Log-probabilities are of the distributions before temperature and what else changes
        sampling, over the ids that all members have.

        Args:
            prompts: as of `generate`.
            sampling_params: as of `generate`.
            completions: answers to inspect instead of generated ones: text, which is encoded by
                itself and without special tokens, or token ids; one for each prompt.
            top_k: how many of the likeliest tokens to keep of each distribution, at most 100.
            alpha: see `ProxyLLM`.
            weights: see `ProxyLLM`.
            filters: see `ProxyLLM`.
            use_tqdm: whether to show progress while answers are generated.

        Raises:
            ProxyConfigError: a value of a request is wrong, or the engine cannot do it.
            VLLMValidationError: vLLM refuses a prompt or a parameter.
        """
        own = {"alpha": alpha, "weights": weights, "filters": filters}
        requests = self.render(prompts, sampling_params, own)
        if completions is not None:
            if isinstance(completions, str) or (
                completions and all(isinstance(token, int) for token in completions)
            ):
                completions = [completions]
            completions = _each("completions", list(completions), len(requests))
        return inspect(self, requests, completions, top_k, use_tqdm=use_tqdm)

    def render(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        own: Mapping[str, Any],
        *,
        chat_options: Mapping[str, Any] | None = None,
    ) -> list[tuple[list[int], SamplingParams]]:
        """Return what requests would be made of: the base's prompt, and parameters with their own.

        Args:
            prompts: as of `generate`, or of `chat`.
            sampling_params: likewise.
            own: `alpha`, `weights` and `filters`, as of `generate`.
            chat_options: None, or, of conversations, further arguments of `chat` for their prompts.
        """
        with _ours():
            if chat_options is not None:
                prompts, params, options = self._conversations(
                    prompts, sampling_params, own, dict(chat_options)
                )
                inputs = self._preprocess_chat(prompts, **options)
            else:
                seen, params = self._completions(prompts, sampling_params, own, {})
                inputs = self._preprocess_cmpl(seen)
        ids = (list(entry["prompt_token_ids"]) for entry in inputs)
        return list(zip(ids, params, strict=True))

    def beam_search(self, prompts: Any, params: Any, *args: Any, **options: Any) -> list[Any]:
        """Search as `vllm.LLM` does, with the model's own strength.

        vLLM starts a request for every token, and passes it nothing of ours.

        Raises:
            ProxyConfigError: a strength that changes with the number of tokens, or a member's own
                prompt.
        """
        alpha = self.proxy_config.alpha
        if isinstance(alpha, Schedule):
            raise ProxyConfigError(
                f"`alpha` is {alpha.model_dump()}: beam search starts a request for every token, "
                "so its strength would stay that of the first; use a model with a constant alpha"
            )
        prompts = list(prompts)
        for prompt in prompts:
            for field in _split(prompt)[1]:
                raise ProxyConfigError(
                    f"`{field}`: all members read one prompt in beam search; remove it"
                )
        return super().beam_search(prompts, params, *args, **options)

    def _completions(
        self, prompts: Any, sampling_params: Any, own: Mapping[str, Any], options: Mapping[str, Any]
    ) -> tuple[list[Any], list[SamplingParams]]:
        prompts = [prompts] if isinstance(prompts, str | bytes | Mapping) else list(prompts)
        if prompts and all(isinstance(token, int) for token in prompts):
            prompts = [prompts]
        split = [_split(prompt) for prompt in prompts]
        if options.get("tokenization_kwargs") and any(fields for _, fields in split):
            raise ProxyConfigError(
                "`tokenization_kwargs` are for the base's prompt alone; remove them, or the "
                "members' prompts"
            )
        params = self._own_params(sampling_params, own, [fields for _, fields in split])
        return [prompt for prompt, _ in split], params

    def _conversations(
        self, messages: Any, sampling_params: Any, own: Mapping[str, Any], options: dict[str, Any]
    ) -> tuple[list[Any], list[SamplingParams], dict[str, Any]]:
        conversations = list(messages)
        if conversations and all(isinstance(message, Mapping) for message in conversations):
            conversations = [conversations]
        seen = [{}] * len(conversations)
        if self.proxy_config.chat:
            seen, options = self._seen(conversations, options)
        params = self._own_params(sampling_params, own, [{}] * len(conversations), seen)
        return conversations, params, options

    def _seen(
        self, conversations: Sequence[Any], options: Mapping[str, Any]
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return what members see of conversations, by key, and the options by which vLLM renders
        what the base sees.

        Raises:
            ProxyConfigError: an option that members cannot follow.
        """
        chat, roles = self.proxy_config.chat, self.proxy_config.roles
        for name in ("chat_template", "tokenization_kwargs"):
            if options.get(name):
                raise ProxyConfigError(
                    f"`{name}`: cannot be combined with `chat` of the configuration, which says "
                    "what each member sees; remove one of them"
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

    def _own_params(
        self,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        own: Mapping[str, Any],
        prompts: Sequence[Mapping[str, Any]],
        seen: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[SamplingParams]:
        """Return the parameters of each request, with its own values in their `extra_args`.

        Args:
            sampling_params: as vLLM takes them; not changed.
            own: arguments `alpha`, `weights` and `filters`.
            prompts: the members' prompts, by field, of each request.
            seen: what members see of each conversation, by key; the request's own goes before it.
        """
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        count = len(prompts)
        every = _each("sampling_params", sampling_params, count)
        given = {name: _each(name, value, count) for name, value in own.items()}
        result = []
        for index, params in enumerate(every):
            values = {name: column[index] for name, column in given.items()} | prompts[index]
            try:
                result.append(self._with_values(params, values, seen[index] if seen else {}))
            except ProxyConfigError as error:
                raise (error.within(f"prompt {index}") if count > 1 else error) from None
        return result

    def _with_values(
        self, params: SamplingParams, values: Mapping[str, Any], seen: Mapping[str, Any]
    ) -> SamplingParams:
        """Return *params* with fields of `RequestControl` in `extra_args`; see `_own_params`."""
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
        merged = {**seen, **extra_args, **ours}
        merged = tokenized(merged, self.llm_engine.tokenizer, self.model_config.max_model_len)
        if merged == extra_args:
            return params
        params = copy(params)
        params.extra_args = merged
        return params


def tell_of_death(client: Any) -> None:
    """Have whoever waits for outputs learn that the engine's process is gone.

    vLLM (0.32) notices a killed process, marks it as dead and ends the thread that receives its
    outputs; but it leaves `step` waiting for them, for ever.
    """
    if not isinstance(client, SyncMPClient):
        return
    receiver, outputs = client.output_queue_thread, client.outputs_queue

    def tell() -> None:
        receiver.join()
        outputs.put(EngineDeadError())

    Thread(target=tell, daemon=True, name="proxy-engine-death").start()


@contextmanager
def _ours() -> Iterator[None]:
    """Raise what our validator says of a request, which vLLM wraps, as it is."""
    try:
        yield
    except VLLMClientError as error:
        if isinstance(error.__cause__, ProxyConfigError):
            raise error.__cause__ from None
        raise


def _split(prompt: Any) -> tuple[Any, dict[str, Any]]:
    """Return a prompt as vLLM takes it, and the members' own.

    Raises:
        ProxyConfigError: a key that neither knows, which vLLM would pass over.
    """
    if not isinstance(prompt, Mapping):
        return prompt, {}
    for key in prompt:
        if key not in _KNOWN:
            raise ProxyConfigError(f"unknown key `{key}` of a prompt{did_you_mean(key, _KNOWN)}")
    fields = {key: prompt[key] for key in _PROMPT_FIELDS if key in prompt}
    return {key: prompt[key] for key in prompt if key not in fields}, fields


def _each(name: str, value: Any, count: int) -> Sequence[Any]:
    """Return *count* values: of a list, or the one value again and again."""
    is_list = isinstance(value, list | tuple)
    if name == "weights" and is_list and value and isinstance(value[0], int | float):
        is_list = False
    if not is_list:
        return [value] * count
    if len(value) != count:
        raise ProxyConfigError(
            f"`{name}` has {len(value)} entries for {count} prompts; give one for each, or one "
            "for all"
        )
    return value
