"""The members, trained for the experiment: a smaller M, and both of them tuned on each task.

All weights but the embeddings are trained, in float32 with products in bfloat16. Each model has a
directory, named by a digest of what it is made from. A directory that exists is not made again. So
an interrupted run resumes, and a changed recipe makes new models.
"""

import hashlib
import json
import logging
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from demo.models import keep_layers, load_tokenizer, save_member
from experiments.gap.tasks import Item, Task
from shared.training import IGNORE, PADDING, collate, logits_at, optimize, shuffled_forever

logger = logging.getLogger("gap_closed")

LAYERS = (*range(9), *range(24, 30))
"""What the small model keeps of M's 30. Of ten choices of 15 that were tried before any training,
this one is the nearest to M (KL divergence 4 to 5 a token; 7 to 20 for others)."""
PRODUCT = Path("product.json")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Recipe:
    """How one stage trains.

    Attributes:
        steps: of the optimizer.
        lr: highest learning rate.
        batch: examples a step.
    """

    steps: int
    lr: float
    batch: int = 16


def product(
    root: Path,
    name: str,
    recipe: Mapping[str, object],
    make: Callable[[], tuple[LlamaForCausalLM, float]],
) -> Path:
    """Return the directory of the model *name* made by *recipe*; make it unless it is there.

    *make* returns the model and the loss at its end.
    """
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    path = root / f"{name}-{digest}"
    if path.exists():
        logger.info("%s: there already", path)
        return path
    root.mkdir(parents=True, exist_ok=True)
    model, loss = make()
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=root))
    try:
        save_member(model.cpu(), load_tokenizer(), scratch)
        (scratch / PRODUCT).write_text(json.dumps({**recipe, "loss": round(loss, 4)}) + "\n")
        scratch.chmod(0o755)
        scratch.rename(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return path


def healed(root: Path, base: Path, tasks: list[Task], recipe: Recipe) -> Path:
    """Make the antiexpert: some of M's layers, which learn M's next-token distributions back.

    Its text is the tasks' training questions with their answers, KL(M ‖ small) at every token.
    """
    made_from = {"layers": LAYERS, "tasks": [task.name for task in tasks], **asdict(recipe)}

    def make() -> tuple[LlamaForCausalLM, float]:
        teacher = load(base).requires_grad_(False)
        small = trainable(keep_layers(teacher.cpu(), LAYERS).to(DEVICE))
        teacher.to(DEVICE)
        tokenizer = load_tokenizer()
        rng = random.Random(0)
        streams = [shuffled_forever(task.training(0), rng) for task in tasks]

        def losses() -> Iterator[torch.Tensor]:
            while True:
                total, tokens = 0.0, 0
                for stream in streams:  # apart: questions of a task are about equally long
                    examples = [next(stream) for _ in range(recipe.batch // len(streams))]
                    ids = collate(examples, tokenizer)[0].to(DEVICE)
                    kept = ids[:, 1:] != PADDING
                    with torch.no_grad(), autocast():
                        target = logits_at(teacher, ids, kept).float().log_softmax(-1)
                    with autocast():
                        logits = logits_at(small, ids, kept)
                    own = logits.float().log_softmax(-1)
                    total += F.kl_div(own, target, log_target=True, reduction="sum")
                    tokens += int(kept.sum())
                yield total / tokens

        return small, optimize(small, recipe.steps, recipe.lr, "heal", losses())

    return product(root, "antiexpert", made_from, make)


def tuned(root: Path, parent: Path, name: str, task: Task, seed: int, recipe: Recipe) -> Path:
    """Tune the model *parent* on a task: cross-entropy on answers and their end token."""
    made_from = {"parent": parent.name, "task": task.name, "seed": seed, **asdict(recipe)}

    def make() -> tuple[LlamaForCausalLM, float]:
        model = trainable(load(parent))
        tokenizer = load_tokenizer()
        examples = shuffled_forever(task.training(seed), random.Random(seed))

        def losses() -> Iterator[torch.Tensor]:
            while True:
                batch: list[Item] = [next(examples) for _ in range(recipe.batch)]
                ids, labels = (tensor.to(DEVICE) for tensor in collate(batch, tokenizer))
                kept = labels != IGNORE
                with autocast():
                    logits = logits_at(model, ids, kept)
                yield F.cross_entropy(logits.float(), labels[kept])

        desc = f"{name} {task.name} {seed}"
        return model, optimize(model, recipe.steps, recipe.lr, desc, losses())

    return product(root, f"{name}-{task.name}-{seed}", made_from, make)


def load(path: Path) -> LlamaForCausalLM:
    """Read a model in float32."""
    return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).to(DEVICE).eval()


def trainable(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Let everything be trained but the embedding, and the head that is tied to it."""
    model.requires_grad_(True)
    model.model.embed_tokens.requires_grad_(False)
    return model


def autocast() -> torch.autocast:
    """Products in bfloat16, if the device has them; everything else stays in float32."""
    has = DEVICE != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast(DEVICE, torch.bfloat16, enabled=has)
