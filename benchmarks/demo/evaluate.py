"""Exact match of the demo's members and of proxy tuning, by a plain batched transformers loop.

    python benchmarks/demo/evaluate.py [--models .cache/demo] [--questions FILE.jsonl]

This is the reference that the engine is compared with, and it shares no code with it: three models,
three KV caches, and ``base + alpha * (expert - antiexpert)`` on float32 logits, greedily.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

ALPHAS = (0.5, 1.0, 1.5)
MAX_NEW_TOKENS = 16
BATCH_SIZE = 64

# The models whose logits are summed, with their weights.
Terms = Sequence[tuple[float, PreTrainedModel]]


@torch.inference_mode()
def generate(terms: Terms, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    """Greedy continuations of ``prompts`` by the weighted sum of the terms' logits.

    Returns:
        One string per prompt, at most ``MAX_NEW_TOKENS`` tokens, cut before the first
        end-of-sequence token.
    """
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    tokens, mask = batch.input_ids, batch.attention_mask
    prompt_len = tokens.shape[1]
    new_tokens = tokens
    caches = [None] * len(terms)
    finished = torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(MAX_NEW_TOKENS):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new_tokens.shape[1] :]
        logits = 0.0  # [batch, vocab]
        for i, (weight, model) in enumerate(terms):
            out = model(
                new_tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=caches[i],
                use_cache=True,
                logits_to_keep=1,
            )
            caches[i] = out.past_key_values
            logits = logits + weight * out.logits[:, -1].float()
        chosen = logits.argmax(-1).masked_fill(finished, tokenizer.eos_token_id)
        finished |= chosen == tokenizer.eos_token_id
        new_tokens = chosen[:, None]
        tokens = torch.cat([tokens, new_tokens], dim=1)
        mask = torch.cat([mask, torch.ones_like(new_tokens)], dim=1)
        if finished.all():
            break
    answers = []
    for row in tokens[:, prompt_len:].tolist():
        end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
        answers.append(tokenizer.decode(row[:end]))
    return answers


def answer_all(
    terms: Terms, tokenizer: PreTrainedTokenizerBase, prompts: list[str], desc: str = ""
) -> list[str]:
    """``generate`` in batches of ``BATCH_SIZE``, with a progress bar."""
    batches = range(0, len(prompts), BATCH_SIZE)
    return [
        answer
        for start in tqdm(batches, desc=desc, leave=False)
        for answer in generate(terms, tokenizer, prompts[start : start + BATCH_SIZE])
    ]


def exact_match(outputs: list[str], answers: list[str]) -> float:
    """Percentage of outputs that are the answer, surrounding white space aside."""
    hits = sum(output.strip() == answer for output, answer in zip(outputs, answers, strict=True))
    return 100 * hits / len(answers)


def evaluate(
    base: PreTrainedModel,
    antiexpert: PreTrainedModel,
    expert: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[dict[str, str]],
    alphas: Sequence[float] = ALPHAS,
) -> dict[str, float]:
    """Exact match in percent of each member alone and of the proxy at each strength.

    Args:
        questions: rows with the keys ``prompt`` and ``answer``.
    """
    systems: dict[str, Terms] = {
        "base": [(1.0, base)],
        "antiexpert": [(1.0, antiexpert)],
        "expert": [(1.0, expert)],
    }
    for alpha in alphas:
        systems[f"proxy alpha={alpha}"] = [(1.0, base), (alpha, expert), (-alpha, antiexpert)]
    prompts = [row["prompt"] for row in questions]
    answers = [row["answer"] for row in questions]
    return {
        name: round(exact_match(answer_all(terms, tokenizer, prompts, name), answers), 1)
        for name, terms in systems.items()
    }


def format_table(scores: dict[str, float]) -> str:
    """The scores as a Markdown table with one row."""
    return "\n".join(
        f"| {' | '.join(cells)} |"
        for cells in (scores, ["---"] * len(scores), map(str, scores.values()))
    )


def load_questions(path: Path) -> list[dict[str, str]]:
    """The rows of a JSONL file."""
    with path.open() as file:
        return [json.loads(line) for line in file]


def main() -> None:
    """Command line: score the built members and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--models", type=Path, default=Path(".cache/demo"), help="default: %(default)s"
    )
    parser.add_argument("--questions", type=Path, default=Path(__file__).parent / "heldout.jsonl")
    args = parser.parse_args()
    members = [
        AutoModelForCausalLM.from_pretrained(args.models / name, dtype=torch.float32).eval()
        for name in ("base", "antiexpert", "expert")
    ]
    tokenizer = AutoTokenizer.from_pretrained(args.models / "base")
    scores = evaluate(*members, tokenizer, load_questions(args.questions))
    print(format_table(scores))


if __name__ == "__main__":
    main()
