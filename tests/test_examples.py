"""Every file in `examples/` runs as a user runs it, and prints what transformers says."""

import ast
import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from support import forks
from support.engines import ENGINE_ENV
from support.reference import Reference

EXAMPLES = Path(__file__).parents[1] / "examples"
QUESTION = "Question: What is the capital of Spain?\nAnswer:"
FRANCE = "The capital of France is"
STORY = "Once upon a time, there was a"
TOKENS = 8
EOS = 1
SAFE_MARGIN = 1e-3
"""A smaller margin may be lost to float32 rounding, and the example would print another token."""


@pytest.fixture(scope="module")
def config(members, tmp_path_factory) -> str:
    """A configuration of the tiny members."""
    path = tmp_path_factory.mktemp("examples") / "config.yaml"
    engine = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 4, "enforce_eager": True}
    sampling = {"temperature": 0.0, "max_tokens": TOKENS}
    path.write_text(yaml.safe_dump({**members, "engine": engine, "sampling": sampling}))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer(members):
    return AutoTokenizer.from_pretrained(members["base"])


def printed(name: str, config: str, **environment: str) -> dict[str, str]:
    """Run an example; return the texts that it prints, by label."""
    env = {**os.environ, **ENGINE_ENV, **environment}
    process = forks.run([str(EXAMPLES / name), config], env)
    assert process.returncode == 0, process.stderr[-3000:]
    # vLLM's log goes to standard output too.
    lines = re.findall(r"^([a-z][\w ,.]*): ('.*'|\".*\")$", process.stdout, re.MULTILINE)
    return {label: ast.literal_eval(text) for label, text in lines}


def text_of(tokenizer, ids: list[int]) -> str:
    """Return an answer's text: up to the end-of-sequence token."""
    return tokenizer.decode(ids[: ids.index(EOS)] if EOS in ids else ids)


def answer(
    reference: Reference, tokenizer, prompt: str, control: dict, tokens: int = TOKENS
) -> str:
    """Return the greedy answer of the transformers loop, whose tokens are all clear choices."""
    decoded = reference.greedy(tokenizer.encode(prompt), tokens, control)
    assert decoded.margin > SAFE_MARGIN
    return text_of(tokenizer, decoded.token_ids)


def require_same(found: dict[str, str], wanted: dict[str, str]) -> None:
    """Compare texts, but for a character whose last bytes were not generated any more."""
    assert {k: v.rstrip("\ufffd") for k, v in found.items()} == {
        k: v.rstrip("\ufffd") for k, v in wanted.items()
    }
    assert len(set(wanted.values())) > 1  # or any strength would do


@pytest.mark.engine
def test_offline(config, reference, tokenizer):
    wanted = {
        f"alpha {alpha}": answer(reference, tokenizer, QUESTION, {"proxy_alpha": alpha})
        for alpha in (0.0, 0.5, 1.0)
    }
    require_same(printed("offline.py", config), wanted)


@pytest.mark.engine
def test_http_client(config, reference, tokenizer):
    controls = {
        "proxy, alpha 0.5": {"proxy_alpha": 0.5},
        "proxy, alpha 1.0": {"proxy_alpha": 1.0},
        "base": {"proxy_weights": [1, 0, 0]},
        "expert": {"proxy_weights": [0, 1, 0]},
        "antiexpert": {"proxy_weights": [0, 0, 1]},
    }
    wanted = {k: answer(reference, tokenizer, QUESTION, v, 16) for k, v in controls.items()}
    found = printed("http_client.py", config, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    require_same(found, wanted)


@pytest.mark.engine
def test_guidance_is_that_of_transformers(config, members, tokenizer):
    """`guidance_scale` and `negative_prompt_ids` of transformers' own `generate`."""
    model = AutoModelForCausalLM.from_pretrained(members["base"], dtype=torch.float32)
    texts = "This is a story about a dragon.\n" + STORY, STORY
    prompt, negative = (torch.tensor([tokenizer.encode(text)]) for text in texts)
    wanted = {}
    for scale in (1.0, 1.5, 3.0):
        output = model.generate(
            prompt,
            do_sample=False,
            max_new_tokens=TOKENS,
            guidance_scale=scale,
            negative_prompt_ids=negative,
        )
        ids = output[0, prompt.shape[1] :].tolist()
        wanted[f"guidance scale {scale}"] = text_of(tokenizer, ids)
    require_same(printed("cfg.py", config), wanted)


@pytest.mark.engine
def test_context_aware_decoding(config, members, tokenizer):
    reference = Reference(members["base"])
    without = {"proxy_antiexpert_prompt": tokenizer.encode(FRANCE)}
    prompt = "In this story the capital of France is Lyon.\n" + FRANCE
    wanted = {
        f"alpha {alpha}": answer(reference, tokenizer, prompt, {**without, "proxy_alpha": alpha})
        for alpha in (0.0, 0.5, 1.0)
    }
    require_same(printed("context_aware_decoding.py", config), wanted)


@pytest.mark.engine
def test_ray_data(config, reference, tokenizer):
    wanted = {
        f"alpha {alpha}": answer(reference, tokenizer, QUESTION, {"proxy_alpha": alpha})
        for alpha in (0.0, 0.5, 1.0)
    }
    environment = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }
    require_same(printed("ray_data.py", config, **environment), wanted)


def test_every_example_is_run():
    tests = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.name}"' in tests, path
