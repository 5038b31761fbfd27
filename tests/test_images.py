"""Members that see images: each with its own tower, token for token what the formula says.

The reference (`image_reference.py`) is a transformers loop in float32 over three whole models, one
prompt at a time and without a cache. The engines get the same prompts in one continuous batch with
prompts of text, in chunks that cut images, and with a KV cache that holds a few of them.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from vllm import EngineArgs

from support.engines import (
    RIGS,
    SAFE_MARGIN,
    TOKEN_ENGINE,
    answers_of,
    in_graphs,
    own_caches,
    result_of,
    run_engines,
)
from support.image_reference import ImageReference, Seen
from support.random_images import random_image
from support.tiny_images import IMAGE, WORDS, with_images, write_seeing_triple
from vllm_proxy.config.errors import one_line
from vllm_proxy.config.roles import ROLES
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.members.vllm_configs import member_vllm_config

ENGINE = {
    **TOKEN_ENGINE,
    "skip_tokenizer_init": False,
    "max_model_len": 128,
    "limit_mm_per_prompt": {"image": 2},
    # a chunk is shorter than most prompts, and than two images
    "max_num_batched_tokens": 24,
    "max_num_seqs": 8,
    "num_gpu_blocks_override": 7,
}
WINDOWS = {"num_gpu_blocks_override": 10}
"""Blocks are also needed for the pair's windows."""
GRAPHS = in_graphs("FULL_AND_PIECEWISE", (1, 2, 4, 8, 24))
SEEING = ("qwen2_5_vl", "qwen3_vl", "qwen3_5", "mistral3", "llama4")
STATES = {"max_num_batched_tokens": 40, "num_gpu_blocks_override": 24}
"""Of engines with recurrent layers, each of which takes blocks too."""
TRIPLES = {
    **{name: (name, None) for name in SEEING},
    **{"blind": ("qwen2_5_vl", "llama"), "mistral3_blind": ("mistral3", "mistral")},
    "mixture": ("qwen3_vl_moe", "qwen3_vl"),
    "mixture-states": ("qwen3_5_moe", "qwen3_5"),
    "blind-states": ("qwen3_5", "qwen3_5_text"),
}
"""Families of the base, and of expert and antiexpert if theirs is another one."""
ENGINES = {
    "v1": {
        **{"qwen2_5_vl": {}, "qwen3_vl": {"enforce_eager": False}, "blind": {}, "mixture": {}},
        **{"mistral3": {}, "mistral3_blind": WINDOWS, "llama4": {}},
        **{"mixture-states": STATES, "blind-states": STATES},
    },
    "v2": {
        **{"qwen3_vl": GRAPHS, "blind": GRAPHS},
        **{"mistral3": GRAPHS, "llama4": {}},
        "qwen3_5": {**STATES, **in_graphs("FULL_DECODE_ONLY", (1, 2, 4, 8))},
    },
}
"""Engine arguments by runner and triple."""
SHARED_TOKENS = 2 * ENGINE["block_size"]
"""Those of `SHARED` that are cached; with states or windows, a block may hold them all."""
SHORTER = {"llama4": ENGINE["block_size"]}
"""The same where an image has fewer tokens."""
FLOAT32 = [RIGS / name for name in ("avx2_kernels", "delta_nets_on_cpu")]
RIGS_OF = {
    "v1": FLOAT32,
    "v2": [*FLOAT32, *(RIGS / name for name in ("model_runner_v2", "graphs_on_cpu"))],
}
"""What gated delta nets need to be compared, and what the runner needs."""
TOKENS = 10
GREEDY = {
    **{"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True},
    "allowed_token_ids": WORDS,
}
WEIGHTS = ((1.0, 1.0, -1.0), (1.0, 0.0, 0.0), (1.0, 0.5, -0.5), (0.0, 1.0, 0.0))
SIZES = ((16, 16), (24, 16), (40, 24), (32, 32), (8, 64))
"""Width and height of images, in pixels."""
TEXTS = (
    f"Look: {IMAGE} What is it?",
    f"{IMAGE}{IMAGE} Which of these is the capital of France?",
    "The large model is moved by what fine-tuning changed in the small one.",
    f"A record of {IMAGE} and, after much text about the large model, of {IMAGE}",
)
SHARED = (
    f"Question: What is the capital of {IMAGE}? Answer in one word, which is the right one. "
    "The large model is moved by what fine-tuning changed in the small one."
)
"""A prompt whose image lies in its first block of two."""


def _request(number: int) -> dict:
    """Return a request of the mixed batch: text, images as arguments of `random_image`, weights.

    Each row of `len(TEXTS)` requests has all texts and all weights.
    """
    text = TEXTS[number % len(TEXTS)]
    images = [
        (10 * number + i, *SIZES[(number + i) % len(SIZES)]) for i in range(text.count(IMAGE))
    ]
    weights = WEIGHTS[(number + number // len(TEXTS)) % len(WEIGHTS)]
    return {"text": text, "images": images, "weights": weights}


MIXED = [_request(number) for number in range(4 * len(TEXTS))]
ASKED = {"v1": len(MIXED), "v2": len(MIXED) // 2}
"""How many of `MIXED`: Triton's interpreter is slow."""
AGAIN = [{"text": SHARED, "images": [(seed, 32, 32)], "weights": WEIGHTS[0]} for seed in (1, 1, 2)]
"""The same image twice, and then another one of the same size."""


def _questions(family: str, asked: int) -> list[dict]:
    mixed = [
        {
            "prompt": {"text": with_images(one["text"], family), "images": one["images"]},
            "control": {"proxy_weights": list(one["weights"])},
            "params": GREEDY,
            "arrival": number // 2,
            "abort": None,
        }
        for number, one in enumerate(MIXED[:asked])
    ]
    again = [
        {
            "name": f"again-{number}",
            "prompts": [{"text": with_images(one["text"], family), "images": one["images"]}],
            "params": GREEDY,
        }
        for number, one in enumerate(AGAIN)
    ]
    return [{"name": "mixed", "requests": mixed}, *again]


@pytest.fixture(scope="module")
def triples(tmp_path_factory) -> dict[str, dict[str, str]]:
    """Paths of the members, by the name of the triple."""
    root = tmp_path_factory.mktemp("images")
    return {name: write_seeing_triple(root / name, *kinds) for name, kinds in TRIPLES.items()}


@pytest.fixture(scope="module")
def references(triples) -> dict[str, list[Seen]]:
    """What the formula says to `MIXED` and `AGAIN`, by the name of the triple."""
    torch.set_num_threads(1)  # small products, next to other tests
    return {name: list(_expected(paths, TRIPLES[name][0])) for name, paths in triples.items()}


def _expected(paths: dict[str, str], family: str) -> Iterator[Seen]:
    reference = ImageReference(**paths)
    for one in (*MIXED, *AGAIN):
        images = [random_image(*image) for image in one["images"]]
        text = with_images(one["text"], family)
        yield reference.greedy(text, images, TOKENS, one["weights"])


@pytest.fixture(scope="module", params=["v1", "v2"])
def engines(request, triples, tmp_path_factory) -> dict:
    """Engines' results under one runner."""
    plan = [
        {
            "name": name,
            "config": {**triples[name], "engine": {**ENGINE, **own}},
            "questions": _questions(TRIPLES[name][0], ASKED[request.param]),
        }
        for name, own in ENGINES[request.param].items()
    ]
    directory: Path = tmp_path_factory.mktemp(request.param)
    rigs = map(str, RIGS_OF[request.param])
    env = {**own_caches(directory), "PYTHONPATH": os.pathsep.join(rigs)}
    return {"runner": request.param, **run_engines(plan, directory, request.param, env)}


def test_images_in_a_mixed_batch(engines, references):
    for name in ENGINES[engines["runner"]]:
        answers = answers_of(engines, name)["mixed"]
        expected = references[name][: len(answers)]
        safe = [i for i, one in enumerate(expected) if one.margin > SAFE_MARGIN]
        assert len(safe) > ASKED[engines["runner"]] // 2
        for i in safe:
            assert answers[i]["token_ids"] == [expected[i].token_ids], (name, MIXED[i])
        assert result_of(engines, name)["metrics"]["vllm:num_preemptions"] > 0


def test_images_are_part_of_what_a_prefix_is(engines, references):
    for name in ENGINES[engines["runner"]]:
        answers = answers_of(engines, name)
        cached = []
        for number, expected in enumerate(references[name][len(MIXED) :]):
            (answer,) = answers[f"again-{number}"]
            assert expected.margin > SAFE_MARGIN
            assert answer["token_ids"] == [expected.token_ids], (name, number)
            cached.append(answer["cached"])
        assert cached == [0, SHORTER.get(name, SHARED_TOKENS), 0], name


def _refusal(triple: dict[str, str], section: dict, **engine: object) -> str:
    config = ProxyConfig(
        **triple,
        **section,
        engine={"limit_mm_per_prompt": {"image": 1}, "dtype": "float32", **engine},
    )
    with pytest.raises(ValueError, match=r".") as error:
        EngineArgs(**config.engine_args(), max_model_len=128).create_engine_config()
    return one_line(error.value)


def test_what_is_not_possible_with_images(triples, members):
    seeing, others = triples["qwen2_5_vl"], triples["qwen3_vl"]
    assert "`speculate`" in _refusal(seeing, {"speculate": {"tokens": 2}})
    assert "`pipeline_parallel_size` is 2: not possible with images" in _refusal(
        seeing, {}, pipeline_parallel_size=2
    )
    # a multimodal member of another family, and a base that has no tower
    mixed = _refusal({**seeing, "expert": others["expert"]}, {})
    assert f"expert '{others['expert']}'" in mixed
    assert "its model_type is 'qwen3_vl', and the base that sees images is 'qwen2_5_vl'" in mixed
    assert "`limit_mm_per_prompt`: the base's model_type is 'llama'" in _refusal(members, {})
    whole_images = _refusal(triples["qwen3_5"], {}, disable_chunked_mm_input=True)
    assert "`disable_chunked_mm_input` is True: the base has recurrent layers" in whole_images


def test_only_images_are_allowed(triples):
    config = ProxyConfig(**triples["qwen3_vl"], engine={"limit_mm_per_prompt": {"image": 3}})
    model = (
        EngineArgs(**config.engine_args(), max_model_len=128).create_engine_config().model_config
    )
    limits = model.get_multimodal_config().get_limit_per_prompt
    assert [limits(modality) for modality in ("image", "video", "audio")] == [3, 0, 0]
    # base 256, pair 128, and each as much again for two layers of DeepStack
    assert model.get_inputs_embeds_size() == (256 + 2 * 128) * 3
    config = ProxyConfig(**triples["qwen3_vl"], engine={"limit_mm_per_prompt": {"image": 0}})
    model = (
        EngineArgs(**config.engine_args(), max_model_len=128).create_engine_config().model_config
    )
    assert not model.is_multimodal_model


def test_members_that_see_have_three_rows_of_positions(triples):
    """Also Qwen3.5's, of whose text model vLLM takes them away."""
    config = ProxyConfig(**triples["blind-states"], engine={"limit_mm_per_prompt": {"image": 1}})
    engine = EngineArgs(**config.engine_args(), max_model_len=128).create_engine_config()
    seeing = {role: member_vllm_config(engine, role).model_config.uses_mrope for role in ROLES}
    assert seeing == {"base": True, "expert": False, "antiexpert": False}
