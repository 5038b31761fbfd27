"""A real Ray cluster, of one head on this machine: tensor parallelism, and replicas."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from support import forks
from support.commands import KILLS, VLLM_PROXY, Command, require_complete, title
from support.engines import RIGS, TRACED, run_engines, with_tests_paths
from support.jobs import records, write_rows
from support.servers import serving
from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.jobs.open import open_job
from vllm_proxy.jobs.ray_cluster import Placement, connected
from vllm_proxy.jobs.ray_job import Replicas, _blocks

RAY_ENV = {
    "PYTHONPATH": with_tests_paths(str(RIGS / "ray_on_cpu")),
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "0",  # workers without the variables of a job
    "RAY_worker_niceness": "0",  # or workers wait for all other tests
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
    # In a directory of its own, where relative paths of a driver mean nothing.
    output = subprocess.run(
        [*start, *options], cwd="/", env=env, check=True, capture_output=True, text=True
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
    rows = [{"prompt_token_ids": [3 + i % 300, 4, 5]} for i in range(400)]
    source = write_rows(tmp_path / "rows.jsonl", *rows)
    out = tmp_path / "out.jsonl"
    engine = {**ENGINE, "max_num_seqs": 16}  # so that many rows are left when some are written
    command = Command(tmp_path, members, "--input", source, "--output", str(out), engine=engine)
    command.env |= {**RAY_ENV, "RAY_ADDRESS": cluster, "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    process = command.fork()
    while process.is_running() and (not out.exists() or out.read_bytes().count(b"\n") < 20):
        time.sleep(0.05)
    workers = [p for p in psutil.process_iter(["cmdline"]) if is_worker(p)]
    assert len(workers) == 2, process.end()
    workers[1].kill()
    status, stdout, stderr = process.end()
    assert (status, stdout) == (0, ""), stderr
    assert "an engine died: " in stderr
    assert "starting another one" in stderr
    got = {record["index"]: record["token_ids"] for record in records(out)}
    assert sorted(got) == list(range(len(rows)))
    for index in range(0, len(rows), 40):
        answer = reference.greedy(rows[index]["prompt_token_ids"], 12).token_ids
        assert got[index] == answer
    assert not command.survivors()


REPLICA = {**ENGINE, "tensor_parallel_size": 1, "max_num_seqs": 4}
del REPLICA["distributed_executor_backend"]


def replicated(
    directory: Path, members: dict, cluster: str, rows: list, *words: str, **engine
) -> tuple[Command, Path]:
    """A job on the cluster (if it is empty: the environment's), and where its output goes."""
    source, out = write_rows(directory / "rows.jsonl", *rows), directory / "out.jsonl"
    paths = ("--input", os.path.relpath(source), "--output", str(out), "--ordered")
    where = ("--ray", cluster) if cluster else ("--ray",)
    command = Command(directory, members, *paths, *where, *words, engine={**REPLICA, **engine})
    command.env |= RAY_ENV
    return command, out


def test_an_input_that_changes_is_said(cluster, members, tmp_path):
    """The rows are read by a process of Ray's."""
    source = write_rows(tmp_path / "rows.jsonl", *[{"prompt": "a"}] * 300)
    config = ProxyConfig.parse({**members, "engine": REPLICA}, "test")
    import ray

    with (
        open_job(config, source, str(tmp_path / "out.jsonl"), replicas=Replicas(1, 1)) as job,
        connected(cluster),
    ):
        write_rows(tmp_path / "rows.jsonl", *[{"prompt": "a"}] * 200)
        read = partial(_blocks, os.getcwd(), job.input, bytes(job.output.done), 8)
        blocks = ray.data.from_items([0]).map_batches(read, num_cpus=0)
        with pytest.raises(ProxyConfigError, match="had 300 rows, and now it has 200 rows") as said:
            job.answer(blocks)
    assert "\n" not in str(said.value)


def actors() -> list[psutil.Process]:
    """The replicas whose engines have started."""
    every = [(process, title(process)) for process in psutil.process_iter()]
    return [p for p, name in every if "MapBatches(Replica)" in name and "__init__" not in name]


def test_two_replicas_and_the_death_of_one(cluster, members, reference, tmp_path):
    """kill -9 of one: Ray starts another one, no row is lost, and nothing else is left behind."""
    rows = [{"prompt_token_ids": [3 + i % 300, 4, 5]} for i in range(900)]
    command, out = replicated(tmp_path, members, cluster, rows, "--replicas", "2")
    process = command.start()
    # One may be ready long before the other, which has rows of its own only a while after.
    both_from = None
    while process.poll() is None:
        lines = out.read_bytes().count(b"\n") if out.exists() else 0
        if both_from is None and len(actors()) == 2:
            both_from = lines
        if both_from is not None and lines > both_from + 60:
            break
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()[1]
    victim = actors()[1]
    (engine,) = [p for p in victim.children() if "EngineCore" in title(p)]
    victim.kill()
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (0, ""), stderr
    assert "an engine died: " in stderr
    require_complete(records(out), rows, reference)
    assert not command.survivors()
    engine.wait(30)


@pytest.mark.timeout(1500)  # starts of two engines, beside other tests
def test_a_job_on_ray_killed_at_random_moments_is_complete(cluster, members, reference, tmp_path):
    """The driver: its actors end with it, and the next one's go on where it was."""
    rows = [{"prompt_token_ids": [3 + i % 300, 4, 5 + i // 300]} for i in range(900)]
    command, out = replicated(tmp_path, members, cluster, rows, "--replicas", "2")
    command.env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    command.kill_at_random_moments(out, len(rows), starting=12, kills=KILLS // 3)
    require_complete(records(out), rows, reference)


def test_a_replica_of_two_workers(cluster, members, reference, tmp_path):
    """In a placement group, by vLLM's Ray executor, which nobody asked for; the expert drafts."""
    rows = [{"prompt_token_ids": [3 + i, 4, 5]} for i in range(40)] + [{"prompt": ""}]
    drafting = {**members, "speculate": {"tokens": 2}}
    command, out = replicated(tmp_path, drafting, "", rows, tensor_parallel_size=2)
    command.env |= {"RAY_ADDRESS": cluster, "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    status, stdout, stderr = command.fork().end()
    assert (status, stdout) == (1, ""), stderr
    assert "41 rows (1 errors)" in stderr
    *answered, failed = records(out)
    assert "`prompt`: it is empty" in failed["error"]
    require_complete(answered, rows[:-1], reference)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--replicas", "3"], "--replicas 3, each of tensor_parallel_size x pipeline_parallel_size "
         "= 1 x 1 HPUs: the Ray cluster has 2 HPUs on 1 node, enough for 2; use fewer"),
        (["--ray", "127.0.0.1:1"], "--ray '127.0.0.1:1': no cluster answers there (Connection"),
        (["--replicas", "2:1"], "--replicas is '2:1': give a count, or two as in 2:8"),
    ],
)  # fmt: skip
def test_replicas_that_cannot_be_are_one_line(cluster, members, tmp_path, words, says):
    command, out = replicated(tmp_path, members, cluster, [{"prompt": "a"}], *words)
    done = forks.run(command.words[1:], command.env)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert says in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("sizes", "is_spread", "nodes", "room"),
    [
        ((1, 1), False, [8, 8], 16),
        ((8, 1), False, [8, 8], 2),
        ((4, 2), False, [12, 4], 1),
        ((4, 2), True, [12, 4], 2),
        ((16, 1), False, [8, 8], 0),
        ((8, 2), True, [8, 8], 1),
        ((8, 2), True, [], 0),
    ],
)
def test_room_for_replicas(sizes, is_spread, nodes, room):
    """Workers of Ray's may stand on several nodes, those of one process may not."""
    placement = Placement("GPU", sizes, is_spread)
    assert placement.room([{"CPU": 64, "GPU": gpus} for gpus in nodes]) == room


def test_replicas_need_files_and_rows_of_ours(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    row = {"custom_id": "a", "url": "/v1/completions", "body": {}}
    batch = write_rows(tmp_path / "batch.jsonl", row)
    config = ProxyConfig.parse({"base": "b", "expert": "e", "antiexpert": "a"}, "test")
    threading.Thread(target=(tmp_path / "pipe").write_text, args=['{"prompt": "a"}\n']).start()
    for source, says in (
        (str(tmp_path / "pipe"), "rows are read again after an engine died"),
        (batch, "an OpenAI batch file is answered by one server"),
    ):
        with pytest.raises(ProxyConfigError, match=says):
            open_job(config, source, str(tmp_path / "out.jsonl"), replicas=Replicas(1, 1))


@pytest.mark.parametrize("missing", ["ray.data", "pandas"])
def test_ray_that_is_not_installed(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "ray.data" if missing == "pandas" else "pandas", False)
    says = pytest.raises(ProxyConfigError, match=f"Ray Data needs {missing}.*pip install")
    with says, connected(None):
        pass


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
    env = {**command.env, **RAY_ENV, "RAY_ADDRESS": address or cluster}
    done = forks.run(command.words[1:], env)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert says.format(cluster) in line


def is_worker(process: psutil.Process) -> bool:
    """Whether this is a worker of vLLM's: an actor that Ray names after its class."""
    (title, *_) = process.info["cmdline"] or [""]
    return title.startswith("ray::") and "Worker" in title and "IDLE" not in title


def test_two_ray_stages_are_the_formula(cluster, members, reference, tmp_path):
    """Tensor parallel workers answer a job and a server, above and below."""
    engine = {**ENGINE, "skip_tokenizer_init": True, "tensor_parallel_size": 1}
    engine |= {"pipeline_parallel_size": 2, **TRACED}
    question = {"name": "greedy", "prompts": PROMPTS, "params": GREEDY}
    plan = [{"name": "ray", "config": {**members, "engine": engine}, "questions": [question]}]
    env = {**RAY_ENV, "RAY_ADDRESS": cluster, "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    result = run_engines(plan, tmp_path / "engines", "v1", env=env)["ray"]
    assert "error" not in result, result["error"]
    assert result["executor"] == "RayExecutorV2"
    assert [answer["token_ids"][0] for answer in result["answers"]["greedy"]] == [
        reference.greedy(prompt, 16).token_ids for prompt in PROMPTS
    ]


def test_a_server_of_two_ray_workers_is_the_formula(cluster, members, reference, tmp_path):
    config = tmp_path / "proxy.yaml"
    config.write_text(yaml.safe_dump({**members, "engine": ENGINE}))
    env = {**RAY_ENV, "RAY_ADDRESS": cluster, "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    with serving([VLLM_PROXY, "serve", str(config)], tmp_path, env) as address:
        for prompt in PROMPTS:
            body = {"prompt": prompt, "return_token_ids": True, **GREEDY}
            answer = httpx.post(f"{address}/v1/completions", json=body, timeout=60).json()
            wanted = reference.greedy(prompt, 16).token_ids
            assert answer["choices"][0]["token_ids"] == wanted
    assert "RayWorkerProc" in (tmp_path / "log.txt").read_text()
