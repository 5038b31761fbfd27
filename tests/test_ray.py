"""Tensor parallelism on a real Ray cluster: one head on this machine, two workers."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import RIGS, run_engines

RAY_ENV = {
    "PYTHONPATH": str(RIGS / "ray_on_cpu"),
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
PROMPTS = [[5, 6, 7], list(range(10, 90)), list(range(300, 337))]
GREEDY = {"temperature": 0, "max_tokens": 16, "ignore_eos": True}


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a Ray head that offers two of what stands for GPUs here."""
    ray = str(Path(sys.executable).with_name("ray"))
    env = {**os.environ, **RAY_ENV}
    start = [ray, "start", "--head", "--node-ip-address", "127.0.0.1", "--port", "0"]
    options = ["--num-cpus", "4", "--include-dashboard", "false", "--resources", '{"HPU": 2}']
    output = subprocess.run(
        [*start, *options], env=env, check=True, capture_output=True, text=True
    ).stdout
    address = output.split("--address='")[1].split("'")[0]
    try:
        yield address
    finally:
        subprocess.run([ray, "stop", "--force"], env=env, check=False, capture_output=True)


def test_two_ray_workers_are_the_formula(cluster, members, reference, tmp_path):
    engine = {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "max_model_len": 256,
        "enforce_eager": True,
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "ray",
    }
    question = {"name": "greedy", "prompts": PROMPTS, "params": GREEDY}
    plan = [{"name": "ray", "config": {**members, "engine": engine}, "questions": [question]}]
    env = {**RAY_ENV, "RAY_ADDRESS": cluster}
    result = run_engines(plan, tmp_path / "engines", "v1", env=env)["ray"]
    assert "error" not in result, result["error"]
    assert result["executor"] == "RayExecutorV2"
    assert [answer["token_ids"][0] for answer in result["answers"]["greedy"]] == [
        reference.greedy(prompt, 16).token_ids for prompt in PROMPTS
    ]
