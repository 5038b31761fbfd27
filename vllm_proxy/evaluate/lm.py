"""One running engine as a model of lm-evaluation-harness. Imports lm-eval, torch and vLLM.

The harness's own vLLM adapter says how text becomes tokens, how a context is cut, where an answer
ends and what its log probability is. Here an engine that runs already takes the place of the one
which that adapter starts, so that one engine answers as many systems.
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

from vllm_proxy.config.errors import ProxyConfigError, did_you_mean
from vllm_proxy.config.request import PROMPT_KEYS
from vllm_proxy.config.roles import Role
from vllm_proxy.config.schema import ChatFormat, ChatFormats, ProxyConfig
from vllm_proxy.evaluate.systems import PROXY, System, systems_of
from vllm_proxy.members.prompts import apply_template, chat_tokenizers
from vllm_proxy.members.read import end_ids, read_members

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from vllm import LLM, RequestOutput
    from vllm.tokenizers import TokenizerLike

MAX_GEN_TOKS = 256
"""The harness's, where neither the task nor the configuration says how long answers may be."""
_AT_ONCE = 4
"""So many times what an engine runs at once is scored between two writes to the cache."""


Progress = Callable[[int, int], None]
"""Called with how many requests of how many are answered."""


def no_progress(done: int, total: int) -> None:
    """Show nothing."""


class Conversation(str):
    """What the harness would have made one text of: messages, which members see in their formats.

    As a string it is the messages' JSON, by which the harness logs, hashes and caches it.
    """

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, str]]) -> "Conversation":
        """Wrap messages; one of the assistant at the end is the beginning of the answer."""
        return cls(json.dumps(list(messages), ensure_ascii=False))

    @property
    def messages(self) -> list[dict[str, str]]:
        """They again."""
        return json.loads(self)


@dataclass(frozen=True)
class View:
    """How one member sees a conversation.

    Attributes:
        role: of the member, for errors.
        tokenizer: of the member.
        format: `template`, or `plain`: what the task shows without a chat template.
    """

    role: str
    tokenizer: "TokenizerLike"
    format: ChatFormat

    def text(self, conversation: Conversation, system_prompt: str | None = None) -> str:
        """Return what the member reads.

        Args:
            conversation: whose last message, if it is the assistant's, is to be continued.
            system_prompt: goes before it, for members that see their chat template.

        Raises:
            ProxyConfigError: the chat template refuses the messages.
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
        begun = messages[-1]["role"] == "assistant"
        return apply_template(
            self.role,
            self.tokenizer,
            messages,
            add_generation_prompt=not begun,
            continue_final_message=begun,
        )

    def ids(self, text: str) -> list[int]:
        """Encode; a chat template has written its own BOS."""
        return list(self.tokenizer(text, add_special_tokens=self.format == "plain")["input_ids"])


class EngineLM(VLLM):
    """An engine that runs, behind the harness's interface.

    Args:
        llm: the engine; nobody else asks it anything meanwhile.
        extra_args: of every request: what makes it this system's.
        views: returns how members see conversations, by role; `base` is the engine's own prompt,
            and members without a view see that. Called at the first conversation.
        sampling: the configuration's; `max_tokens`, `stop` and `stop_token_ids` are defaults.
        stop_token_ids: ids at which this system ends its answers, beside the engine's.
        system_prompts: what only members with a chat template see first, by task.
        progress: called after every answer.

    Attributes:
        asked: how many requests the engine has answered; others were in the cache.
        cut: how many requests lost the beginning of their context, for want of room.
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
        TemplateLM.__init__(self)  # not VLLM's, which starts an engine
        self.model, self.tokenizer = llm, llm.get_tokenizer()
        sampling = sampling or {}
        # what methods of VLLM read
        self._max_length, self.data_parallel_size = None, 1
        self._max_gen_toks = sampling.get("max_tokens") or MAX_GEN_TOKS
        self.batch_size = _AT_ONCE * llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
        self.add_bos_token = self.custom_prefix_token_id = self.enable_thinking = None

        self._extra_args = dict(extra_args or {})
        self._make_views, self._system_prompts = views, system_prompts or {}
        self._stop = sampling.get("stop") or []
        if isinstance(self._stop, str):
            self._stop = [self._stop]
        self._stop_token_ids = [*(sampling.get("stop_token_ids") or ()), *stop_token_ids]
        self._progress, self._done, self._total = progress, 0, 0
        self.asked = self.cut = 0

    # -- prompts -----------------------------------------------------------------------------------

    @cached_property
    def _views(self) -> Mapping[Role, View]:
        return self._make_views()

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> Conversation:
        """Keep the messages for the members' formats. The last one says whether it is begun."""
        return Conversation.of(chat_history)

    def prompts(self, request: "Instance") -> dict[Role, list[int]]:
        """Return the token ids that members read before the answer; `base` are the engine's."""
        context = request.args[0]
        if not isinstance(context, Conversation):
            return {"base": self.tok_encode(context) or [self.prefix_token_id]}
        system_prompt = self._system_prompts.get(request.task_name)
        return {
            role: view.ids(view.text(context, system_prompt)) for role, view in self._views.items()
        }

    # -- generation --------------------------------------------------------------------------------

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
        """Generate until a stop string of the task, or the end of the text."""
        questions = [self._question(request) for request in requests]
        self._begin(len(requests))
        answers = [""] * len(requests)
        for index, output in self._answers(questions):
            stop = questions[index][1].stop
            answers[index] = postprocess_generated_text(output.outputs[0].text, stop, None)
            # the same key as in lm-eval's wrapper, unlike that of VLLM.generate_until
            self.cache_hook.add_partial("generate_until", requests[index].args, answers[index])
        return answers

    def _question(self, request: "Instance") -> tuple[TokensPrompt, SamplingParams]:
        kwargs, until, max_gen_toks = self.modify_gen_kwargs(
            request.args[1], eos=self._eos, default_max_gen_toks=self.max_gen_toks
        )
        if not request.args[1].get("do_sample"):
            # the adapter leaves vLLM's default, 1, where a task says nothing of sampling
            kwargs.setdefault("temperature", 0.0)
        prompts = {}
        whole = self.prompts(request)
        for role, ids in whole.items():
            prompts[role], max_gen_toks = maybe_truncate(ids, max_gen_toks, self.max_length)
        self.cut += prompts != whole
        base = prompts.pop("base")
        own = {PROMPT_KEYS[role]: ids for role, ids in prompts.items() if ids != base}
        params = SamplingParams(
            max_tokens=max_gen_toks,
            stop=[*until, *(stop for stop in self._stop if stop not in until)],
            extra_args={**self._extra_args, **own} or None,
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
        """Score the continuations that requests name. Returns log probability and greediness."""
        scores: dict[int, tuple[float, bool]] = {}
        texts, common, own = [], {}, {}
        for index, request in enumerate(requests):
            if not isinstance(request.args[0], Conversation):
                texts.append(index)
                continue
            contexts, scored = self._encode(request)
            if len(set(map(tuple, contexts.values()))) == 1:
                common[index] = (request.args, contexts["base"], scored)
            else:
                own[index] = (request.args, contexts, scored)
        if texts:
            of_texts = super().loglikelihood([requests[i] for i in texts], disable_tqdm)
            scores |= zip(texts, of_texts, strict=True)
        if common:
            scores |= zip(common, self._loglikelihood_tokens([*common.values()]), strict=True)
        if own:
            scores |= zip(own, self._score_after_own_prompts([*own.values()]), strict=True)
        return [scores[index] for index in range(len(requests))]

    def _encode(self, request: "Instance") -> tuple[dict[Role, list[int]], list[int]]:
        """Return the ids of a context, as each member reads it, and of its continuation.

        The base says which tokens the continuation has: they are common to all members.
        """
        context, continuation = request.args
        system_prompt = self._system_prompts.get(request.task_name)
        texts = {role: view.text(context, system_prompt) for role, view in self._views.items()}
        base = texts["base"]
        spaces = base[len(base.rstrip()) :]  # are the continuation's, as in `_encode_pair`
        ids = {role: self._views[role].ids(t.removesuffix(spaces)) for role, t in texts.items()}
        return ids, self._views["base"].ids(base + continuation)[len(ids["base"]) :]

    def _score_after_own_prompts(
        self, requests: list[tuple[tuple[str, str], dict[Role, list[int]], list[int]]]
    ) -> Iterator[tuple[float, bool]]:
        """Score continuations after a prompt for each member, which prompt logprobs cannot."""
        self._begin(len(requests))
        for start in range(0, len(requests), self.batch_size):
            some = requests[start : start + self.batch_size]
            prompts, params = [], []
            for _, contexts, scored in some:
                room = self.max_length - len(scored)
                cut = {role: ids[-room:] for role, ids in contexts.items()}
                self.cut += cut != contexts
                prompts.append(TokensPrompt(prompt_token_ids=cut.pop("base")))
                own = {PROMPT_KEYS[role]: ids for role, ids in cut.items()}
                params.append(SamplingParams(extra_args={**self._extra_args, **own}))
            inspected = self.model.inspect(
                prompts, params, completions=[scored for *_, scored in some], top_k=1
            )
            for (arguments, *_), found in zip(some, inspected, strict=True):
                of_proxy = [token.proxy for token in found.tokens]
                score = sum(own.logprob for own in of_proxy), all(own.rank == 1 for own in of_proxy)
                self.cache_hook.add_partial("loglikelihood", arguments, score)
                self.asked += 1
                self._done += 1
                self._progress(self._done, self._total)
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
        """Have prompts scored, for methods of VLLM."""
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
        self._done, self._total = 0, total
        self._progress(0, total)

    def _answers(
        self, questions: Sequence[tuple[TokensPrompt, SamplingParams]]
    ) -> "Iterator[tuple[int, RequestOutput]]":
        """Ask all; yield index and output of each when it finishes."""
        names = self.model.enqueue(
            [prompt for prompt, _ in questions],
            [params for _, params in questions],
            use_tqdm=False,
        )
        # The engine makes names unique by a suffix, which it does not show in its outputs.
        waiting = {name.partition("-")[0]: index for index, name in enumerate(names)}
        while waiting:
            for output in self.model.llm_engine.step():
                if output.finished:
                    yield waiting.pop(output.request_id), output
                    self.asked += 1
                    self._done += 1
                    self._progress(self._done, self._total)


def views_of(config: ProxyConfig, kind: str) -> dict[Role, View]:
    """Return how members see conversations when an engine of *config* answers as *kind*.

    As its `chat` says; without, all of them as the base's chat template has it. A member alone is
    given the engine's own prompt. Reads tokenizers, no weights.

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
    return views if kind == PROXY else {"base": views[kind]}


@register_model("vllm_proxy")
class ProxyLM(EngineLM):
    """An engine of a configuration as one of its systems.

    In the harness's own command line, `--model vllm_proxy --model_args config=FILE`, with
    `system=expert` and `alpha=0.5` if wanted.

    Args:
        llm: the engine.
        config: of it.
        system: what it answers as. A member alone ends its answers where it does when vLLM runs it
            by itself.
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
        alone = read_members(config)[0].get(system.kind)
        super().__init__(
            llm,
            extra_args=system.control.to_extra_args(),
            views=lambda: views_of(config, system.kind),
            sampling=config.sampling,
            stop_token_ids=sorted(end_ids(alone.model_config)) if alone else (),
            system_prompts=system_prompts,
            progress=progress,
        )

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> Self:
        """Start an engine as the harness's command line asks for it.

        Args:
            arg_dict: `config`, the path of the YAML file; `system`; `alpha`.
            additional_config: not read: the engine batches by itself.

        Raises:
            ProxyConfigError: the configuration cannot run, or has no such system.
        """
        from vllm_proxy.llm.proxy_llm import ProxyLLM

        known = {"config", "system", "alpha"}
        for key in arg_dict:
            if key not in known:
                raise ProxyConfigError(
                    f"--model_args: unknown key `{key}`{did_you_mean(key, known)}"
                )
        if "config" not in arg_dict:
            raise ProxyConfigError("--model_args: `config` is missing; add `config=FILE`")
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
