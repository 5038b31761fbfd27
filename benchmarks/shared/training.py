"""What training of small models shares: batches, labels, the optimizer's loop."""

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

import torch
from torch import nn
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

IGNORE = -100  # label of a position that is not trained
PADDING = 0  # id after the end of a row: <|endoftext|>, which no question has


class Example(Protocol):
    """Something to learn: a prompt, and its answer without the space that comes between them."""

    prompt: str
    answer: str


T = TypeVar("T")


def shuffled_forever(rows: Sequence[T], rng: random.Random) -> Iterator[T]:
    """The rows in a new random order each time around."""
    while True:
        yield from rng.sample(rows, len(rows))


def collate(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of prompt, answer and end token, and the labels that each position predicts.

    Rows are padded on the right: causal attention keeps the padding from every token before it, so
    no mask is needed.

    Returns:
        ids ``[batch, len]`` and labels ``[batch, len - 1]``; a label is ``IGNORE`` before the
        answer and in the padding.
    """
    ids, labels = [], []
    for example in examples:
        prompt = tokenizer(example.prompt).input_ids
        answer = [*tokenizer(" " + example.answer).input_ids, tokenizer.eos_token_id]
        ids.append(torch.tensor(prompt + answer))
        labels.append(torch.tensor([IGNORE] * len(prompt) + answer))
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(ids, batch_first=True, padding_value=PADDING)
    return ids, pad(labels, batch_first=True, padding_value=IGNORE)[:, 1:]


def logits_at(model: LlamaForCausalLM, ids: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Logits ``[kept, vocab]`` at the positions of ``ids[:, :-1]`` that the mask ``kept`` selects.

    The head is as large as all layers of a small model, so it runs on these positions only.
    """
    return model.lm_head(model.model(ids).last_hidden_state[:, :-1][kept])


def optimize(
    model: nn.Module, steps: int, lr: float, desc: str, losses: Iterator[torch.Tensor]
) -> float:
    """AdamW on what is trainable for ``steps`` losses: a short warm-up, then cosine decay to zero.

    Returns:
        The running mean of the loss at the end.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.0, betas=(0.9, 0.95), fused=True)
    warmup = max(1, min(20, steps // 5))
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warmup)),
        ],
        milestones=[warmup],
    )
    model.train()
    progress = tqdm(itertools.islice(losses, steps), desc=desc, total=steps)
    average = float("nan")
    for step, loss in enumerate(progress):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average = loss.item() if step == 0 else 0.95 * average + 0.05 * loss.item()
        progress.set_postfix(loss=f"{average:.3f}")
    model.eval()
    return average
