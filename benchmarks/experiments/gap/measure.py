"""Answers of base, small members, proxy at each strength, and few-shot, all from one engine.

Their requests are in the same continuous batch and differ in `proxy_weights` and `proxy_alpha`. The
directly tuned M runs in stock vLLM.
"""

import hashlib
import json
import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.gap.tasks import Item, Task, few_shot
from vllm_proxy.jobs.files import replacing

logger = logging.getLogger("gap_closed")

ALONE = {"base": [1.0, 0.0, 0.0], "expert": [0.0, 1.0, 0.0], "antiexpert": [0.0, 0.0, 1.0]}
TUNED = "tuned"
SPLITS = ("validation", "test")
ENGINE = {"max_model_len": 2048, "kv_cache_memory_bytes": 2 << 30}

Answers = dict[str, dict[str, list[str]]]
"""By system and split, in the order of the items."""


class Ask(NamedTuple):
    """One request: whose answer, to which split's next item, and how it is asked."""

    system: str
    split: str
    prompt: str
    extra_args: dict[str, Any]


def proxy(alpha: float) -> str:
    """Return the name of proxy tuning at a strength."""
    return f"proxy {alpha}"


def shots(count: int) -> str:
    """Return the name of the base after this many solved examples."""
    return f"few-shot {count}"


def asks(task: Task, seed: int, alphas: Sequence[float], counts: Sequence[int]) -> Iterator[Ask]:
    """Yield what the proxy-tuned engine is asked."""
    solved = examples(task, seed, counts)
    for split in SPLITS:
        items: list[Item] = getattr(task, split)
        for item in items:
            for name, weights in ALONE.items():
                yield Ask(name, split, item.prompt, {"proxy_weights": weights})
            for alpha in alphas:
                yield Ask(proxy(alpha), split, item.prompt, {"proxy_alpha": alpha})
        for count in counts:
            for item in items:
                prompt = few_shot(item, solved[:count])
                yield Ask(shots(count), split, prompt, {"proxy_weights": ALONE["base"]})


def examples(task: Task, seed: int, counts: Sequence[int]) -> list[Item]:
    """Return the training items that the few-shot base sees; it sees the first of them."""
    return random.Random(seed).sample(task.training(seed), max(counts))


def measured(
    root: Path,
    members: dict[str, Path],
    task: Task,
    seed: int,
    alphas: Sequence[float],
    counts: Sequence[int],
    engine: dict[str, Any],
) -> Answers:
    """Return everyone's answers, generated now unless they were before.

    Args:
        root: where they are kept.
        members: `base`, `expert`, `antiexpert` and `tuned`.
        alphas: strengths of the proxy.
        counts: numbers of examples that the few-shot base sees.
        engine: arguments of `vllm.LLM`.
    """
    names = {role: path.name for role, path in members.items()}
    asked = [*asks(task, seed, alphas, counts)]
    recipe = [names, engine, asked]
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]
    path = root / f"answers-{task.name}-{seed}-{digest}.json"
    if path.exists():
        logger.info("%s: there already", path)
        return json.loads(path.read_text())

    from vllm import LLM

    from vllm_proxy import ProxyLLM

    roles = {role: str(members[role]) for role in ALONE}
    engine = {**ENGINE, **engine}
    found: Answers = {}
    for one, text in zip(asked, _generate(ProxyLLM(**roles, **engine), task, asked), strict=True):
        found.setdefault(one.system, {}).setdefault(one.split, []).append(text)
    alone = [
        Ask(TUNED, split, item.prompt, {}) for split in SPLITS for item in getattr(task, split)
    ]
    llm = LLM(str(members[TUNED]), **engine)
    for one, text in zip(alone, _generate(llm, task, alone), strict=True):
        found.setdefault(one.system, {}).setdefault(one.split, []).append(text)
    with replacing(path) as file:
        file.write(json.dumps(found, ensure_ascii=False).encode())
    return found


def _generate(llm: Any, task: Task, asked: Sequence[Ask]) -> list[str]:
    """Answer greedily, up to the end of the line; then end the engine."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0.0, max_tokens=task.max_tokens, stop=["\n"], extra_args=one.extra_args
        )
        for one in asked
    ]
    try:
        outputs = llm.generate([one.prompt for one in asked], params)
    finally:
        llm.llm_engine.engine_core.shutdown()
    return [output.outputs[0].text for output in outputs]
