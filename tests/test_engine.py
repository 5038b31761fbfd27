"""`ProxyLLM` is a `vllm.LLM`: its methods, defaults and refusals, on a real engine."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import run_engines
from reference import Reference
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams
from vllm.sampling_params import BeamSearchParams

from vllm_proxy import ProxyConfig, ProxyLLM
from vllm_proxy.errors import ProxyConfigError

PROMPT = "The large model is"
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
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

    @pytest.mark.parametrize("proxy", [None, {}, {"expert": "x"}, {"alpha": 1}])
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
        results = run_engines(engines, tmp_path / "engines")
        assert (
            "antiexpert: its checkpoint lacks 1 tensors of the model: "
            "model.layers.1.self_attn.o_proj.weight; use"
        ) in results["missing"]["error"]
        assert re.search(r"antiexpert: .*no_such_layer", results["extra"]["error"])


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_from_config_and_keywords_agree(proxy_llm, members, tmp_path):
    values = proxy_llm.proxy_config.model_dump(exclude_none=True)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    assert ProxyConfig.from_yaml(path) == proxy_llm.proxy_config
