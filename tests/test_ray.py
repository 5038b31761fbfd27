"""Tensor parallelism on a real Ray cluster: one head on this machine, two workers."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import RIGS, run_engines
from test_batch import Command, records, write_rows

RAY_ENV = {
    "PYTHONPATH": str(RIGS / "ray_on_cpu"),
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
PROMPTS = [[5, 6, 7], list(range(10, 90)), list(range(300, 337))]
GREEDY = {"temperature": 0, "max_tokens": 16, "ignore_eos": True}


@pytest.fixture(scope="module")
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


ENGINE = {
    "dtype": "float32",
    "max_model_len": 256,
    "enforce_eager": True,
    "tensor_parallel_size": 2,
    "distributed_executor_backend": "ray",
}


def test_a_job_survives_the_death_of_a_worker(cluster, members, reference, tmp_path):
    """kill -9 of one of two: the engine is started again, and no row is lost."""
    rows = [{"prompt_token_ids": [3 + i % 300, 4, 5]} for i in range(900)]
    source = write_rows(tmp_path / "rows.jsonl", *rows)
    out = tmp_path / "out.jsonl"
    command = Command(tmp_path, members, "--input", source, "--output", str(out), engine=ENGINE)
    command.env |= {**RAY_ENV, "RAY_ADDRESS": cluster, "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    process = command.start()
    while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < 20):
        time.sleep(0.05)
    workers = [p for p in psutil.process_iter(["cmdline"]) if is_worker(p)]
    assert len(workers) == 2, process.communicate()[1]
    workers[1].kill()
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (0, ""), stderr
    assert "the engine died: " in stderr
    assert "starting another one" in stderr
    got = {record["index"]: record["token_ids"] for record in records(out)}
    assert sorted(got) == list(range(len(rows)))
    for index in range(0, len(rows), 90):
        answer = reference.greedy(rows[index]["prompt_token_ids"], 12).token_ids
        assert got[index] == answer
    assert not command.survivors()


@pytest.mark.parametrize(
    ("ranks", "address", "says"),
    [
        (4, None, "is 4 x 1: the Ray cluster at {} has 2 HPUs for 4 workers; set smaller"),
        (2, "127.0.0.1:1", "RAY_ADDRESS '127.0.0.1:1': no cluster answers there (Connection re"),
    ],
    ids=["too few devices", "no cluster"],
)
def test_a_cluster_that_is_not_there_is_one_line(cluster, members, tmp_path, ranks, address, says):
    """Before weights are read; vLLM would wait for it."""
    source = write_rows(tmp_path / "rows.jsonl", {"prompt": "a"})
    engine = {**ENGINE, "tensor_parallel_size": ranks}
    words = ("--input", source, "--output", str(tmp_path / "out.jsonl"))
    command = Command(tmp_path, members, *words, engine=engine)
    command.env |= {**RAY_ENV, "RAY_ADDRESS": address or cluster}
    process = command.start()
    stdout, stderr = process.communicate(timeout=100)
    assert (process.returncode, stdout) == (2, "")
    (line,) = [line for line in stderr.splitlines() if "Triton" not in line]
    assert says.format(cluster) in line


def is_worker(process: psutil.Process) -> bool:
    """Whether this is a worker of vLLM's: an actor that Ray names after its class."""
    (title, *_) = process.info["cmdline"] or [""]
    return title.startswith("ray::") and "Worker" in title and "IDLE" not in title


def test_two_ray_workers_are_the_formula(cluster, members, reference, tmp_path):
    engine = {**ENGINE, "skip_tokenizer_init": True}
    question = {"name": "greedy", "prompts": PROMPTS, "params": GREEDY}
    plan = [{"name": "ray", "config": {**members, "engine": engine}, "questions": [question]}]
    env = {**RAY_ENV, "RAY_ADDRESS": cluster}
    result = run_engines(plan, tmp_path / "engines", "v1", env=env)["ray"]
    assert "error" not in result, result["error"]
    assert result["executor"] == "RayExecutorV2"
    assert [answer["token_ids"][0] for answer in result["answers"]["greedy"]] == [
        reference.greedy(prompt, 16).token_ids for prompt in PROMPTS
    ]
