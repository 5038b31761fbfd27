"""What each member reads: text to ids, and a conversation in every member's own format."""

from dataclasses import replace
from inspect import signature

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase
from vllm.renderers import ChatParams, renderer_from_config

from support.tiny_models import tokenizer_engine, write_tokenizer
from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.members.prompts import (
    _NOT_VARIABLES,
    _PROMPT_ARGUMENTS,
    as_plain,
    chat_prompts,
    chat_tokenizers,
    member_renderers,
    require_followed,
    require_text,
    require_variables,
    tokenized,
)

BOS = 0
MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "The capital?"},
]
PLAIN = "Be short.\n\nThe capital?"
OF_BASE = "[system] Be short.\n[user] The capital?\n[assistant] "
OF_EXPERT = "Be short.|The capital?|"


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """Tokenizers that begin every text with a BOS, as Llama's do; the expert's has its template."""
    root = tmp_path_factory.mktemp("tokenizers")
    for role in ("base", "expert", "antiexpert"):
        tokenizer = write_tokenizer(root / role)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
        if role == "expert":
            tokenizer.chat_template = (
                "{{ bos_token }}{% for t in tools or [] %}{{ t.function.name }}!{% endfor %}"
                "{% for d in documents or [] %}{{ d.title }}?{% endfor %}"
                "{% if mode is defined %}{{ raise_exception('no ' + mode) }}{% endif %}"
                "{% for m in messages %}{{ m.content or '' }}|"
                "{% for c in m.tool_calls or [] %}{{ c.function.arguments.city }}|{% endfor %}"
                "{% endfor %}{% if add_generation_prompt %}>{{ end }}{% endif %}"
            )
        if role == "antiexpert":
            tokenizer.chat_template = None
            (root / role / "chat_template.jinja").unlink()
        tokenizer.save_pretrained(root / role)
        LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(root / role)
    return {role: str(root / role) for role in ("base", "expert", "antiexpert")}


@pytest.fixture(scope="module")
def base(members):
    return chat_tokenizers(config(members, {"base": "template"}))["base"]


def config(members, chat, **engine) -> ProxyConfig:
    return ProxyConfig.parse({**members, "chat": chat, "engine": engine}, "test")


class TestTokenized:
    def test_text_is_encoded_with_special_tokens(self, base):
        args = {"proxy_expert_prompt": "The large", "proxy_antiexpert_prompt": [5], "other": "The"}
        ids = base.encode("The large", add_special_tokens=True)
        assert ids[0] == BOS
        assert tokenized(args, base, 60) == {**args, "proxy_expert_prompt": ids}
        assert args["proxy_expert_prompt"] == "The large"

    def test_nothing_of_ours_needs_no_tokenizer(self):
        args = {"proxy_expert_prompt": [5], "proxy_alpha": 1}
        assert tokenized(args, None, 60) == args

    def test_no_tokenizer(self):
        with pytest.raises(ProxyConfigError) as error:
            tokenized({"proxy_expert_prompt": "a"}, None, 60)
        assert error.value.field == "proxy_expert_prompt"
        assert "`engine.skip_tokenizer_init`" in error.value.remedy

    def test_no_token(self, base):
        with pytest.raises(ProxyConfigError) as error:
            tokenized({"proxy_antiexpert_prompt": ""}, base, 60)
        assert (error.value.field, error.value.value) == ("proxy_antiexpert_prompt", "''")
        assert error.value.remedy is not None

    def test_what_is_too_long_is_not_encoded(self, base):
        text = "a" * (60 * base.max_chars_per_token)
        assert tokenized({"proxy_expert_prompt": text}, base, 60)["proxy_expert_prompt"]
        with pytest.raises(ProxyConfigError, match=rf"_prompt` has {len(text) + 1} char") as error:
            tokenized({"proxy_expert_prompt": text + "a"}, base, 60)
        assert (error.value.field, error.value.remedy) == ("proxy_expert_prompt", "shorten it")


def encode(tokenizer, text: str, bos: bool = True) -> list[int]:
    return [BOS] * bos + tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture(scope="module")
def renderer(members):
    """The renderer that an engine of these members has for its base."""
    return renderer_from_config(tokenizer_engine(members["base"]))


def arguments(**values) -> ChatParams:
    return ChatParams(chat_template_kwargs={"add_generation_prompt": True, **values})


class TestChat:
    @pytest.fixture
    def prompts(self, members, renderer):
        def prompts(chat, messages=MESSAGES, *, members=members, **values) -> dict:
            settings, params = config(members, chat), arguments(tokenize=False, **values)
            is_plain = settings.chat.of("base") == "plain"
            _, (seen,) = renderer.render_chat(
                [messages],
                as_plain(params) if is_plain else params,
                replace(renderer.default_chat_tok_params, add_special_tokens=is_plain),
            )
            renderers = member_renderers(settings, renderer)
            ids = seen["prompt_token_ids"]
            return chat_prompts(messages, settings.chat, renderers, params, ids)

        return prompts

    def test_the_papers(self, prompts, base):
        """The chat expert sees its template; base and antiexpert plain text."""
        assert prompts({"expert": "template"}) == {
            "proxy_expert_prompt": encode(base, OF_EXPERT + ">")
        }

    def test_a_template_is_each_members_own(self, prompts, base):
        assert prompts({"base": "template", "expert": "template"}) == {
            "proxy_expert_prompt": encode(base, OF_EXPERT + ">"),
            "proxy_antiexpert_prompt": encode(base, PLAIN),
        }

    def test_all_plain_is_what_the_base_sees(self, prompts):
        assert prompts({"base": "plain"}) == {}

    def test_a_template_like_the_bases_is_what_the_base_sees(self, prompts, members):
        members = {**members, "expert": members["base"]}
        chat = {"base": "template", "expert": "template"}
        assert "proxy_expert_prompt" not in prompts(chat, members=members)

    def test_a_missing_member_sees_nothing(self, prompts, members):
        two = {"base": members["base"], "expert": members["expert"]}
        assert prompts({"base": "template"}, members=two).keys() == {"proxy_expert_prompt"}

    @pytest.mark.parametrize(
        "values",
        [
            {"add_generation_prompt": False},
            {"add_generation_prompt": False, "continue_final_message": True},
            {"end": "."},
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
            {"documents": [{"title": "t", "text": "x"}]},
            {"no_variable": 1},
        ],
        ids=str,
    )
    def test_arguments_of_templates(self, prompts, members, values):
        """As transformers has them for the member alone."""
        expert = AutoTokenizer.from_pretrained(members["expert"])
        ids = expert.apply_chat_template(
            MESSAGES, return_dict=False, **{"add_generation_prompt": True, **values}
        )
        assert prompts({"expert": "template"}, **values) == {"proxy_expert_prompt": ids}

    def test_plain_text_has_no_arguments(self, prompts, base):
        messages = [*MESSAGES, {"role": "assistant", "content": ""}]
        given = {"continue_final_message": True, "add_generation_prompt": False, "end": "."}
        seen = prompts({"base": "template"}, messages, **given)
        assert seen["proxy_antiexpert_prompt"] == encode(base, PLAIN)

    def test_calls_of_tools_are_given_to_templates_as_objects(self, prompts, members, renderer):
        call = {"name": "f", "arguments": '{"city": "Paris"}'}
        calls = [{"id": "1", "type": "function", "function": call}]
        messages = [*MESSAGES, {"role": "assistant", "tool_calls": calls}]
        ids = prompts({"expert": "template"}, messages)["proxy_expert_prompt"]
        assert renderer.tokenizer.decode(ids) == f"<s>{OF_EXPERT}|Paris|>"

    @pytest.mark.parametrize(
        ("messages", "text"),
        [
            (MESSAGES, PLAIN),
            ([{"role": "user", "content": " a \n"}], " a \n"),
            ([{"role": "user", "content": ""}, {"role": "user", "content": "b"}], "b"),
            ([{"role": "assistant"}, {"role": "user", "content": "b"}], "b"),
            (
                [{"role": "assistant", "content": None}, {"role": "user", "content": "b\n\nc"}],
                "b\n\nc",
            ),
            ([{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}], "a\nb"),
        ],
    )
    def test_plain_text(self, prompts, base, messages, text):
        """The texts joined by blank lines; of a content in parts, by lines."""
        seen = prompts({"base": "template"}, messages)
        assert seen["proxy_antiexpert_prompt"] == encode(base, text)

    @pytest.mark.parametrize("part", [{"type": "image_url"}, {"image_url": "x"}, {"type": 5}])
    def test_only_text(self, part):
        with pytest.raises(ProxyConfigError, match="not text") as error:
            require_text([{"role": "user", "content": [part]}])
        assert error.value.field == "messages"
        assert error.value.remedy is not None

    @pytest.mark.parametrize(
        ("values", "says"),
        [
            (
                {"mode": "x"},
                "`messages`, with `mode`: they cannot be rendered for the expert: no x",
            ),
            (
                {"add_generation_prompt": True, "continue_final_message": True},
                "`messages`, with `continue_final_message`: they cannot be rendered for the expert",
            ),
        ],
    )
    def test_what_a_template_refuses(self, prompts, values, says):
        with pytest.raises(ProxyConfigError) as caught:
            prompts({"expert": "template"}, **values)
        assert caught.value.field == "messages"
        assert str(caught.value).startswith(says)
        assert "\n" not in str(caught.value)

    def test_too_long(self, prompts):
        documents = [{"title": "a b " * 3000, "text": ""}]
        with pytest.raises(ProxyConfigError, match=r"for the expert: .*context length"):
            prompts({"expert": "template"}, documents=documents)


class TestArguments:
    """What members cannot follow is refused by name."""

    def require(self, members, chat=("expert",), **values) -> None:
        settings = config(members, dict.fromkeys(chat, "template") or {"base": "plain"})
        require_followed(arguments(**values), settings.chat, settings.roles)

    @pytest.mark.parametrize("given", [3, "x", [1], True])
    def test_kwargs_are_a_mapping(self, given):
        with pytest.raises(ProxyConfigError) as error:
            require_variables(given)
        assert (error.value.field, error.value.value) == ("chat_template_kwargs", repr(given))
        assert "mapping" in error.value.remedy

    @pytest.mark.parametrize(
        ("names", "remedy"),
        [
            (("add_generation_prompt", "continue_final_message"), "give `{}` outside"),
            (("tokenize", "chat_template", "return_dict"), "remove it"),
            (("conversation", "messages", "tokenizer", "model_config"), "remove it"),
        ],
    )
    def test_what_is_no_variable_of_a_template(self, names, remedy):
        for name in names:
            with pytest.raises(ProxyConfigError) as caught:
                require_variables({name: True})
            assert caught.value.field == f"chat_template_kwargs.{name}"
            assert remedy.format(name) in caught.value.remedy

    def test_every_argument_of_transformers_is_known(self):
        names = signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys()
        known = _NOT_VARIABLES | {*_PROMPT_ARGUMENTS, "tools", "documents"}
        assert names - {"self", "kwargs"} <= known

    def test_continue_and_begin(self, members):
        with pytest.raises(ProxyConfigError, match="`continue_final_message`") as error:
            self.require(members, continue_final_message=True)
        assert error.value.field == "add_generation_prompt"
        assert "to false" in error.value.remedy

    @pytest.mark.parametrize("name", ["tools", "documents"])
    def test_what_nobody_would_see(self, members, name):
        self.require(members, **{name: [{}]})
        with pytest.raises(ProxyConfigError, match="every member sees plain text") as error:
            self.require(members, chat=(), **{name: [{}]})
        assert error.value.field == name
        assert "'template'" in error.value.remedy


class TestStart:
    """Found before weights are read."""

    def test_no_template(self, members):
        with pytest.raises(ProxyConfigError) as caught:
            chat_tokenizers(config(members, {"antiexpert": "template"}))
        assert (caught.value.field, caught.value.value) == ("chat.antiexpert", "'template'")
        assert "`chat: {antiexpert: plain}`" in caught.value.remedy

    def test_no_tokenizer(self, members):
        settings = config(members, {"base": "plain"}, skip_tokenizer_init=True)
        with pytest.raises(ProxyConfigError, match="no tokenizer") as error:
            chat_tokenizers(settings)
        assert error.value.field == "chat"
        assert "`engine.skip_tokenizer_init`" in error.value.remedy

    def test_unreadable_tokenizer(self, members, tmp_path):
        settings = config({**members, "expert": str(tmp_path)}, {"expert": "template"})
        with pytest.raises(ProxyConfigError, match="no tokenizer of the expert") as caught:
            chat_tokenizers(settings)
        assert caught.value.field == "chat"
        assert caught.value.remedy is not None
        assert "\n" not in str(caught.value)

    def test_another_tokenizer_of_the_engine(self, members):
        settings = config(
            members, {"base": "template"}, tokenizer=members["expert"], tokenizer_mode="hf"
        )
        assert chat_tokenizers(settings)["base"].chat_template.startswith("{{ bos_token }}")
