"""Stand-ins for published models: their shapes and vocabularies, without their weights.

A stand-in has the published config, a safetensors file with the names and shapes of the real
tensors in its header and a hole instead of their data, and a tokenizer of the real size with the
real control tokens. Its other tokens are made up, and there are no merges: no hub is asked.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
)
from transformers.models.qwen2_vl import Qwen2VLImageProcessor

CHAT_TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}"
COMMIT = "0" * 40
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

QWEN_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>"),
    *("<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
)
R1_TOKENS = (
    *("<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),  # noqa: RUF001
    "<｜begin▁of▁sentence｜>",  # noqa: RUF001
    *("<|EOT|>", "<think>", "</think>"),
    *QWEN_TOKENS[7:],
)
"""R1-Distill-Qwen has other names for seven of Qwen's control tokens."""
LLAMA3_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_{i}|>" for i in range(254)))

TOKENIZERS: dict[str, tuple[int, tuple[str, ...]]] = {
    "qwen": (151643, QWEN_TOKENS),
    "r1": (151643, R1_TOKENS),
    "llama": (32000, ()),
    "llama-pad": (32000, ("<pad>",)),
    "llama3": (128000, LLAMA3_TOKENS),
    "gpt2": (50256, ("<|endoftext|>",)),
}
"""Number of ordinary tokens, and the control tokens after them. Llama's three (`<unk>`, `<s>`,
`</s>`) are the first of its ordinary ones."""


def _shape(
    family: str, hidden: int, intermediate: int, layers: int, heads: tuple[int, int]
) -> dict[str, Any]:
    return {
        "family": family,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "tie_word_embeddings": False,
    }


_QWEN = {
    **{"vocab_size": 152064, "tokenizer": "qwen", "max_position_embeddings": 131072},
    **{"bos_token_id": 151643, "eos_token_id": 151643, "dtype": "bfloat16"},
}
_QWEN_SMALL = {**_QWEN, "vocab_size": 151936, "tie_word_embeddings": True}
_QWEN_INSTRUCT = {**_QWEN_SMALL, "max_position_embeddings": 32768, "eos_token_id": 151645}
_LLAMA = {
    **{"vocab_size": 32000, "tokenizer": "llama", "max_position_embeddings": 4096},
    **{"bos_token_id": 1, "eos_token_id": 2, "dtype": "float16"},
}
_LLAMA_1 = {"max_position_embeddings": 2048}
_LLAMA_3 = {
    **{"vocab_size": 128256, "tokenizer": "llama3", "max_position_embeddings": 131072},
    **{"bos_token_id": 128000, "eos_token_id": 128001, "dtype": "bfloat16"},
}
QWEN_32B = _shape("qwen2", 5120, 27648, 64, (40, 8)) | _QWEN
QWEN_14B = _shape("qwen2", 5120, 13824, 48, (40, 8)) | _QWEN
QWEN_7B = _shape("qwen2", 3584, 18944, 28, (28, 4)) | _QWEN
QWEN_3B_INSTRUCT = _shape("qwen2", 2048, 11008, 36, (16, 2)) | _QWEN_INSTRUCT
QWEN_1_5B = _shape("qwen2", 1536, 8960, 28, (12, 2)) | _QWEN_SMALL
QWEN_0_5B_INSTRUCT = _shape("qwen2", 896, 4864, 24, (14, 2)) | _QWEN_INSTRUCT
LLAMA_7B = _shape("llama", 4096, 11008, 32, (32, 32)) | _LLAMA
LLAMA_13B = _shape("llama", 5120, 13824, 40, (40, 40)) | _LLAMA
LLAMA_70B = _shape("llama", 8192, 28672, 80, (64, 8)) | _LLAMA
LLAMA_3_1B = _shape("llama", 2048, 8192, 16, (32, 8)) | _LLAMA_3 | {"tie_word_embeddings": True}
MISTRAL_7B = {
    **_shape("mistral", 4096, 14336, 32, (32, 8)) | _LLAMA,
    **{"max_position_embeddings": 32768, "sliding_window": 4096, "dtype": "bfloat16"},
}
GPT2_LARGE = {
    **{"family": "gpt2", "n_embd": 1280, "n_layer": 36, "n_head": 20, "n_positions": 1024},
    **{"vocab_size": 50257, "bos_token_id": 50256, "eos_token_id": 50256},
    **{"tokenizer": "gpt2", "dtype": "float32"},
}

QWEN_TOWER = {
    **{"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
    **{"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]},
}


def _seeing(text: dict[str, Any], **tower: int) -> dict[str, Any]:
    """Return the config of Qwen2.5-VL around that of its text model."""
    whole = {key: text[key] for key in ("dtype", "tokenizer", "tie_word_embeddings")}
    kept = {key: value for key, value in text.items() if key not in ("family", "tokenizer")}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    return {
        **{"family": "qwen2_5_vl", **whole},
        **{"image_token_id": 151655, "video_token_id": 151656},
        **{"vision_start_token_id": 151652, "vision_end_token_id": 151653},
        "text_config": {
            **kept,
            **{"rope_parameters": rope, "max_position_embeddings": 128000, "eos_token_id": 151645},
        },
        "vision_config": {**QWEN_TOWER, **tower, "out_hidden_size": text["hidden_size"]},
    }


QWEN_72B = _shape("qwen2", 8192, 29568, 80, (64, 8)) | _QWEN
QWEN_VL_7B = _seeing(QWEN_7B)
QWEN_VL_72B = _seeing(QWEN_72B, intermediate_size=3456)
PIXELS = {"shortest_edge": 3136, "longest_edge": 12845056}
"""An image of Qwen2.5-VL has 4 to 16,384 tokens."""

MODELS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-32B": QWEN_32B,
    "Qwen/Qwen2.5-14B": QWEN_14B,
    "Qwen/Qwen2.5-7B": QWEN_7B,
    "hkust-nlp/Qwen-2.5-14B-SimpleRL-Zoo": QWEN_14B,
    "hkust-nlp/Qwen-2.5-7B-SimpleRL-Zoo": QWEN_7B,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": {
        **QWEN_1_5B,
        **{"tie_word_embeddings": False, "tokenizer": "r1", "bos_token_id": 151646},
    },
    "Qwen/Qwen2.5-Math-1.5B": QWEN_1_5B | {"max_position_embeddings": 4096},
    "Qwen/Qwen2.5-3B-Instruct": QWEN_3B_INSTRUCT,
    "path/of/qwen2.5-0.5b-trained-by-unir": QWEN_0_5B_INSTRUCT,
    "Qwen/Qwen2.5-VL-72B-Instruct": QWEN_VL_72B,
    "Qwen/Qwen2.5-VL-7B-Instruct": QWEN_VL_7B,
    "TIGER-Lab/VL-Rethinker-7B": QWEN_VL_7B,
    "allenai/tulu-2-70b": LLAMA_70B | {"dtype": "bfloat16"},
    "YuanchengXu/AutoregressiveRM-tulu2-7b": {
        **LLAMA_7B,
        **{"vocab_size": 32001, "tokenizer": "llama-pad", "dtype": "bfloat16"},
    },
    "HuggingFaceH4/mistral-7b-sft-beta": MISTRAL_7B,
    "HuggingFaceH4/zephyr-7b-beta": MISTRAL_7B,
    "huggyllama/llama-7b": LLAMA_7B | _LLAMA_1,
    "huggyllama/llama-13b": LLAMA_13B | _LLAMA_1,
    "meta-llama/Llama-2-7b-hf": LLAMA_7B,
    "meta-llama/Llama-2-7b-chat-hf": LLAMA_7B,
    "meta-llama/Llama-2-13b-hf": LLAMA_13B,
    "meta-llama/Llama-2-70b-hf": LLAMA_70B,
    "codellama/CodeLlama-7b-Python-hf": LLAMA_7B | {"max_position_embeddings": 16384},
    "path/of/llama2-7b-tuned-on-gsm": LLAMA_7B,
    "path/of/llama2-7b-tuned-on-tofu": LLAMA_7B,
    "path/of/llama2-7b-unlearned": LLAMA_7B,
    "path/of/llama2-13b-tuned-on-tofu": LLAMA_13B,
    "openai-community/gpt2-large": GPT2_LARGE,
    "path/of/experts/toxicity/large/finetuned_gpt2_nontoxic": GPT2_LARGE,
    "path/of/experts/toxicity/large/finetuned_gpt2_toxic": GPT2_LARGE,
    "meta-llama/Llama-3.1-70B": LLAMA_70B | _LLAMA_3,
    "meta-llama/Llama-3.2-1B": LLAMA_3_1B,
}
"""Published values of config.json; of models that are not public, those of what they were before
they were tuned."""


class StandIns:
    """A hub's cache in *root*, and under *root* the local directories `path/of/…`."""

    def __init__(self, root: Path) -> None:
        self.root, self.cache = root, root / "hub"

    def write(self, model: str) -> None:
        """Write one of `MODELS`; files that several of them have are written once."""
        directory = self._directory(model)
        directory.mkdir(parents=True)
        values = dict(MODELS[model])
        tokenizer = self._tokenizer(values.pop("tokenizer"))
        for file in (*tokenizer.iterdir(), *self._checkpoint(values).iterdir()):
            os.link(file, directory / file.name)

    def _directory(self, model: str) -> Path:
        if model.startswith("path/"):
            return self.root / model
        repository = self.cache / f"models--{model.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs/main").write_text(COMMIT)
        return repository / "snapshots" / COMMIT

    def _tokenizer(self, name: str) -> Path:
        directory = self.root / "tokenizers" / name
        if not directory.exists():
            write_tokenizer(directory, *TOKENIZERS[name])
        return directory

    def _checkpoint(self, values: dict[str, Any]) -> Path:
        name = hashlib.sha256(json.dumps(values).encode()).hexdigest()
        directory = self.root / "checkpoints" / name
        if not directory.exists():
            write_checkpoint(directory, **values)
        return directory


def write_tokenizer(directory: Path, ordinary: int, control: tuple[str, ...]) -> None:
    """Write a tokenizer of *ordinary* tokens, bytes among them, and *control* tokens after them."""
    llama = ordinary == 32000
    first = ["<unk>", "<s>", "</s>"] if llama else []
    tokens = [*first, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"token-{i}" for i in range(len(tokens), ordinary)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (*first, *control)])
    end = "</s>" if llama else next(token for token in control if "end" in token)
    named = {} if llama else {"unk_token": end, "pad_token": end}  # or the family's defaults
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, **named)
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)


def write_checkpoint(directory: Path, family: str, **values: Any) -> None:
    """Write config.json, and a safetensors file with names and shapes, tied tensors once.

    One that sees also has an image processor.
    """
    config, sees = AutoConfig.for_model(family, **values), "vision_config" in values
    with torch.device("meta"):
        model = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_config(config)
    if sees:
        Qwen2VLImageProcessor(size=PIXELS).save_pretrained(directory)
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    shapes = {name: [*tensor.shape] for name, tensor in model.named_parameters()}
    write_hole(directory / "model.safetensors", shapes, values["dtype"])


def write_hole(file: Path, shapes: dict[str, list[int]], dtype: str) -> None:
    """Write a safetensors file whose data is a hole: it takes no room on a disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + torch.Size(shape).numel() * getattr(torch, dtype).itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
    written = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(written).to_bytes(8, "little") + written)
        out.truncate(8 + len(written) + end)
