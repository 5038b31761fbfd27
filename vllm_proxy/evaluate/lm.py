"""A running engine as a model of lm-evaluation-harness. Imports lm-eval, torch and vLLM.

The harness's own vLLM adapter, `VLLM`, decides how text becomes tokens, how a context is cut, where
an answer ends and what its log-probability is. The classes here give it an engine that runs already
instead of starting one, so that one engine can answer as several systems.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.api.utils import maybe_delimit
from lm_eval.models.utils import maybe_truncate, postprocess_generated_text
from lm_eval.models.vllm_causallms import VLLM
from lm_eval.utils import simple_parse_args_string
from vllm import SamplingParams
from vllm.inputs import TokensPrompt

from vllm_proxy.config.errors import ProxyConfigError, unknown_key
from vllm_proxy.config.request import PROMPT_KEYS
from vllm_proxy.config.roles import Role
from vllm_proxy.config.schema import ChatFormat, ChatFormats, ProxyConfig
from vllm_proxy.evaluate.systems import PROXY, System, systems_of
from vllm_proxy.llm.sampling import request_name
from vllm_proxy.members.prompts import apply_template, chat_tokenizers
from vllm_proxy.members.read import end_ids, read_members

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from vllm import LLM, RequestOutput
    from vllm.tokenizers import TokenizerLike

MAX_GEN_TOKS = 256
"""The harness's limit on an answer's tokens if neither the task nor the configuration sets one."""
_BATCHES_PER_WRITE = 4
"""Scores are written to the cache after this many times the engine's `max_num_seqs` requests."""


Progress = Callable[[int, int], None]
"""Called with the number of answered requests, and the number of all requests."""


def no_progress(done: int, total: int) -> None:
    """Show nothing."""


class Conversation(str):
    """Messages, which each member sees in its own format.

    A string, because the harness expects a text from `apply_chat_template`, and logs, hashes and
    caches it. The text is the messages' JSON.
    """

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, str]]) -> "Conversation":
        """Wrap messages; a last message of the assistant is the beginning of the answer."""
        return cls(json.dumps(list(messages), ensure_ascii=False))

    @property
    def messages(self) -> list[dict[str, str]]:
        """The messages, decoded from their JSON."""
        return json.loads(self)


@dataclass(frozen=True)
class View:
    """How one member sees a conversation.

    Attributes:
        role: of the member, for errors.
        tokenizer: of the member.
        format: `template`, or `plain`: the text that the task has without a chat template.
    """

    role: str
    tokenizer: "TokenizerLike"
    format: ChatFormat

    def text(self, conversation: Conversation, system_prompt: str | None = None) -> str:
        """Return the text that the member reads.

        Args:
            conversation: a last message of the assistant is continued.
            system_prompt: precedes the messages if the member sees its chat template.

        Raises:
            ProxyConfigError: the chat template rejects the messages.
        """
        messages = conversation.messages
        if self.format == "plain":
            text = ""
            for message in messages:
                text = maybe_delimit(text, message["content"], " ")
            return text
        if system_prompt:
            if messages[0]["role"] == "system":
                system_prompt = f"{system_prompt}\n\n{messages.pop(0)['content']}"
            messages.insert(0, {"role": "system", "content": system_prompt})
        continues = messages[-1]["role"] == "assistant"
        return apply_template(
            self.role,
            self.tokenizer,
            messages,
            add_generation_prompt=not continues,
            continue_final_message=continues,
        )

    def ids(self, text: str) -> list[int]:
        """Encode a text; a chat template has already written its BOS."""
        return list(self.tokenizer(text, add_special_tokens=self.format == "plain")["input_ids"])


class EngineLM(VLLM):
    """A running engine with the harness's interface.

    Args:
        llm: the engine; nothing else may submit requests to it.
        extra_args: of every request: they make the engine answer as this system.
        views: returns how members see conversations, by role. `base` is the prompt that vLLM
            itself sees, and members without a view see the same. Called at the first conversation.
        sampling: of the configuration; `max_tokens`, `stop` and `stop_token_ids` are defaults.
        stop_token_ids: ids that end this system's answers, in addition to the engine's.
        system_prompts: by task, for members that see a chat template.
        progress: called after every answer.

    Attributes:
        asked: number of requests that the engine has answered; the others were in the cache.
        cut: number of requests whose context was too long and lost its beginning.
    """

    def __init__(
        self,
        llm: "LLM",
        *,
        extra_args: Mapping[str, Any] | None = None,
        views: Callable[[], Mapping[Role, View]] = dict,
        sampling: Mapping[str, Any] | None = None,
        stop_token_ids: Sequence[int] = (),
        system_prompts: Mapping[str, str] | None = None,
        progress: Progress = no_progress,
    ) -> None:
        TemplateLM.__init__(self)  # VLLM's own would start an engine
        self.model = llm
        self.tokenizer = llm.get_tokenizer()
        sampling = sampling or {}
        # Attributes that methods of VLLM read.
        self._max_length = None
        self.data_parallel_size = 1
        self._max_gen_toks = sampling.get("max_tokens") or MAX_GEN_TOKS
        self.batch_size = (
            _BATCHES_PER_WRITE * llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
        )
        self.add_bos_token = self.custom_prefix_token_id = self.enable_thinking = None

        self._extra_args = dict(extra_args or {})
        self._make_views = views
        self._system_prompts = system_prompts or {}
        self._stop = sampling.get("stop") or []
        if isinstance(self._stop, str):
            self._stop = [self._stop]
        self._stop_token_ids = [*(sampling.get("stop_token_ids") or ()), *stop_token_ids]
        self._progress = progress
        self._done = self._total = 0
        self.asked = self.cut = 0

    # -- prompts -----------------------------------------------------------------------------------

    @cached_property
    def _views(self) -> Mapping[Role, View]:
        return self._make_views()

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> Conversation:
        """Return the messages themselves, for the members' formats."""
        return Conversation.of(chat_history)

    def prompts(self, request: "Instance") -> dict[Role, list[int]]:
        """Return the token ids that members read before the answer; `base` is vLLM's own prompt."""
        context = request.args[0]
        if not isinstance(context, Conversation):
            return {"base": self.tok_encode(context) or [self.prefix_token_id]}
        system_prompt = self._system_prompts.get(request.task_name)
        return {
            role: view.ids(view.text(context, system_prompt)) for role, view in self._views.items()
        }

    # -- generation --------------------------------------------------------------------------------

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
        """Generate answers, each up to a stop string of the task or the end of the text."""
        questions = [self.generation_request(request) for request in requests]
        self._begin(len(requests))
        answers = [""] * len(requests)
        for index, output in self._answers(questions):
            stop = questions[index][1].stop
            answers[index] = postprocess_generated_text(output.outputs[0].text, stop, None)
            # The key of lm-eval's wrapper, which differs from that of VLLM.generate_until.
            self.cache_hook.add_partial("generate_until", requests[index].args, answers[index])
        return answers

    def generation_request(self, request: "Instance") -> tuple[TokensPrompt, SamplingParams]:
        """Return prompt and parameters of a request of `generate_until`, and count a cut context.

        The task's generation arguments take precedence over the configuration's sampling.
        """
        kwargs, until, max_gen_toks = self.modify_gen_kwargs(
            request.args[1], eos=self._eos, default_max_gen_toks=self.max_gen_toks
        )
        if not request.args[1].get("do_sample"):
            # The adapter would leave vLLM's default, 1, if a task does not sample.
            kwargs.setdefault("temperature", 0.0)
        prompts = {}
        whole = self.prompts(request)
        for role, ids in whole.items():
            prompts[role], max_gen_toks = maybe_truncate(ids, max_gen_toks, self.max_length)
        self.cut += prompts != whole
        base = prompts.pop("base")
        member_prompts = {PROMPT_KEYS[role]: ids for role, ids in prompts.items() if ids != base}
        params = SamplingParams(
            max_tokens=max_gen_toks,
            stop=[*until, *(stop for stop in self._stop if stop not in until)],
            extra_args={**self._extra_args, **member_prompts} or None,
            **{"stop_token_ids": self._stop_token_ids, **kwargs},
        )
        return TokensPrompt(prompt_token_ids=base), params

    @property
    def _eos(self) -> str:
        return self.tokenizer.decode(self.eot_token_id) or self.tokenizer.eos_token

    # -- log probabilities -------------------------------------------------------------------------

    def loglikelihood(
        self, requests: "list[Instance]", disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Score given continuations. Returns log-probability in nats, and whether it is greedy."""
        scores: dict[int, tuple[float, bool]] = {}
        # Plain texts; conversations that all members read alike; those that they read differently.
        texts, alike, different = [], {}, {}
        for index, request in enumerate(requests):
            if not isinstance(request.args[0], Conversation):
                texts.append(index)
                continue
            contexts, scored = self._encode(request)
            if len(set(map(tuple, contexts.values()))) == 1:
                alike[index] = (request.args, contexts["base"], scored)
            else:
                different[index] = (request.args, contexts, scored)
        if texts:
            of_texts = super().loglikelihood([requests[i] for i in texts], disable_tqdm)
            scores |= zip(texts, of_texts, strict=True)
        if alike:
            scores |= zip(alike, self._loglikelihood_tokens([*alike.values()]), strict=True)
        if different:
            inspected = self._score_by_inspection([*different.values()])
            scores |= zip(different, inspected, strict=True)
        return [scores[index] for index in range(len(requests))]

    def _encode(self, request: "Instance") -> tuple[dict[Role, list[int]], list[int]]:
        """Return the ids of a context as each member reads it, and of its continuation.

        The continuation is tokenized after the base's context; all members score the same tokens.
        """
        context, continuation = request.args
        system_prompt = self._system_prompts.get(request.task_name)
        texts = {role: view.text(context, system_prompt) for role, view in self._views.items()}
        base = texts["base"]
        spaces = base[len(base.rstrip()) :]  # belong to the continuation, as in `_encode_pair`
        ids = {role: self._views[role].ids(t.removesuffix(spaces)) for role, t in texts.items()}
        return ids, self._views["base"].ids(base + continuation)[len(ids["base"]) :]

    def _score_by_inspection(
        self, requests: list[tuple[tuple[str, str], dict[Role, list[int]], list[int]]]
    ) -> Iterator[tuple[float, bool]]:
        """Score continuations of prompts that differ by member, which prompt logprobs cannot."""
        self._begin(len(requests))
        for start in range(0, len(requests), self.batch_size):
            some = requests[start : start + self.batch_size]
            prompts, params = [], []
            for _, contexts, scored in some:
                room = self.max_length - len(scored)
                cut = {role: ids[-room:] for role, ids in contexts.items()}
                self.cut += cut != contexts
                prompts.append(TokensPrompt(prompt_token_ids=cut.pop("base")))
                member_prompts = {PROMPT_KEYS[role]: ids for role, ids in cut.items()}
                extra_args = {**self._extra_args, **member_prompts}
                params.append(SamplingParams(extra_args=extra_args))
            inspected = self.model.inspect(
                prompts, params, completions=[scored for *_, scored in some], top_k=1
            )
            for (arguments, *_), found in zip(some, inspected, strict=True):
                tokens = [token.proxy for token in found.tokens]
                score = sum(token.logprob for token in tokens), all(t.rank == 1 for t in tokens)
                self.cache_hook.add_partial("loglikelihood", arguments, score)
                self._count_answer()
                yield score

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        self._begin(len(requests))
        self.cut += sum(len(before + scored) >= self.max_length for _, before, scored in requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm=True)

    def _model_generate(
        self,
        requests: list[list[int]],
        generate: bool = False,
        sampling_params: Any = None,
    ) -> "list[RequestOutput]":
        """Score prompts, for methods of VLLM."""
        params = SamplingParams(
            temperature=0,
            prompt_logprobs=1,
            max_tokens=1,
            detokenize=False,
            extra_args=self._extra_args or None,
        )
        questions = [(TokensPrompt(prompt_token_ids=ids), params) for ids in requests]
        outputs = dict(self._answers(questions))
        return [outputs[index] for index in range(len(requests))]

    # -- the engine --------------------------------------------------------------------------------

    def _begin(self, total: int) -> None:
        self._done = 0
        self._total = total
        self._progress(0, total)

    def _count_answer(self) -> None:
        self.asked += 1
        self._done += 1
        self._progress(self._done, self._total)

    def _answers(
        self, questions: Sequence[tuple[TokensPrompt, SamplingParams]]
    ) -> "Iterator[tuple[int, RequestOutput]]":
        """Submit all questions; yield index and output of each when it finishes."""
        request_ids = self.model.enqueue(
            [prompt for prompt, _ in questions],
            [params for _, params in questions],
            use_tqdm=False,
        )
        waiting = {request_name(id_): index for index, id_ in enumerate(request_ids)}
        while waiting:
            for output in self.model.llm_engine.step():
                if output.finished:
                    yield waiting.pop(output.request_id), output
                    self._count_answer()


def views_of(config: ProxyConfig, kind: str) -> dict[Role, View]:
    """Return how members see conversations when an engine of *config* answers as *kind*.

    `chat` in the configuration decides; without it, all members see the base's chat template. A
    single member gets its view as vLLM's own prompt. Reads tokenizers, but no weights.

    Raises:
        ProxyConfigError: there is no chat template.
    """
    if config.chat is None:
        config = config.model_copy(update={"chat": ChatFormats(base="template")})
        return {"base": View("base", chat_tokenizers(config)["base"], "template")}
    views = {
        role: View(role, tokenizer, config.chat.of(role))
        for role, tokenizer in chat_tokenizers(config).items()
    }
    if kind == PROXY:
        return views
    (view,) = (view for role, view in views.items() if role == kind)
    return {"base": view}


@register_model("vllm_proxy")
class ProxyLM(EngineLM):
    """An engine of a configuration that answers as one of its systems.

    In the harness's own command line: `--model vllm_proxy --model_args config=FILE`; the arguments
    `system=expert` and `alpha=0.5` are optional.

    Args:
        llm: the engine.
        config: of the engine.
        system: that the engine answers as. A single member ends its answers where it would end them
            if vLLM ran it alone.
        system_prompts: see `EngineLM`.
        progress: see `EngineLM`.
    """

    def __init__(
        self,
        llm: "LLM",
        config: ProxyConfig,
        system: System,
        *,
        system_prompts: Mapping[str, str] | None = None,
        progress: Progress = no_progress,
    ) -> None:
        members = read_members(config)[0].items()
        member = next((member for role, member in members if role == system.kind), None)
        super().__init__(
            llm,
            extra_args=system.control.to_extra_args(),
            views=lambda: views_of(config, system.kind),
            sampling=config.sampling,
            stop_token_ids=sorted(end_ids(member.model_config)) if member else (),
            system_prompts=system_prompts,
            progress=progress,
        )

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> Self:
        """Start an engine with the arguments of the harness's command line.

        Args:
            arg_dict: `config`, the path of the YAML file; `system`; `alpha`.
            additional_config: not used: the engine forms its batches.

        Raises:
            ProxyConfigError: the configuration cannot run, or does not have this system.
        """
        from vllm_proxy.llm.proxy_llm import ProxyLLM

        known = {"config", "system", "alpha"}
        for key in arg_dict:
            if key not in known:
                raise unknown_key(key, known).within("--model_args")
        if "config" not in arg_dict:
            raise ProxyConfigError(
                "`config` is missing", field="--model_args", remedy="add `config=FILE`"
            )
        config = ProxyConfig.from_yaml(arg_dict["config"])
        if "alpha" in arg_dict:
            values = config.model_dump(exclude_none=True) | {"alpha": arg_dict["alpha"]}
            config = ProxyConfig.parse(values, "--model_args")
        (system,) = systems_of(config, [arg_dict.get("system", PROXY)])
        return cls(ProxyLLM.from_config(config), config, system)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> Self:
        """Start an engine; see `create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string))
