"""The benchmarks: members made on the spot, what they weigh, wrong input, one real run."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from support import forks
from support.commands import COMMAND_ENV
from support.tiny_models import write_model

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ENGINES = (
    "throughput",
    "latency",
    "serve",
    "reference",
    "budget",
    "control",
    "start",
    "growth",
    "plan",
    "drafting",
    "one_pass",
    "memory",
)
UNBOUND = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Variables of engines that share the cores with other tests."""


@pytest.fixture(scope="module")
def bench():
    """The benchmarks' modules that other tests' modules have no namesakes of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        names = ("members", "options", "report", "workload")
        found = {name: importlib.import_module(f"shared.{name}") for name in names}
        yield {**found, "throughput": importlib.import_module("measurements.throughput")}


def run(script: str, *words: str) -> subprocess.CompletedProcess:
    """Run a script that starts engines side by side, as its user does: in a fork it once hung."""
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "measurements" / f"{script}.py"), *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        # Engines have no processes of their own, each of which would import vLLM.
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **UNBOUND},
    )


def run_in_fork(script: str, *words: str) -> subprocess.CompletedProcess:
    """Run a script that ends before an engine starts."""
    return forks.run([str(BENCHMARKS / "measurements" / f"{script}.py"), *words], COMMAND_ENV)


def test_a_widened_model_computes_what_it_did(tmp_path, bench):
    source = write_model(tmp_path / "source", seed=0, layers=3)
    before = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    parameters = 3 * sum(p.numel() for p in before.parameters())
    bench["members"]._widen(source, tmp_path / "wide", parameters)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.float32)
    assert sum(p.numel() for p in after.parameters()) == pytest.approx(parameters, rel=0.2)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(after(ids).logits, before(ids).logits, rtol=0, atol=1e-4)


def test_a_cut_model_is_the_first_layers_of_another(tmp_path, bench):
    source = write_model(tmp_path / "source", seed=0, layers=10)
    bench["members"]._cut(source, tmp_path / "cut")
    whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype=torch.float32)
    whole.model.layers = whole.model.layers[: bench["members"].LAYERS]
    ids = torch.arange(20)[None]
    torch.testing.assert_close(
        cut(ids, use_cache=False).logits, whole(ids, use_cache=False).logits, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_read_in_a_step(tmp_path, bench, tied):
    """All weights but those of an embedding that is looked up; keys and values of all layers."""
    from vllm_proxy.config.schema import ProxyConfig

    shape = {"hidden_size": 128, "layers": 2, "kv_heads": 2, "tied": tied}
    paths = {
        role: str(write_model(tmp_path / role, seed=0, **shape)) for role in ("base", "expert")
    }
    config = ProxyConfig(**paths)
    members = bench["members"].Members(config, "bfloat16", 0)
    attention = 128 * 128 * 2 + 128 * 64 * 2
    weights = 2 * (attention + 3 * 128 * 256 + 2 * 128) + 128 + 512 * 128
    assert members.bytes_read("base") == 2 * weights
    assert members.bytes_of("base") == 2 * (weights + (0 if tied else 512 * 128))
    assert members.bytes_ratio == 2.0
    assert members.kv_bytes_per_token("base") == 2 * 2 * 2 * 2 * 32


def test_bytes_of_a_step_with_states(bench, tmp_path, monkeypatch):
    """The hybrid set: a fifth of the base's bytes, and states that each running request has."""
    monkeypatch.setattr(bench["members"], "CACHE", tmp_path)
    members = bench["members"].Members(bench["members"]._made("granite-4-h"), "bfloat16", 0)
    assert members.bytes_read("base") / members.bytes_read("expert") == pytest.approx(5, rel=0.02)
    # 18 of 20 layers: 48 heads of 64 x 128 numbers, and 3 columns of 3072 + 2 x 128 channels
    wide = 4 if torch.cpu._is_avx512_bf16_supported() else 2  # vLLM's states on this CPU
    base = 18 * (wide * 48 * 64 * 128 + 2 * 3 * (3072 + 2 * 128))
    pair = 2 * 9 * (wide * 48 * 32 * 128 + 2 * 3 * (1536 + 2 * 128))
    assert (members.state_bytes("base"), members.state_bytes()) == (base, base + pair)
    assert members.kv_bytes_per_token("base") == 2 * 2 * 2 * 4 * 128
    request = bench["workload"].Request
    # Two groups of at most two, in eight steps: (4 + 2 + 4) tokens are 10 / 8 running requests.
    requests = [request([5], 4), request([5], 2), request([5], 4)]
    weights = members.bytes_read(), members.bytes_read("base")
    ratio = (weights[0] + 2.5 * (base + pair)) / (weights[1] + 2.5 * base)
    throughput = bench["throughput"]
    assert throughput.bytes_ratio(members, throughput.PROXY, requests, 2) == pytest.approx(ratio)


def test_vision_language_members_are_their_text_models(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench["members"], "CACHE", tmp_path)
    members = bench["members"].Members(bench["members"]._made("qwen3-vl"), "bfloat16", 0)
    assert members.bytes_read("base") / members.bytes_read("expert") == pytest.approx(5, rel=0.03)
    layer = 2048 * (2 * 16 + 2 * 8) * 128 + 3 * 2048 * 6144 + 2 * 2048 + 2 * 128
    assert members.bytes_of("base") == 2 * (10 * layer + 2048 + 151936 * 2048)


def test_ratios_are_taken_within_rounds(bench):
    spread = bench["report"].ratios([2.0, 8.0, 3.0], [1.0, 2.0, 1.0])
    assert spread == (3.0, 2.0, 4.0)
    assert str(spread) == "3.00 (2.00-4.00)"


def test_a_workload_is_drawn_between_its_bounds_and_again_the_same(bench):
    workload = bench["workload"].Workload((4, 9), (2, 30))
    requests = workload.draw(200, 50, seed=1)
    assert requests == workload.draw(200, 50, seed=1) != workload.draw(200, 50, seed=2)
    assert {len(r.prompt) for r in requests} == set(range(4, 10))
    assert min(r.tokens for r in requests) == 2
    assert max(r.tokens for r in requests) >= 28
    assert all(3 <= token < 50 for r in requests for token in r.prompt)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--models", "tiny", "--prompt-tokens", "8", "2040"],
            "prompt and output of 2104 tokens do not fit the members' context of 2048; ask",
        ),
        (["--models", "lama"], "--models lama: unknown; use smollm2,"),
        (["--models", "no.yaml"], "--models: config 'no.yaml': No such file or directory"),
        (["--models", "llama-2-13b", "--dtype", "float32"], "GiB are needed for weights and KV"),
        (["--device", "cuda"], "--device cuda: no GPU answers here; use --device cpu"),
        (
            ["--models", "tiny", "--one-pass"],
            "an antiexpert with weights, to make an adapter for; use",
        ),
        (["--repeats", "-1"], "--repeats: '-1' is not a whole number above 0"),
        (["--at-once", "0"], "--at-once: '0' is not a whole number above 0"),
        (["--dtype", "int4"], "--dtype: invalid choice: 'int4'"),
    ],
    ids=str,
)
@pytest.mark.slow
def test_wrong_input_is_one_line(words, message):
    done = run_in_fork("throughput", *words)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert message in line


@pytest.mark.parametrize("script", ENGINES)
@pytest.mark.slow
def test_every_benchmark_explains_its_options(script):
    done = run_in_fork(script, "--help")
    assert done.returncode == 0
    assert "--device" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "tpu"], "--device tpu: use cuda or cpu"),
        (["--tinny"], "--tinny: unknown; the options are"),
        (["--output"], "--output: a value is missing"),
        (["--device", "cuda", "--tiny"], "--device cuda: no GPU answers here"),
    ],
    ids=str,
)
def test_gpu_script_refuses_in_one_line(tmp_path, words, message):
    done = subprocess.run(
        ["bash", str(BENCHMARKS / "gpu.sh"), *words],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "HOME": str(tmp_path)},
    )
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "Triton" not in line]
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.engine
def test_systems_side_by_side(tmp_path, members):
    """A real run: tables, a JSON line, and the same tokens from engine and transformers loop."""
    config = tmp_path / "members.yaml"
    engine = {"max_model_len": 256}
    config.write_text(json.dumps({**members, "engine": engine}))
    words = ["--models", str(config), "--dtype", "float32", "--eager", "--repeats", "2"]
    words += ["--at-once", "4", "--prompt-tokens", "3", "12", "--output-tokens", "2", "16"]
    words += ["--drafts", "2", "--one-pass"]
    done = run("throughput", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(done.stdout.splitlines()[-1])
    proxy, base, drafts, one_pass, loop = record["results"]
    assert [one["system"] for one in record["results"]] == [
        "proxy-tuned",
        "base alone",
        "proxy-tuned, up to 2 drafts",
        "one pass",
        "transformers loop",
    ]
    # Requests that come near a tie may differ; random ones of these members seldom do.
    assert loop["rows_as_the_proxy"] >= 3
    assert drafts["rows_as_the_proxy"] >= 3
    assert one_pass["bytes_ratio"] < proxy["bytes_ratio"] == drafts["bytes_ratio"]
    assert base["rows_as_the_proxy"] <= 1
    assert base["over_base"] == [1, 1, 1]
    assert proxy["times_the_loop"][0] > 0
    assert record["versions"]["vllm"]
    assert record["roofline"]["bytes_per_second"] > 1e8


@pytest.mark.engine
def test_drafts_side_by_side(tmp_path, members):
    """A real run: with drafts the same answers, in fewer steps than tokens."""
    config = tmp_path / "members.yaml"
    # The pair's expert would hardly predict anything: here the expert is the base.
    pair = {"expert": members["base"], "antiexpert": members["base"]}
    config.write_text(json.dumps({**members, **pair, "engine": {"max_model_len": 256}}))
    words = ["--models", str(config), "--dtype", "float32", "--eager", "--repeats", "1"]
    words += ["--at-once", "2", "--requests", "4", "--tokens", "13", "--drafts", "3"]
    words += ["--random", "1"]
    done = run("drafting", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    base, plain, drafted = json.loads(done.stdout.splitlines()[-1])["results"]
    assert [one["drafts"] for one in (base, plain, drafted)] == [None, 0, 3]
    assert drafted["same_answers"] == 4
    assert (drafted["accepted"], drafted["tokens_a_pass"]) == (1, 4)
    # Three models of one size, and three drafts by one of them.
    assert plain["expected_over_base"] == pytest.approx(1 / 3)
    assert drafted["expected_over_base"] == pytest.approx(4 / 6)


def test_no_placement_of_the_small_members_promises_much_for_70b(tmp_path):
    """The verdict of docs/plan.md, from the script that it names; today's step is `plan`'s."""
    script = BENCHMARKS / "experiments" / "placement.py"
    words = ["--gpus", "8", "--requests", "1", "64", "--context", "512"]
    done = subprocess.run(
        [sys.executable, str(script), *words], capture_output=True, text=True, check=True
    )
    record = json.loads(done.stdout.splitlines()[-1])
    found = [one for one in record["results"] if one["members"] == "Llama-2 70B / 7B"]
    assert max(one["gain"] for one in found) < record["promised"]
    small = [one for one in found if one["placement"].startswith("small TP")]
    assert len(small) == 6
    assert all(one["gain"] < 0 for one in small)
    by_name = {one["placement"]: one for one in found if one["requests"] == 1}
    today, joint = by_name["today: TP 8"]["seconds"], by_name["joint: TP 8"]["seconds"]
    assert today - joint == pytest.approx((2 * 32 + 1) * 10e-6)
    # By hand: all weights but embeddings, and 512 tokens of keys, at an eighth of 8 x 3350 GB/s.
    read = 2 * (68_714_504_192 + 2 * 6_607_343_616) + 512 * 1344 * 1024
    sums = 2 * (80 + 32 + 32) + 3 + 1  # and the logits
    assert today == pytest.approx(read / 8 / 3350e9 + sums * 10e-6, rel=0.01)
