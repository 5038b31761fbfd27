"""The gallery of papers: their formulas, and `check` and `plan` with stand-ins of their models."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from typer.main import get_command

from support.stand_ins import MODELS, StandIns
from vllm_proxy.cli.app import app
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.model.controls import ExtraOps, LogitControls
from vllm_proxy.model.fusion import controlled_logits, controls_at

ROOT = Path(__file__).parents[1]
GALLERY = ROOT / "configs/papers"
PAPERS = sorted(path for path in GALLERY.glob("**/*.yaml") if path.parent.name != "tasks")
TABLE = ROOT / "docs/papers.md"
SAME = ("-gsm", "-triviaqa", "70b-code")
"""Ends of names: the same shapes as the others of their directory, under other names."""
CHECKED = [path for path in PAPERS if not path.stem.endswith(SAME)]
ENOUGH = {"kv_cache_memory_bytes": 1 << 36}
"""Memory as on GPUs, wherever the tests run."""
EXTRA = {
    "small": (GALLERY / "dera.yaml", {"kv_cache_memory_bytes": 1 << 28}),
    "long": (GALLERY / "thinklogit.yaml", {**ENOUGH, "max_model_len": 10240}),
}
"""Configurations with other engine arguments."""

PUBLISHED = {
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-Math-1.5B": 1_543_714_304,
    "path/of/qwen2.5-0.5b-trained-by-unir": 494_032_768,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "YuanchengXu/AutoregressiveRM-tulu2-7b": 6_738_415_616 + 2 * 4096,  # one more token
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen/Qwen2.5-VL-72B-Instruct": 73_410_777_344,
    "HuggingFaceH4/zephyr-7b-beta": 7_241_732_096,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "openai-community/gpt2-large": 774_030_080,
}
"""Published numbers of parameters; of each shape once."""
NOTES = {
    "rast-32b": ["logits = base + 1.0 * (expert - antiexpert)."],
    "thinklogit": [
        "Vocabularies differ (base 152,064, expert 151,936, antiexpert 151,936): ids 151,936 to",
        "has other names for 7 of the base's special and added tokens",
        "151648 '<|box_start|>' / '<think>'",
        "at most 4,096 tokens",
    ],
    "proxythinker": [
        "Members see images, each with its tower: base 1,409,147,392",
        "An image takes 4 to 16,384 tokens of the context.",
    ],
    "genarm": [
        "logits = base + 0.5 * (expert - base), the base instead of the missing antiexpert.",
        "ids from 32,000 on, which the base does not have, are never generated",
        "has 1 token beyond the base's tokenizer, first id 32000 ('<pad>')",
    ],
    "dera": ["logits = base + 0.5 * (expert - base), the base instead of the missing antiexpert."],
    "dexperts": ["`filters.top_p` is 0.9", "at most 1,024 tokens"],
    "cfg": ["except for requests that give them different prompts"],
    "context-aware-decoding": ["except for requests that give them different prompts"],
    "contrastive-decoding": ["`filters.plausibility` is 0.1"],
    "dynamic-logit-fusion": ["`alpha` is adaptive."],
    "llama2-13b-chat": ["Conversations are seen by base plain, expert template, antiexpert plain."],
}
"""What a user needs to know of a configuration, in `check`'s words."""


VOCABULARY = 60


def nucleus(base: np.ndarray, top_p: float) -> np.ndarray:
    """Return 0 for the likeliest tokens that together have a probability of *top_p*; else -inf."""
    kept, total = np.full_like(base, -np.inf), 0.0
    for token in np.argsort(-base):
        if total < top_p:
            kept[token] = 0.0
        total += softmax(base)[token]
    return kept


def plausible(base: np.ndarray, fraction: float) -> np.ndarray:
    """Return 0 for tokens with this fraction of the highest probability, -inf for others."""
    chances = softmax(base)
    return np.where(chances >= fraction * chances.max(), 0.0, -np.inf)


def scaled(logits: np.ndarray) -> np.ndarray:
    """Return logits without their level and scale, on which greedy answers do not depend."""
    possible = logits[np.isfinite(logits)]
    assert len(possible) > 2
    return (logits - possible.max()) / possible.std()


FORMULAS: dict[str, Callable[..., np.ndarray]] = {
    "rast-32b": lambda large, tuned, plain: large + 1.0 * (tuned - plain),
    "rast-14b": lambda large, tuned, plain: large + 1.0 * (tuned - plain),
    "thinklogit": lambda target, guider, plain: (target + 1.0 * (guider - plain)) / 0.6,
    "proxythinker": lambda large, tuned, plain: large + 0.5 * (tuned - plain),
    "genarm": lambda model, reward: model + 1.0 * reward,
    "dera": lambda sft, aligned: (0.5 * aligned + 0.5 * sft) / 0.7,
    "delta-unlearning": lambda large, offset, initial: large + (offset - initial),
    "dexperts": lambda gpt2, non_toxic, toxic: nucleus(gpt2, 0.9) + gpt2 + 2 * (non_toxic - toxic),
    "cfg": lambda conditional, unconditional: unconditional + 1.5 * (conditional - unconditional),
    "context-aware-decoding": lambda context, none: 1.5 * context - 0.5 * none,
    "contrastive-decoding": lambda expert, amateur: (
        plausible(expert, 0.1) + 1.5 * expert - 0.5 * amateur
    ),
    "unir": lambda backbone, reasoner: backbone + reasoner,
}
"""What the papers sample from, at a temperature of 1, or choose the highest of, by the logits of
their models: in the order base, expert, antiexpert, those that there are."""


@pytest.mark.parametrize("name", FORMULAS)
def test_a_configuration_is_its_papers_formula(name):
    config = ProxyConfig.from_yaml(GALLERY / f"{name}.yaml")
    noise = torch.Generator().manual_seed(7)
    members = {role: torch.randn(1, VOCABULARY, generator=noise) * 1.5 for role in config.roles}
    row = LogitControls.of(config.control)
    fused = controlled_logits(
        *(members[config.effective_role(role)] for role in ("base", "expert", "antiexpert")),
        controls_at(torch.tensor([row]), torch.zeros(1)),
        ExtraOps.of([row]),
    )[0].double()
    wanted = FORMULAS[name](*(member[0].double().numpy() for member in members.values()))
    if temperature := config.sampling["temperature"]:
        found = softmax((fused / temperature).numpy())
        np.testing.assert_allclose(found, softmax(wanted), rtol=1e-4, atol=1e-9)
    else:
        found, wanted = scaled(fused.numpy()), scaled(wanted)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def parameters_of(model: str) -> int:
    """Return the published number of parameters of a model of the same shape."""
    return next(count for name, count in PUBLISHED.items() if _shape(name) == _shape(model))


def _shape(model: str) -> dict[str, Any]:
    kept = {"tokenizer", "max_position_embeddings", "dtype", "bos_token_id", "eos_token_id"}
    return {key: value for key, value in MODELS[model].items() if key not in kept}


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What `check` and `plan` say, by a configuration's name or that of an extra one."""
    root = tmp_path_factory.mktemp("models")
    stand_ins = StandIns(root)
    for model in MODELS:
        stand_ins.write(model)
    runs = {path.stem: (path, ENOUGH) for path in CHECKED} | EXTRA
    # Without what engines of other tests have set: vLLM prefers it to `kv_cache_memory_bytes`.
    env = {key: value for key, value in os.environ.items() if key != "VLLM_CPU_KVCACHE_SPACE"}
    process = subprocess.run(
        [sys.executable, ROOT / "tests/support/checked_papers.py"],
        input=json.dumps([[str(path), engine] for path, engine in runs.values()]),
        env={**env, "HF_HUB_CACHE": str(stand_ins.cache), "HF_HUB_OFFLINE": "1"},
        cwd=root,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    written = process.stdout[process.stdout.index("[{") :]
    return dict(zip(runs, json.loads(written), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("path", CHECKED, ids=lambda path: path.stem)
def test_check_finds_no_problem(said, path):
    config, report = ProxyConfig.from_yaml(path), said[path.stem]
    assert report["problems"] == []
    for role in config.roles:
        assert report["parameters"][role] == parameters_of(config.member(role).model), role


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTES)
def test_check_says_what_a_user_needs(said, name):
    notes = " ".join(said[name]["notes"])
    assert [words for words in NOTES[name] if words not in notes] == []


@pytest.mark.slow
@pytest.mark.parametrize("path", CHECKED, ids=lambda path: path.stem)
def test_plan_knows_the_bytes(said, path):
    config, record = ProxyConfig.from_yaml(path), said[path.stem]["plan"]
    assert not isinstance(record, str), record
    for role in config.roles:
        wanted = 2 * parameters_of(config.member(role).model)  # 16 bits each
        assert record["members"][role]["weight_bytes"] == wanted, role
    assert record["layouts"][0]["tp"] == config.engine.get("tensor_parallel_size", 1)


@pytest.mark.slow
def test_the_table_says_how_large_they_are(said):
    rows = re.findall(
        r"^\|.*?\| `([\w/.-]+)\.yaml`.*\| (\d+) GiB, (\d) \|$", TABLE.read_text(), re.MULTILINE
    )
    assert {name for name, _, _ in rows} >= {path.stem for path in GALLERY.glob("*.yaml")}
    for name, gib, gpus in rows:
        record = said[name.rpartition("/")[2]]["plan"]
        weights = sum(member["weight_bytes"] for member in record["members"].values())
        assert int(gib) == round(weights / 2**30), name
        assert int(gpus) == record["layouts"][0]["tp"], name


@pytest.mark.slow
def test_the_engine_is_started_without_weights(said):
    """Else no problem would mean little."""
    (problem,) = said["small"]["problems"]
    assert "To serve at least one request" in problem


@pytest.mark.slow
def test_thinklogit_needs_the_length_that_it_sets(said):
    assert said["long"]["problems"] == [
        "`engine.max_model_len` is 10240, longer than the context of antiexpert 4096; set "
        "`engine.max_model_len: 4096`"
    ]


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_comments_name_the_paper_and_a_command(path):
    comments = " ".join(
        line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#")
    )
    name = path.relative_to(ROOT)
    found = re.search(rf"vllm-proxy (generate|evaluate) {re.escape(str(name))} ", comments)
    known = {word for each in get_command(app).commands[found[1]].params for word in each.opts}
    assert {*re.findall(r"--[a-z][\w-]*", comments)} <= known
    if path.parent == GALLERY:
        assert re.search(r"arXiv \d{4}\.\d{5}", comments)
        assert "Published" in comments
