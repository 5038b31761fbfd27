"""`ProxyLLM` is a `vllm.LLM`: its methods, defaults and refusals, on a real engine."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams
from vllm.forward_context import set_forward_context
from vllm.sampling_params import BeamSearchParams
from vllm.tokenizers import get_tokenizer

from support.allocations import peak_bytes
from support.checks import planned_shapes
from support.engine_process import kv_cache
from support.engines import run_engines
from support.questions import IDS, MESSAGES, OWN, PROMPT, configure, decode, strength
from support.random_images import random_image
from support.reference import Reference
from support.tiny_models import with_template
from vllm_proxy import ProxyConfig, ProxyLLM
from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.schema import ChatFormats, Member
from vllm_proxy.config.strength import Schedule
from vllm_proxy.engine.registered import ProxyTunedForCausalLM
from vllm_proxy.members.prompts import member_renderers
from vllm_proxy.model.alignment import StepBatch

ENGINE = {"dtype": "float32", "max_model_len": 64, "enforce_eager": True}
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


def score(reference: Reference, prompt: list[int], tokens: list[int]) -> float:
    """Log probability of *tokens* after *prompt*."""
    logprobs = reference.logits(prompt + tokens, [None] * 3).log_softmax(-1)
    rows = logprobs[len(prompt) - 1 : -1]
    return rows.gather(1, torch.tensor(tokens)[:, None]).sum().item()


def test_it_is_a_vllm_llm(proxy_llm):
    assert isinstance(proxy_llm, LLM)


def test_generate(proxy_llm, reference):
    tokenizer = proxy_llm.get_tokenizer()
    (output,) = proxy_llm.generate([PROMPT], GREEDY, use_tqdm=False)
    truth = reference.greedy(tokenizer.encode(PROMPT), 10)
    assert list(output.outputs[0].token_ids) == truth.token_ids


def test_chat_uses_the_base_template(proxy_llm, reference):
    ids = proxy_llm.get_tokenizer().apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=False
    )
    (output,) = proxy_llm.chat(MESSAGES, GREEDY, use_tqdm=False)
    assert output.prompt_token_ids == ids
    assert list(output.outputs[0].token_ids) == reference.greedy(ids, 10).token_ids


def test_score_by_prompt_logprobs(proxy_llm, reference):
    ids = list(range(20, 60))
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    (output,) = proxy_llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
    rows = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
    ours = sum(row[token].logprob for token, row in rows)
    assert ours == pytest.approx(score(reference, ids[:1], ids[1:]), abs=1e-3)


def test_beam_search_scores_are_of_the_fused_distribution(proxy_llm, reference):
    ids = proxy_llm.get_tokenizer().encode(PROMPT)
    params = BeamSearchParams(beam_width=3, max_tokens=5, ignore_eos=True)
    (output,) = proxy_llm.beam_search([{"prompt_token_ids": ids}], params)
    scores = [beam.cum_logprob for beam in output.sequences]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    for beam in output.sequences:
        generated = list(beam.tokens[len(ids) :])
        assert beam.cum_logprob == pytest.approx(score(reference, ids, generated), abs=1e-3)
    greedy = reference.greedy(ids, 5).token_ids
    assert scores[0] >= score(reference, ids, greedy) - 1e-3


def test_sampling_of_the_config_is_the_default(proxy_llm):
    params = proxy_llm.get_default_sampling_params()
    assert (params.temperature, params.max_tokens) == (0.0, 7)
    (output,) = proxy_llm.generate([{"prompt_token_ids": [5, 6]}], use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 7


def tokens_of(outputs) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


class TestOwnStrength:
    """Requests of one call, each with its own; token-identical to plain loops."""

    def generate(self, llm, prompts=IDS, params=GREEDY, **own):
        return tokens_of(llm.generate(prompts, params, use_tqdm=False, **own))

    def test_a_list(self, proxy_llm, reference):
        schedule = {"alpha": 2.0, "schedule": "first", "steps": 3}
        got = self.generate(proxy_llm, alpha=[0.0, 2, None, schedule])
        weights = [
            strength(0.0),
            strength(2.0),
            strength(1.0),
            lambda t: strength(2.0 if t < 3 else 0.0)(t),
        ]
        assert got == [decode(reference, *pair) for pair in zip(IDS, weights, strict=True)]
        assert len({tuple(self.generate(proxy_llm, IDS[0], alpha=a)[0]) for a in (0, 1, 2)}) == 3

    def test_one_for_all(self, proxy_llm, reference):
        linear = Schedule(alpha=1.5, schedule="linear", steps=6)
        got = self.generate(proxy_llm, alpha=linear)
        weights = lambda t: strength(1.5 * max(0, 1 - t / 6))(t)  # noqa: E731
        assert got == [decode(reference, ids, weights) for ids in IDS]

    def test_adaptive_is_passed_on(self, proxy_llm):
        """What it computes is held to the reference in the tests of exactness."""
        got = self.generate(proxy_llm, alpha="adaptive")
        params = SamplingParams(
            temperature=0, max_tokens=10, ignore_eos=True, extra_args={"proxy_alpha": "adaptive"}
        )
        assert got == self.generate(proxy_llm, params=params)
        assert got != self.generate(proxy_llm)

    def test_weights(self, proxy_llm, reference):
        every = [[0, 1, 0], [1, 0, 0], None, (1, 0.5, -0.25)]
        got = self.generate(proxy_llm, weights=every)
        every[2] = (1.0, 1.0, -1.0)
        assert got == [
            decode(reference, ids, lambda t, w=w: w) for ids, w in zip(IDS, every, strict=True)
        ]
        assert self.generate(proxy_llm, weights=[0, 0, 1]) == [
            decode(reference, ids, lambda t: (0, 0, 1)) for ids in IDS
        ]

    def test_filters(self, proxy_llm, reference):
        """Nothing but the base's likeliest token is left: the base's own greedy answer."""
        got = self.generate(proxy_llm, filters=[{"plausibility": 1}, None, {"top_p": 1e-6}, {}])
        alone, together = lambda t: (1, 0, 0), strength(1.0)
        weights = [alone, together, alone, together]
        assert got == [decode(reference, *pair) for pair in zip(IDS, weights, strict=True)]

    def test_an_iterator_of_prompts(self, proxy_llm):
        got = self.generate(proxy_llm, iter(IDS), alpha=[2, 0, 1, None])
        assert got == self.generate(proxy_llm, IDS, alpha=[2, 0, 1, None])
        assert self.generate(proxy_llm, []) == []

    def test_a_list_of_sampling_params(self, proxy_llm, reference):
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (3, 5)]
        got = self.generate(proxy_llm, IDS[:2], params, alpha=[2, 0])
        assert got[0] == decode(reference, IDS[0], strength(2.0), 3)
        assert got[1] == decode(reference, IDS[1], strength(0.0), 5)

    def test_enqueue(self, proxy_llm, reference):
        proxy_llm.enqueue(IDS[:2], GREEDY, alpha=[2, 0], use_tqdm=False)
        got = tokens_of(proxy_llm.wait_for_completion(use_tqdm=False))
        assert got == [
            decode(reference, ids, strength(alpha))
            for ids, alpha in zip(IDS[:2], (2.0, 0.0), strict=True)
        ]

    def test_chat(self, proxy_llm, reference):
        for got in (
            proxy_llm.chat([MESSAGES] * 2, GREEDY, False, alpha=[2, None]),
            self.enqueued(proxy_llm, [MESSAGES] * 2, alpha=[2, None]),
        ):
            ids = got[0].prompt_token_ids
            assert tokens_of(got) == [
                decode(reference, ids, strength(2.0)),
                decode(reference, ids, strength(1.0)),
            ]

    def enqueued(self, llm, messages, **own):
        llm.enqueue_chat(messages, GREEDY, False, **own)
        return llm.wait_for_completion(use_tqdm=False)

    def test_the_callers_parameters_stay_as_they_are(self, proxy_llm):
        params = SamplingParams(
            temperature=0, max_tokens=2, extra_args={"proxy_expert_prompt": "a", "other": [1]}
        )
        before = copy.deepcopy(params)
        self.generate(proxy_llm, params=params, alpha=[1, 2, 3, None])
        assert params == before

    def test_parameters_without_our_values_are_passed_on_themselves(self, proxy_llm):
        requests = proxy_llm.render(IDS, GREEDY, dict.fromkeys(("alpha", "weights", "filters")))
        assert [ids for ids, _ in requests] == IDS
        assert all(params is GREEDY for _, params in requests)


class TestOwnPrompts:
    """Members that read something else than the base."""

    def test_text_and_ids(self, proxy_llm, reference):
        tokenizer = proxy_llm.get_tokenizer()
        text, other = "Question: What is the capital?", "The small one."
        prompts = [
            {"prompt": PROMPT, "expert_prompt": text},
            {"prompt_token_ids": IDS[1], "expert_prompt": OWN[0], "antiexpert_prompt": OWN[1]},
            {"prompt": PROMPT, "antiexpert_prompt": other},
            PROMPT,
        ]
        outputs = proxy_llm.generate(prompts, GREEDY, use_tqdm=False, alpha=[1, 2, 1, 1])
        base = tokenizer.encode(PROMPT)
        assert [output.prompt_token_ids for output in outputs] == [base, IDS[1], base, base]
        assert tokens_of(outputs) == [
            decode(reference, [base, tokenizer.encode(text), base]),
            decode(reference, [IDS[1], *OWN], strength(2.0)),
            decode(reference, [base, base, tokenizer.encode(other)]),
            decode(reference, base),
        ]

    def test_text_in_extra_args(self, proxy_llm, reference):
        params = copy.copy(GREEDY)
        params.extra_args = {"proxy_expert_prompt": "The small"}
        tokenizer = proxy_llm.get_tokenizer()
        base = tokenizer.encode(PROMPT)
        got = tokens_of(proxy_llm.generate(PROMPT, params, use_tqdm=False))
        assert got == [decode(reference, [base, tokenizer.encode("The small"), base])]

    def test_text_is_encoded_as_vllm_encodes_the_bases(self, proxy_llm, members, monkeypatch):
        """Special tokens and all: a member with the base's text reads what the base reads."""
        tokenizer = copy.deepcopy(get_tokenizer(members["base"]))
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
        monkeypatch.setattr(proxy_llm.renderer, "tokenizer", tokenizer)
        prompts = [PROMPT, {"prompt": PROMPT, "expert_prompt": PROMPT, "antiexpert_prompt": PROMPT}]
        outputs = proxy_llm.generate(prompts, GREEDY, use_tqdm=False)
        assert outputs[0].prompt_token_ids[0] == 0
        assert len(set(map(tuple, tokens_of(outputs)))) == 1

    def test_beam_search_refuses_them(self, proxy_llm):
        params = BeamSearchParams(beam_width=2, max_tokens=2)
        prompt = {"prompt": PROMPT, "expert_prompt": PROMPT}
        with pytest.raises(ProxyConfigError, match=r"`expert_prompt`: .* beam search; remove it"):
            proxy_llm.beam_search([prompt], params)


def test_beam_search_refuses_a_strength_that_changes(proxy_llm, monkeypatch):
    configure(proxy_llm, monkeypatch, alpha=Schedule(schedule="first", steps=2))
    with pytest.raises(ProxyConfigError, match=r"`alpha` is .*'first'.*beam search"):
        proxy_llm.beam_search([PROMPT], BeamSearchParams(beam_width=2, max_tokens=2))


class TestChatFormats:
    """The engine of `proxy_llm`, whose configuration is given formats."""

    CONTENT = "What is the capital of France?"

    @pytest.fixture
    def formats(self, proxy_llm, monkeypatch):
        def use(of=None, **formats):
            chat = ChatFormats(**formats)
            config = configure(proxy_llm, monkeypatch, chat=chat, **(of or {}))
            renderers = member_renderers(config, proxy_llm.renderer)
            monkeypatch.setattr(proxy_llm, "_renderers", renderers, raising=False)

        return use

    @pytest.fixture
    def seen(self, proxy_llm):
        tokenizer = proxy_llm.get_tokenizer()
        template = tokenizer.apply_chat_template(
            MESSAGES, add_generation_prompt=True, return_dict=False
        )
        return {"template": template, "plain": tokenizer.encode(self.CONTENT)}

    @pytest.mark.parametrize(
        "chat",
        [
            {"expert": "template"},
            {"base": "template"},
            {"base": "template", "antiexpert": "template"},
            {"base": "template", "expert": "template", "antiexpert": "template"},
            {"base": "plain"},
        ],
        ids=str,
    )
    def test_members_see_their_own(self, proxy_llm, reference, formats, seen, chat):
        formats(**chat)
        prompts = [seen[chat.get(role, "plain")] for role in ("base", "expert", "antiexpert")]
        (output,) = proxy_llm.chat(MESSAGES, GREEDY, False)
        assert output.prompt_token_ids == prompts[0]
        assert tokens_of([output]) == [decode(reference, prompts)]

    def test_with_a_strength(self, proxy_llm, reference, formats, seen):
        formats(expert="template")
        prompts = [seen["plain"], seen["template"], seen["plain"]]
        outputs = proxy_llm.chat([MESSAGES] * 2, GREEDY, False, alpha=[2, 0.5])
        assert tokens_of(outputs) == [decode(reference, prompts, strength(a)) for a in (2.0, 0.5)]

    def test_a_requests_own_prompt_goes_before(self, proxy_llm, reference, formats, seen):
        formats(expert="template")
        params = copy.copy(GREEDY)
        params.extra_args = {"proxy_expert_prompt": OWN[0]}
        got = tokens_of(proxy_llm.chat(MESSAGES, params, False))
        assert got == [decode(reference, [seen["plain"], OWN[0], seen["plain"]])]

    @pytest.mark.parametrize("base", ["plain", "template"])
    @pytest.mark.parametrize(
        "given",
        [
            {"add_generation_prompt": False},
            {"add_generation_prompt": False, "continue_final_message": True},
            {"chat_template_kwargs": {"enable_thinking": False}},
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        ],
        ids=str,
    )
    def test_arguments_of_templates(
        self, proxy_llm, reference, members, formats, seen, tmp_path, base, given
    ):
        """Each member that sees its template sees what transformers makes of them."""
        expert = with_template(members["expert"], tmp_path / "expert")
        formats(base=base, expert="template", of={"expert": Member(model=expert)})
        arguments = {"add_generation_prompt": True, "return_dict": False, **given}
        arguments |= arguments.pop("chat_template_kwargs", {})
        templates = {
            role: AutoTokenizer.from_pretrained(path).apply_chat_template(MESSAGES, **arguments)
            for role, path in (("base", members["base"]), ("expert", expert))
        }
        prompts = [templates["base"], templates["expert"], seen["plain"]]
        if base == "plain":
            prompts[0] = seen["plain"]
        (output,) = proxy_llm.chat(MESSAGES, GREEDY, False, **given)
        assert output.prompt_token_ids == prompts[0]
        assert tokens_of([output]) == [decode(reference, prompts)]

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ({"chat_template_kwargs": 3}, "`chat_template_kwargs` is 3: give a mapping"),
            ({"chat_template_kwargs": {"tokenize": True}}, "`chat_template_kwargs.tokenize`: not"),
            ({"continue_final_message": True}, "`continue_final_message` and `add_generation_pro"),
            (
                {"chat_template_kwargs": {"reasoning_effort": "high"}},
                "`messages`, with `reasoning_effort`: they cannot be rendered for the expert: no",
            ),
        ],
        ids=str,
    )
    def test_arguments_that_are_wrong(self, proxy_llm, members, formats, tmp_path, given, says):
        expert = with_template(members["expert"], tmp_path / "expert")
        formats(expert="template", of={"expert": Member(model=expert)})
        with pytest.raises(ProxyConfigError) as caught:
            proxy_llm.chat(MESSAGES, GREEDY, False, **given)
        assert str(caught.value).startswith(says)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("name", ["chat_template", "tokenization_kwargs"])
    def test_what_the_base_alone_would_see_is_refused(self, proxy_llm, formats, name):
        formats(expert="template")
        with pytest.raises(ProxyConfigError, match=f"`{name}`: .*`chat` in the configuration"):
            proxy_llm.chat(MESSAGES, GREEDY, False, **{name: {"a": 1}})

    def test_a_missing_template_is_found_before_weights_are_read(self, members, tmp_path):
        expert = Path(shutil.copytree(members["expert"], tmp_path / "expert"))
        (expert / "chat_template.jinja").unlink()
        (expert / "model.safetensors").write_bytes(b"")
        with pytest.raises(ProxyConfigError, match=r"`chat\.expert` is 'template'|header"):
            ProxyLLM(**{**members, "expert": str(expert)}, chat={"expert": "template"})


class TestWrongRequests:
    """One line each, and an engine that answers the next one."""

    @pytest.fixture(autouse=True)
    def _alive(self, proxy_llm, reference):
        yield
        params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        got = tokens_of(proxy_llm.generate(IDS[0], params, use_tqdm=False))
        assert got == [decode(reference, IDS[0], tokens=2)]

    @pytest.mark.parametrize(
        ("own", "says"),
        [
            ({"alpha": [1, 2]}, "`alpha` has 2 entries for 3 prompts; give one for each, or one"),
            ({"alpha": []}, "`alpha` has 0 entries"),
            ({"weights": [[1, 0, 0]] * 2}, "`weights` has 2 entries for 3 prompts"),
            ({"filters": [{}]}, "`filters` has 1 entries"),
            ({"alpha": float("nan")}, "prompt 0: `alpha` is nan: give a finite number"),
            ({"alpha": [1, "x", 1]}, "prompt 1: `alpha` is 'x': give a finite number"),
            ({"alpha": [1, 1, {"schedule": "first"}]}, "prompt 2: `alpha.steps` is missing"),
            ({"weights": [1, 0]}, "`weights` is [1, 0]: give three finite numbers"),
            ({"weights": [1, 0, 0], "alpha": [None, 1, None]}, "prompt 1: `weights` replace"),
            ({"filters": {"topp": 1}}, "unknown key `filters.topp`; did you mean `top_p`?"),
        ],
        ids=str,
    )
    def test_arguments(self, proxy_llm, own, says):
        with pytest.raises(ProxyConfigError) as caught:
            proxy_llm.generate(IDS[:3], GREEDY, use_tqdm=False, **own)
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("prompt", "field", "says"),
        [
            ({"expert_promt": "a"}, "expert_promt", "did you mean `expert_prompt`?"),
            ({"alpha": 1}, "alpha", "give `alpha` as an argument"),
            ({"expert_prompt": ""}, "expert_prompt", "is ''"),
            ({"expert_prompt": [-1]}, "expert_prompt", "is [-1]"),
            ({"expert_prompt": [512]}, "proxy_expert_prompt", "512"),
            ({"antiexpert_prompt": [5] * 300}, "proxy_antiexpert_prompt", "300 tokens"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_prompts(self, proxy_llm, prompt, field, says):
        with pytest.raises(ProxyConfigError, match=re.escape(says)) as caught:
            proxy_llm.generate([PROMPT, {"prompt": PROMPT, **prompt}], GREEDY, use_tqdm=False)
        assert caught.value.field == field
        assert caught.value.remedy is not None
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("own", "extra_args", "field", "says"),
        [
            ({"alpha": 1}, {"proxy_alpha": 1}, "alpha", "`proxy_alpha`"),
            ({"alpha": 1}, {"proxy_alpha_schedule": "first"}, "alpha", "`proxy_alpha_schedule`"),
            ({"filters": {"top_p": 1}}, {"proxy_top_p": 1}, "filters", "`proxy_top_p`"),
            ({"weights": [1, 0, 0]}, {"proxy_alpha": 1}, "proxy_alpha", "`proxy_weights`"),
            ({}, {"proxy_alpah": 1}, "proxy_alpah", "did you mean `proxy_alpha`?"),
            ({}, {"proxy_expert_prompt": ""}, "proxy_expert_prompt", "is ''"),
        ],
        ids=str,
    )
    def test_extra_args(self, proxy_llm, own, extra_args, field, says):
        params = SamplingParams(max_tokens=2, extra_args=extra_args)
        with pytest.raises(ProxyConfigError, match=re.escape(says)) as caught:
            proxy_llm.generate(IDS[:2], params, use_tqdm=False, **own)
        assert caught.value.field == field
        assert caught.value.remedy is not None

    def test_both_prompts(self, proxy_llm):
        params = SamplingParams(max_tokens=2, extra_args={"proxy_expert_prompt": [5]})
        prompt = {"prompt": PROMPT, "expert_prompt": [6]}
        with pytest.raises(
            ProxyConfigError, match="`expert_prompt`: `extra_args` has `proxy_expert_p"
        ):
            proxy_llm.generate(prompt, params, use_tqdm=False)

    def test_tokenization_of_the_base_alone(self, proxy_llm):
        prompt = {"prompt": PROMPT, "expert_prompt": "a"}
        with pytest.raises(
            ProxyConfigError, match=r"`tokenization_kwargs`: .* the base's prompt only"
        ):
            proxy_llm.generate(
                prompt, GREEDY, use_tqdm=False, tokenization_kwargs={"add_special_tokens": False}
            )

    def test_our_keys_in_the_configs_sampling(self, members):
        sampling = {"extra_args": {"proxy_alpha": 1}}
        with pytest.raises(
            ProxyConfigError, match=r"`sampling\.extra_args\.proxy_alpha`: .*`alpha`"
        ):
            ProxyLLM(**members, sampling=sampling)


class TestRefusals:
    """Mistakes are found before weights are read, and name field, value and remedy."""

    def test_unknown_keyword(self, members):
        with pytest.raises(ProxyConfigError, match=r"unknown key `engine\.tensor_paralel_size`"):
            ProxyLLM(**members, tensor_paralel_size=2)

    def test_missing_member(self, members):
        with pytest.raises(ProxyConfigError, match="expert `/no/such/model`: no such directory"):
            ProxyLLM(**{**members, "expert": "/no/such/model"})

    def test_short_context(self, members, tmp_path):
        short = Path(shutil.copytree(members["expert"], tmp_path / "short"))
        edit_config(short, max_position_embeddings=64)
        with pytest.raises(ProxyConfigError, match=r"expert 64; set `engine\.max_model_len: 64`"):
            ProxyLLM(**{**members, "expert": str(short)}, max_model_len=128)

    def test_missing_config_file(self):
        with pytest.raises(ProxyConfigError, match=r"no/such\.yaml"):
            ProxyLLM.from_config("no/such.yaml")


class TestStockCommand:
    """Users of `vllm serve` and `vllm.LLM`, who pass by none of our own checks."""

    def start(self, members: dict[str, str], **engine) -> LLM:
        values = {**members, "engine": {**ENGINE, **engine}}
        config = ProxyConfig.parse(values, "test")
        return LLM(**config.engine_args())

    def test_expert_context_is_checked(self, members, tmp_path):
        short = Path(shutil.copytree(members["expert"], tmp_path / "short"))
        edit_config(short, max_position_embeddings=32)
        with pytest.raises(ValueError, match=r"expert '.*short'.*max_model_len"):
            self.start({**members, "expert": str(short)})

    def test_prompt_embeddings_are_refused(self, members):
        with pytest.raises(ValueError, match="enable_prompt_embeds"):
            self.start(members, enable_prompt_embeds=True)

    @pytest.mark.parametrize("proxy", [None, {}, {"expert": 5}, {"alpha": 1}])
    def test_broken_proxy_section(self, members, proxy):
        overrides = {"architectures": ["ProxyTunedForCausalLM"]}
        if proxy is not None:
            overrides["proxy"] = proxy
        with pytest.raises(ValueError, match=r"hf_overrides.*(`proxy`|`expert`|`antiexpert`)"):
            LLM(members["base"], hf_overrides=overrides)

    def test_wrong_tensors_end_the_start(self, members, tmp_path):
        """What a look at the headers would find, found while loading."""
        engines = []
        for change in ("missing", "extra"):
            broken = Path(shutil.copytree(members["antiexpert"], tmp_path / change))
            file = broken / "model.safetensors"
            tensors = load_file(file)
            if change == "missing":
                del tensors["model.layers.1.self_attn.o_proj.weight"]
            else:
                tensors["model.no_such_layer.weight"] = torch.zeros(1)
            save_file(tensors, file, metadata={"format": "pt"})
            config = ProxyConfig.parse(
                {**members, "antiexpert": str(broken), "engine": ENGINE}, "test"
            )
            stock = {"plain": config.engine_args()}
            engines.append({"name": change, "config": stock, "questions": []})
        env = {"VLLM_CPU_KVCACHE_SPACE": "1"}
        results = run_engines(engines, tmp_path / "engines", env=env)
        assert (
            f"antiexpert {str(tmp_path / 'missing')!r}: its checkpoint lacks 1 of the model's "
            "tensors: model.layers.1.self_attn.o_proj.weight; use"
        ) in results["missing"]["error"]
        assert re.search(r"antiexpert '.*no_such_layer", results["extra"]["error"])


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_from_config_and_keywords_agree(proxy_llm, members, tmp_path):
    values = proxy_llm.proxy_config.model_dump(exclude_none=True)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    assert ProxyConfig.from_yaml(path) == proxy_llm.proxy_config


def test_images_to_an_engine_of_text(proxy_llm):
    """Before an image is fetched or read."""
    image = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}
    message = {"role": "user", "content": [image]}
    prompt = {"prompt": "a", "multi_modal_data": {"image": random_image(1, 8, 8)}}
    for field, ask in {
        "messages": lambda: proxy_llm.chat([message]),
        "multi_modal_data": lambda: proxy_llm.generate(prompt),
    }.items():
        with pytest.raises(ProxyConfigError, match=f"^`{field}`: it has more than text, and this "):
            ask()


def test_plan_counts_the_kv_numbers_that_an_engine_has(proxy_llm):
    cache = proxy_llm.llm_engine.vllm_config.cache_config
    tokens = cache.num_gpu_blocks * cache.block_size
    shapes = planned_shapes(proxy_llm.proxy_config)
    numbers = sum(shape.kv_numbers() for shape in shapes.values())
    assert 4 * tokens * numbers == sum(kv_cache(proxy_llm).values())


def test_ordinary_requests_pay_nothing(proxy_llm, monkeypatch):
    """No code of ours runs for them that a plain batch would not need."""
    calls = []
    monkeypatch.setattr(ProxyTunedForCausalLM, "use_controls", lambda *_, **__: calls.append(1))
    monkeypatch.setattr(StepBatch, "members", lambda *_: calls.append(1))
    proxy_llm.generate(["one", "two"], use_tqdm=False)
    proxy_llm.generate("one", SamplingParams(prompt_logprobs=1, logprobs=1), use_tqdm=False)
    assert not calls


def test_a_draft_holds_less_than_a_pass_of_as_many_rows(proxy_llm):
    """vLLM's memory profile has a pass of all members, on as many rows as a batch may have."""
    runner = proxy_llm.llm_engine.model_executor.driver_worker.worker.model_runner
    rows, model = runner.scheduler_config.max_num_seqs, runner.get_model()
    ids = torch.zeros(rows, dtype=torch.int32)
    positions = torch.zeros(rows, dtype=torch.int64)
    with torch.inference_mode(), set_forward_context(None, runner.vllm_config):
        draft = peak_bytes(lambda: model.draft(ids, positions))
        every = peak_bytes(lambda: model(ids, positions))
    assert 0 < draft < every
    assert rows <= runner.scheduler_config.max_num_batched_tokens
