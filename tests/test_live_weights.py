"""New weights for a running engine: answers are those of the reference on these weights.

One engine receives all of it, one after the other; each answer says which weights served.
"""

import re
from pathlib import Path

import pytest
import torch
from vllm import EngineArgs

from support.engines import SAFE_MARGIN, TOKEN_ENGINE, answers_of, run_engines
from support.reference import Reference
from support.tiny_models import write_model, write_triple
from support.transfer import TRANSFER, checkpoint, update
from vllm_proxy.config.roles import ROLES
from vllm_proxy.config.schema import ProxyConfig

PROMPTS = [[40 + 7 * i + j for j in range(5 + 30 * i)] for i in range(4)]
PARAMS = {"temperature": 0, "max_tokens": 10, "ignore_eos": True}
ENGINES = {"v1": {}, "v2": {"pipeline_parallel_size": 2}}
DRAFTING = {"speculate": {"tokens": 3, "adapt": False}}
"""With stages, the last one has the whole expert, and the first one ignores its weights."""
RELOAD = "collective_rpc", "reload_weights"
FAMILIES = {"v1": "qwen2", "v2": "granite"}
"""One with biases, and one whose heads are tied and no part of the fused product."""
SMALL = {"hidden_size": 128, "layers": 2, "heads": 4, "kv_heads": 2, "tied": True}
BASE = {"hidden_size": 256, "layers": 3, "heads": 4, "kv_heads": 2}
SHAPES = {"base": BASE, "expert": SMALL, "antiexpert": SMALL}


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> dict[str, dict[str, str]]:
    """Members by runner."""
    return {
        runner: write_triple(tmp_path_factory.mktemp(f"old-{runner}"), family)
        for runner, family in FAMILIES.items()
    }


@pytest.fixture(scope="module")
def new(tmp_path_factory) -> dict[str, dict[str, str]]:
    """The same with other weights."""
    root = tmp_path_factory.mktemp("new")
    return {
        runner: {
            role: str(write_model(root / runner / role, family, seed=20 + i, **SHAPES[role]))
            for i, role in enumerate(ROLES)
        }
        for runner, family in FAMILIES.items()
    }


def wrong_updates(old: dict[str, str], new: dict[str, str]) -> dict[str, tuple[dict, str]]:
    """Return updates that must not be loaded, and what is said about them."""
    right = checkpoint(new["antiexpert"], "antiexpert")
    first, *_, last = right
    broken = right[last].clone()
    broken.view(-1)[3] = float("nan")
    half = dict(list(checkpoint(new["base"]).items())[:9])
    return {
        "half": (half, "lacks .* of the model's tensors"),
        "nan": (right | {last: broken}, f"{last.partition('.')[2]} has NaN or infinite values"),
        "shape": (
            right | {first: right[first][:, :-1]},
            r"cannot load .*embed_tokens.* its shape is \[512, 127\], and \[512, 128\] is needed",
        ),
        "name": (right | {"expret.norm.weight": torch.ones(4)}, "expret"),
        "half of two": (checkpoint(new["expert"], "expert") | half, "lacks .* of the model's"),
        "nothing": ({}, "the update has no tensors"),
    }


def questions(old: dict[str, str], new: dict[str, str], root: Path) -> list[dict]:
    ask = {"prompts": PROMPTS, "params": PARAMS}
    everything = {k: v for role in ROLES for k, v in checkpoint(new[role], role).items()}
    expert = checkpoint(new["expert"], "expert")
    steps = {
        "old": None,
        "reloaded": {"calls": [RELOAD]},
        "slept": {"calls": [("collective_rpc", "lose_weights"), RELOAD]},
        "expert": update("expert", expert, root),
        **{name: update(name, sent, root) for name, (sent, _) in wrong_updates(old, new).items()},
        "again": update("again", expert, root),
        "all": update("all", everything, root),
        "path": {"calls": [[*RELOAD, None, [], {"weights_path": {"expert": old["expert"]}}]]},
        "no path": {
            "calls": [[*RELOAD, None, [], {"weights_path": {"expert": str(root / "nothing")}}]]
        },
        "back": {"calls": [RELOAD]},
    }
    return [
        question
        for name, step in steps.items()
        for question in (
            *([] if step is None else [{**step, "name": f"{name}: errors"}]),
            {"name": name, **ask},
        )
    ]


@pytest.fixture(scope="module", params=ENGINES)
def engines(request, old, new, tmp_path_factory) -> dict[str, dict]:
    runner = request.param
    root = tmp_path_factory.mktemp(f"live-{runner}")
    engine = {**TOKEN_ENGINE, **TRANSFER, "max_model_len": 256, **ENGINES[runner]}
    config = {**old[runner], **DRAFTING, "engine": engine}
    asked = questions(old[runner], new[runner], root)
    plan = [{"name": "live", "config": config, "questions": asked}]
    return {"runner": runner, **run_engines(plan, root, runner)}


@pytest.fixture(scope="module")
def expected(engines, old, new) -> dict[str, list[list[int]]]:
    """The answers of old weights, of a new expert, of new weights, of an old expert in these."""
    torch.set_num_threads(1)
    old, new = old[engines["runner"]], new[engines["runner"]]
    weights = {
        "old": old,
        "expert": {**old, "expert": new["expert"]},
        "all": new,
        "path": {**new, "expert": old["expert"]},
    }
    answers = {}
    for name, members in weights.items():
        paths = [Reference(**members).greedy(prompt, 10) for prompt in PROMPTS]
        assert min(path.margin for path in paths) > SAFE_MARGIN
        answers[name] = [path.token_ids for path in paths]
    assert len({str(one) for one in answers.values()}) == len(answers)
    return answers


@pytest.mark.parametrize(
    ("step", "weights"),
    [
        ("old", "old"),
        ("reloaded", "old"),
        ("slept", "old"),
        ("expert", "expert"),
        ("again", "expert"),
        ("all", "all"),
        ("path", "path"),
        ("back", "old"),
    ],
)
def test_answers_are_those_of_the_new_weights(engines, expected, step, weights):
    answers = answers_of(engines, "live")
    assert answers.get(f"{step}: errors", [None])[-1] is None
    assert [a["token_ids"][0] for a in answers[step]] == expected[weights]


@pytest.mark.parametrize("name", ["half", "nan", "shape", "name", "half of two", "nothing"])
def test_a_wrong_update_leaves_the_old_weights_serving(engines, expected, old, new, name):
    answers = answers_of(engines, "live")
    runner = engines["runner"]
    *before, error = answers[f"{name}: errors"]
    assert not any(before)  # said once, when the update ends
    assert re.search(wrong_updates(old[runner], new[runner])[name][1], error)
    assert "; the old weights keep serving" in error  # vLLM adds words to an error of several ranks
    assert "\n" not in error
    assert [a["token_ids"][0] for a in answers[name]] == expected["expert"]


def test_a_directory_that_is_not_there_is_named(engines, expected):
    answers = answers_of(engines, "live")
    assert re.search(
        r"`weights_path` is .*nothing.*: not a local directory; the old weights keep serving",
        answers["no path: errors"][0],
    )
    assert [a["token_ids"][0] for a in answers["no path"]] == expected["path"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"weight_transfer_config": {"backend": "sparse_nccl"}},
            "`weight_transfer_config.backend` is 'sparse_nccl': it writes .*; use 'nccl' or 'ipc'",
        ),
        (
            {**TRANSFER, "worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"},
            "`weight_transfer_config`: new weights arrive in vllm-proxy's worker, .*worker_cls",
        ),
    ],
)
def test_what_cannot_receive_weights_is_one_line(members, changes, words):
    """Of the stock entry points as well, before a process is started."""
    values = {**members, "engine": {"dtype": "float32"}}
    args = ProxyConfig.parse(values, "test").engine_args() | changes
    with pytest.raises(ValueError, match=words):
        EngineArgs(**args).create_engine_config()
