"""What each member reads: text to ids, and a conversation in every member's own format."""

import pytest
from tiny_models import write_tokenizer
from tokenizers.processors import TemplateProcessing

from vllm_proxy.config import ChatFormats, ProxyConfig
from vllm_proxy.errors import ProxyConfigError
from vllm_proxy.prompts import PLAIN_TEMPLATE, chat_prompts, chat_tokenizers, tokenized

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
                "{{ bos_token }}{% for m in messages %}{{ m.content }}|{% endfor %}"
                "{% if add_generation_prompt %}>{% endif %}"
            )
        if role == "antiexpert":
            tokenizer.chat_template = None
            (root / role / "chat_template.jinja").unlink()
        tokenizer.save_pretrained(root / role)
        (root / role / "config.json").write_text('{"model_type": "llama"}')
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
        assert tokenized(None, None, 60) is None
        args = {"proxy_expert_prompt": [5], "proxy_alpha": 1}
        assert tokenized(args, None, 60) == args

    def test_no_tokenizer(self):
        with pytest.raises(ProxyConfigError, match=r"`proxy_expert_prompt` is text, .*skip_token"):
            tokenized({"proxy_expert_prompt": "a"}, None, 60)

    def test_no_token(self, base):
        with pytest.raises(ProxyConfigError, match="`proxy_antiexpert_prompt` is '': no token"):
            tokenized({"proxy_antiexpert_prompt": ""}, base, 60)

    def test_what_is_too_long_is_not_encoded(self, base):
        text = "a" * (60 * base.max_chars_per_token)
        assert tokenized({"proxy_expert_prompt": text}, base, 60)["proxy_expert_prompt"]
        with pytest.raises(ProxyConfigError, match=rf"_prompt` has {len(text) + 1} characters; at"):
            tokenized({"proxy_expert_prompt": text + "a"}, base, 60)


def encode(tokenizer, text: str, bos: bool = True) -> list[int]:
    return [BOS] * bos + tokenizer.encode(text, add_special_tokens=False)


class TestChat:
    def prompts(self, members, chat, messages=MESSAGES, **arguments) -> dict:
        settings = config(members, chat)
        return chat_prompts(messages, settings.chat, chat_tokenizers(settings), 60, **arguments)

    def test_the_papers(self, members, base):
        """The chat expert sees its template; base and antiexpert plain text."""
        prompts = self.prompts(members, {"expert": "template"})
        assert prompts == {"proxy_expert_prompt": encode(base, OF_EXPERT + ">")}

    def test_a_template_is_each_members_own(self, members, base):
        prompts = self.prompts(members, {"base": "template", "expert": "template"})
        assert prompts == {
            "proxy_expert_prompt": encode(base, OF_EXPERT + ">"),
            "proxy_antiexpert_prompt": encode(base, PLAIN),
        }

    def test_all_plain_is_what_the_base_sees(self, members):
        assert self.prompts(members, {"base": "plain"}) == {}

    def test_a_template_like_the_bases_is_what_the_base_sees(self, members):
        members = {**members, "expert": members["base"]}
        assert "proxy_expert_prompt" not in self.prompts(
            members, {"base": "template", "expert": "template"}
        )

    def test_a_missing_member_sees_nothing(self, members):
        two = {"base": members["base"], "expert": members["expert"]}
        assert self.prompts(two, {"base": "template"}).keys() == {"proxy_expert_prompt"}

    def test_arguments_of_templates(self, members, base):
        prompts = self.prompts(members, {"expert": "template"}, add_generation_prompt=False)
        assert prompts == {"proxy_expert_prompt": encode(base, OF_EXPERT)}

    def test_another_template_of_the_base(self, members, base):
        settings = config(members, {"base": "template"})
        own = chat_tokenizers(settings)
        prompts = chat_prompts(MESSAGES, settings.chat, own, 60, base_template=PLAIN_TEMPLATE)
        assert prompts.keys() == {"proxy_expert_prompt", "proxy_antiexpert_prompt"}  # a BOS more

    @pytest.mark.parametrize(
        "messages",
        [
            MESSAGES,
            [{"role": "user", "content": " a \n"}],
            [{"role": "user", "content": ""}, {"role": "user", "content": "b"}],
            [{"role": "assistant"}, {"role": "user", "content": "b"}],
            [{"role": "assistant", "content": None}, {"role": "user", "content": "b\n\nc"}],
        ],
    )
    def test_plain_text_is_that_of_the_plain_template(self, members, base, messages):
        """vLLM renders it for the base; we, for the others."""
        prompts = self.prompts(members, {"base": "template"}, messages)
        rendered = base.apply_chat_template(
            messages, chat_template=PLAIN_TEMPLATE, tokenize=False, add_generation_prompt=True
        )
        assert prompts["proxy_antiexpert_prompt"] == encode(base, rendered)

    def test_parts_of_a_content_are_lines(self, members, base):
        parts = [{"type": "text", "text": "a"}, "b"]
        prompts = self.prompts(members, {"base": "template"}, [{"role": "user", "content": parts}])
        assert prompts["proxy_antiexpert_prompt"] == encode(base, "a\nb")

    @pytest.mark.parametrize(
        ("messages", "says"),
        [
            ([{"role": "user", "content": [{"type": "image_url"}]}], "'image_url'"),
            ([{"role": "user", "content": 5}], "content 5"),
        ],
    )
    def test_only_text(self, members, messages, says):
        with pytest.raises(ProxyConfigError, match=f"`messages`.*{says}"):
            self.prompts(members, {"expert": "template"}, messages)

    def test_what_a_template_refuses(self, members):
        settings = config(members, {"expert": "template"})
        own = chat_tokenizers(settings)
        own["expert"].chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(ProxyConfigError, match=r"`messages`: the expert's .*must alternate"):
            chat_prompts(MESSAGES, settings.chat, own, 60)


class TestStart:
    """Found before weights are read."""

    def test_no_template(self, members):
        with pytest.raises(ProxyConfigError) as caught:
            chat_tokenizers(config(members, {"antiexpert": "template"}))
        assert str(caught.value) == (
            "`chat.antiexpert` is 'template': the antiexpert's tokenizer has no chat template; "
            "add one to its files, or set `chat: {antiexpert: plain}`"
        )

    def test_no_tokenizer(self, members):
        settings = config(members, {"base": "plain"}, skip_tokenizer_init=True)
        with pytest.raises(ProxyConfigError, match=r"`chat` is given, .*no tokenizer; remove"):
            chat_tokenizers(settings)

    def test_unreadable_tokenizer(self, members, tmp_path):
        settings = config({**members, "expert": str(tmp_path)}, {"expert": "template"})
        with pytest.raises(ProxyConfigError, match="`chat`: no tokenizer of the expert") as caught:
            chat_tokenizers(settings)
        assert "\n" not in str(caught.value)

    def test_another_tokenizer_of_the_engine(self, members):
        settings = config(
            members, {"base": "template"}, tokenizer=members["expert"], tokenizer_mode="hf"
        )
        prompts = chat_prompts(
            MESSAGES, ChatFormats(base="template"), chat_tokenizers(settings), 60
        )
        assert prompts["proxy_antiexpert_prompt"][0] == BOS
        assert chat_tokenizers(settings)["base"].chat_template.startswith("{{ bos_token }}")
