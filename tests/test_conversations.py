"""Conversations at vLLM's server, without an engine: its own requests, rendered as it does."""

import asyncio

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.protocol import (
    BatchChatCompletionRequest,
    ChatCompletionRequest,
)
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest
from vllm.exceptions import VLLMValidationError
from vllm.renderers import renderer_from_config
from vllm.renderers.online_renderer import OnlineRenderer

from support.tiny_models import MEMBER_TEMPLATE, tokenizer_engine, write_tokenizer
from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.schema import ProxySection
from vllm_proxy.members.prompts import PLAIN_TEMPLATE
from vllm_proxy.server.conversations import ServedConversations

BOS = 0
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The capital?"}]
BEGUN = [*MESSAGES, {"role": "assistant", "content": "It is"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """Tokenizers that begin texts with a BOS, as Llama's do, and templates that write their own."""
    paths = {}
    for role in ("base", "expert"):
        path = tmp_path_factory.mktemp(role)
        tokenizer = write_tokenizer(path)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
        own = MEMBER_TEMPLATE if role == "expert" else "{{ bos_token }}" + tokenizer.chat_template
        tokenizer.chat_template = own
        tokenizer.save_pretrained(path)
        LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(path)
        paths[role] = str(path)
    return {**paths, "antiexpert": paths["base"]}


@pytest.fixture(scope="module")
def config(members):
    return tokenizer_engine(members["base"])


@pytest.fixture
def serve(members, config):
    """Start conversations as a server does; return its renderer."""

    def serve(chat: dict, limit: int = 10_000, **arguments) -> OnlineRenderer:
        def validate(own: dict) -> None:
            if len(own.get("proxy_expert_prompt", ())) > limit:
                raise ProxyConfigError("`proxy_expert_prompt`: too long")

        async def in_thread(function, *values):
            return function(*values)

        given = {"expert": members["expert"], "antiexpert": members["antiexpert"], "chat": chat}
        online = OnlineRenderer(
            config.model_config,
            renderer_from_config(config),
            request_logger=None,
            chat_template=PLAIN_TEMPLATE if chat.get("base", "plain") == "plain" else None,
            chat_template_content_format="auto",
            **arguments,
        )
        section = ProxySection.parse(given, "test")
        ServedConversations(online, section, validate, in_thread)
        return online

    return serve


def chat(online: OnlineRenderer, messages=MESSAGES, **fields) -> tuple[list[int], dict]:
    """Render a chat completion; return the base's ids and the request's own values."""
    request = ChatCompletionRequest.model_validate({"messages": messages, **fields})
    _, (prompt,) = asyncio.run(online.render_chat(request))
    return prompt["prompt_token_ids"], request.vllm_xargs


def respond(online: OnlineRenderer, **fields) -> tuple[list[int], dict]:
    """The same of `/v1/responses`."""
    request = ResponsesRequest.model_validate(fields)
    rendered = asyncio.run(online.render_responses(request))
    return rendered.engine_input["prompt_token_ids"], request.vllm_xargs


@pytest.fixture(scope="module")
def seen(members):
    """What transformers makes of a conversation for a member alone."""
    tokenizers = {role: AutoTokenizer.from_pretrained(path) for role, path in members.items()}

    def seen(role: str, messages=MESSAGES, **arguments) -> list[int]:
        arguments = {"add_generation_prompt": True, **arguments}
        return tokenizers[role].apply_chat_template(messages, return_dict=False, **arguments)

    seen.plain = lambda text: tokenizers["base"].encode(text)
    return seen


PAPERS = {"expert": "template"}
PLAIN = "Be brief.\n\nThe capital?"


class TestChatCompletions:
    @pytest.mark.parametrize(
        ("messages", "fields", "arguments"),
        [
            (MESSAGES, {}, {}),
            (MESSAGES, {"add_generation_prompt": False}, {"add_generation_prompt": False}),
            (
                BEGUN,
                {"add_generation_prompt": False, "continue_final_message": True},
                {"add_generation_prompt": False, "continue_final_message": True},
            ),
            (
                MESSAGES,
                {"chat_template_kwargs": {"enable_thinking": False}},
                {"enable_thinking": False},
            ),
            (MESSAGES, {"reasoning_effort": "none"}, {"enable_thinking": False}),
            (MESSAGES, {"tools": [TOOL], "tool_choice": "none"}, {"tools": [TOOL]}),
            (
                MESSAGES,
                {"documents": [{"title": "a", "text": "b"}]},
                {"documents": [{"title": "a", "text": "b"}]},
            ),
        ],
        ids=lambda value: str(value)[:30],
    )
    @pytest.mark.parametrize("base", ["plain", "template"])
    def test_all_see_the_same_arguments(self, serve, seen, base, messages, fields, arguments):
        ids, own = chat(serve({"base": base, **PAPERS}), messages, **fields)
        plain = seen.plain("\n\n".join(message["content"] for message in messages))
        assert own["proxy_expert_prompt"] == seen("expert", messages, **arguments)
        assert ids == (plain if base == "plain" else seen("base", messages, **arguments))
        assert own.get("proxy_antiexpert_prompt") == (None if base == "plain" else plain)

    def test_defaults_of_the_server(self, serve, seen):
        online = serve(PAPERS, default_chat_template_kwargs={"enable_thinking": False})
        _, own = chat(online)
        assert own == {"proxy_expert_prompt": seen("expert", enable_thinking=False)}

    def test_plain_needs_no_text_to_continue(self, serve, seen):
        given = {"add_generation_prompt": False, "continue_final_message": True}
        begun = [*MESSAGES, {"role": "assistant", "content": ""}]
        ids, own = chat(serve(PAPERS), begun, **given)
        assert ids == seen.plain(PLAIN)
        assert own == {"proxy_expert_prompt": seen("expert", begun, **given)}

    def test_the_last_message_may_be_the_users(self, serve, seen):
        given = {"add_generation_prompt": False, "continue_final_message": True}
        assert chat(serve(PAPERS), **given)[1] == {"proxy_expert_prompt": seen("expert", **given)}

    def test_a_text_in_parts(self, serve, seen):
        parts = [{"type": "text", "text": "The capital?"}]
        messages = [MESSAGES[0], {"role": "user", "content": parts}]
        ids, own = chat(serve(PAPERS), messages)
        assert (ids, own) == (seen.plain(PLAIN), {"proxy_expert_prompt": seen("expert")})

    def test_give_way_to_a_prompt_in_the_request(self, serve):
        own = {"proxy_expert_prompt": [5, 6], "mine": 1}
        assert chat(serve(PAPERS), vllm_xargs=own)[1] == own

    def test_nothing_of_ours_where_all_see_plain_text(self, serve, seen):
        ids, own = chat(serve({"base": "plain"}))
        assert (ids, own) == (seen.plain(PLAIN), None)

    @pytest.mark.parametrize(
        ("fields", "says"),
        [
            ({"chat_template": "x"}, "`chat_template`: not supported if"),
            ({"add_special_tokens": False}, "`add_special_tokens`: not supported if"),
            ({"truncate_prompt_tokens": 5}, "`truncate_prompt_tokens`: not supported if"),
            ({"use_beam_search": True}, "`use_beam_search`: not supported if"),
            ({"continue_final_message": True}, "`continue_final_message` and `add_generation_pro"),
            ({"reasoning_effort": "high"}, "`messages`, with `enable_thinking`, `reasoning_eff"),
            ({"chat_template_kwargs": {"tokenize": True}}, "`chat_template_kwargs.tokenize`: not"),
            ({"chat_template_kwargs": {"messages": []}}, "`chat_template_kwargs.messages`: not"),
        ],
        ids=str,
    )
    def test_what_members_cannot_follow(self, serve, fields, says):
        online = serve(PAPERS, trust_request_chat_template=True)
        with pytest.raises(VLLMValidationError) as caught:
            chat(online, **fields)
        assert str(caught.value).startswith(says)

    def test_a_prompt_that_is_refused(self, serve):
        """Here, or a streaming answer would have begun with 200."""
        with pytest.raises(VLLMValidationError, match="`proxy_expert_prompt`: too long"):
            chat(serve(PAPERS, limit=5))

    def test_ids_of_another_server(self, serve):
        given = {"kv_transfer_params": {"prompt_token_ids": [5, 6]}}
        with pytest.raises(
            VLLMValidationError, match=r"`kv_transfer_params\.prompt_token_ids`: no"
        ):
            chat(serve(PAPERS), **given)

    def test_what_is_no_text(self, serve):
        content = [{"type": "image_url", "image_url": {"url": "http://localhost/x.png"}}]
        with pytest.raises(VLLMValidationError, match="`messages`: a content is not text"):
            chat(serve(PAPERS), [{"role": "user", "content": content}])

    def test_gpt_oss(self, serve):
        online = serve(PAPERS)
        online.use_harmony = True
        with pytest.raises(VLLMValidationError, match=r"`chat`: .*gpt-oss"):
            chat(online)


class TestOtherEndpoints:
    def test_a_batch(self, serve, seen):
        """As `/v1/chat/completions/batch` has its conversations rendered."""
        fields = {"continue_final_message": True, "add_generation_prompt": False}
        batch = BatchChatCompletionRequest.model_validate({"messages": [BEGUN], **fields})
        request = batch.to_chat_completion_request(batch.messages[0])
        asyncio.run(serve(PAPERS).render_chat(request))
        assert request.vllm_xargs == {"proxy_expert_prompt": seen("expert", BEGUN, **fields)}

    def test_messages(self, serve, seen):
        body = {
            "model": "q",
            "max_tokens": 5,
            "system": [{"type": "text", "text": "Be brief."}],
            "messages": [MESSAGES[1]],
            "chat_template_kwargs": {"enable_thinking": False},
            "tools": [{"name": "f", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "none"},
            "vllm_xargs": {"proxy_alpha": 2},
        }
        asked = AnthropicMessagesRequest.model_validate(body)
        request = AnthropicServingMessages.to_chat_completion_request(asked)
        _, (prompt,) = asyncio.run(serve(PAPERS).render_chat(request))
        assert prompt["prompt_token_ids"] == seen.plain(PLAIN)
        assert request.vllm_xargs == {
            "proxy_expert_prompt": seen("expert", tools=[TOOL], enable_thinking=False),
            "proxy_alpha": 2,
        }

    @pytest.mark.parametrize("base", ["plain", "template"])
    def test_responses(self, serve, seen, base):
        online = serve({"base": base, **PAPERS})
        ids, own = respond(online, instructions="Be brief.", input="The capital?")
        assert own["proxy_expert_prompt"] == seen("expert")
        assert ids == (seen.plain(PLAIN) if base == "plain" else seen("base"))  # one BOS

    def test_responses_that_continue(self, serve, seen):
        begun = {
            "type": "message",
            "role": "assistant",
            "id": "m",
            "status": "incomplete",
            "content": [{"type": "output_text", "text": "It is", "annotations": []}],
        }
        ids, own = respond(serve(PAPERS), input=[*MESSAGES, begun])
        assert ids == seen.plain(f"{PLAIN}\n\nIt is")
        assert own["proxy_expert_prompt"] == seen(
            "expert", BEGUN, add_generation_prompt=False, continue_final_message=True
        )

    @pytest.mark.parametrize(
        ("fields", "says"),
        [
            ({"truncation": "auto"}, "`truncation`: not supported if"),
            ({"tools": [{"type": "web_search_preview"}]}, "`tools` has 'web_search_preview'"),
        ],
    )
    def test_of_responses_what_members_cannot_follow(self, serve, fields, says):
        with pytest.raises(VLLMValidationError, match=says):
            respond(serve(PAPERS), input="x", **fields)

    def test_tokenize(self, serve, seen):
        """What the base sees."""
        online, request = serve(PAPERS), TokenizeChatRequest.model_validate({"messages": MESSAGES})
        _, (prompt,) = asyncio.run(
            online.preprocess_chat(request, request.messages, online.chat_template, "auto", None)
        )
        assert prompt["prompt_token_ids"] == seen.plain(PLAIN)
