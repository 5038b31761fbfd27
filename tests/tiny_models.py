"""Real checkpoints small enough to make in a test: random weights, a real byte-level tokenizer.

The weights are drawn wide (`initializer_range`), so that the logits of neighbouring ids differ by
far more than float32 rounding and greedy decoding has one right answer.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

VOCAB_SIZE = 512
CONTEXT = 1024
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
_CORPUS = [
    "The large model is moved by what fine-tuning changed in the small one.",
    "Question: What is the capital of France? Answer: Paris.",
    'A record: {"name": "value", "count": 12, "list": [1, 2, 3], "flag": true}',
] * 8


def write_model(
    path: Path,
    family: str = "llama",
    *,
    seed: int,
    hidden_size: int = 128,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 4,
    tied: bool = False,
    vocab_size: int = VOCAB_SIZE,
    context: int = CONTEXT,
    **config: object,
) -> Path:
    """Write a float32 checkpoint with its tokenizer to *path* and return it."""
    config_class = {"llama": LlamaConfig, "qwen2": Qwen2Config}[family]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        config_class(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            tie_word_embeddings=tied,
            max_position_embeddings=context,
            initializer_range=0.15,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
            **config,
        ),
        dtype=torch.float32,
    )
    # transformers starts biases at zero; a lost one would go unseen.
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(path)
    write_tokenizer(path)
    return path


def write_tokenizer(path: Path, corpus: list[str] = _CORPUS) -> PreTrainedTokenizerFast:
    """Write a byte-level BPE tokenizer of at most `VOCAB_SIZE` ids, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)
    return fast


def write_triple(root: Path, family: str) -> dict[str, str]:
    """Write members that differ wherever members may: size, depth, head size, GQA, tied head.

    The family `padded` is Llama with vocabularies that also differ in size.
    """
    small = {"hidden_size": 128, "layers": 2, "heads": 4, "kv_heads": 2, "tied": True}
    expert_vocab, antiexpert_vocab = (480, 500) if family == "padded" else (VOCAB_SIZE, VOCAB_SIZE)
    family = "llama" if family == "padded" else family
    paths = {
        "base": write_model(
            root / "base", family, seed=0, hidden_size=256, layers=3, heads=4, kv_heads=2
        ),
        "expert": write_model(root / "expert", family, seed=1, vocab_size=expert_vocab, **small),
        "antiexpert": write_model(
            root / "antiexpert", family, seed=2, vocab_size=antiexpert_vocab, **small
        ),
    }
    return {role: str(path) for role, path in paths.items()}
