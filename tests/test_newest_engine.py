"""Engines of the newest supported vLLM are exact, before there is a CPU build of it.

Its Python files run with the installed build's kernels (`support/mixed_vllm.py`).
"""

import os

import pytest

from support.engines import RIGS, TOKEN_ENGINE, answers_of, own_caches, run_engines
from support.mixed_vllm import write_mixed_vllm
from support.newest_vllm import newest_tree
from vllm_proxy.config.roles import ROLES

PROMPTS = [[3, 4, 5, 6], [9, 8, 7], list(range(10, 80))]
ALPHAS = (1.0, 0.5, 1.0)
TOKENS = 8
GREEDY = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
ENGINE = {
    **TOKEN_ENGINE,
    "max_model_len": 128,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 128,
}
GRAPHS = {
    "enforce_eager": False,
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [4],
    },
}
VARIANTS = {"v1": {}, "v2": GRAPHS}
RIGS_OF_RUNNER = {"v1": ("avx2_kernels",), "v2": ("model_runner_v2", "graphs_on_cpu")}


@pytest.fixture(scope="session")
def newest(tmp_path_factory):
    """Its source tree, and what makes processes import it."""
    try:
        source = newest_tree()
    except RuntimeError as error:
        pytest.skip(str(error))
    return source, write_mixed_vllm(source, tmp_path_factory.mktemp("newest") / "vllm")


@pytest.fixture(scope="session", params=["v1", "v2"])
def engines(request, newest, members, tmp_path_factory):
    """The results of one engine, which drafts: eagerly, or in CUDA graphs as on GPUs."""
    runner, directory = request.param, tmp_path_factory.mktemp("engine")
    config = {role: members[role] for role in ROLES} | {"speculate": {"tokens": 2}}
    config["engine"] = {**ENGINE, **VARIANTS[runner]}
    question = {"name": "greedy", "prompts": PROMPTS, "params": GREEDY}
    question["extra_args"] = [{"proxy_alpha": alpha} for alpha in ALPHAS]
    rigs = [str(RIGS / rig) for rig in RIGS_OF_RUNNER[runner]]
    env = {**own_caches(directory), "PYTHONPATH": os.pathsep.join([*rigs, str(newest[1])])}
    plan = [{"name": "newest", "config": config, "questions": [question]}]
    return {"runner": runner, **run_engines(plan, directory, runner, env)}


def test_greedy_decoding_is_the_formula(engines, newest, reference):
    answers = answers_of(engines, "newest")["greedy"]
    right = [
        reference.greedy(ids, TOKENS, {"proxy_alpha": alpha}).token_ids
        for ids, alpha in zip(PROMPTS, ALPHAS, strict=True)
    ]
    assert [answer["token_ids"][0] for answer in answers] == right
    assert engines["newest"]["vllm"] == newest[0].version
    assert engines["newest"]["metrics"]["vllm:spec_decode_num_draft_tokens"] > 0
    if engines["runner"] == "v2":
        assert engines["newest"]["steps"]["FULL"] > 0
