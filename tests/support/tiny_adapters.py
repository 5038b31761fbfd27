"""PEFT adapters of tiny models: written by PEFT itself, with random weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from support.reference import auto_class


def load_model(path: Path) -> PreTrainedModel:
    return auto_class(str(path)).from_pretrained(path, dtype=torch.float32)


def write_adapter(model: Path, path: Path, **config: Any) -> Path:
    """Write an adapter of random weights for *model* to *path* and return it."""
    torch.manual_seed(3)
    adapted = get_peft_model(load_model(model), LoraConfig(**{"r": 4, "lora_alpha": 6, **config}))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            # PEFT starts B at zero; a lost one would go unseen.
            torch.nn.init.normal_(parameter, std=0.3)
            if "magnitude" in name:
                parameter.data.abs_().add_(0.5)
    adapted.save_pretrained(path)
    return path


def adapted_by_peft(model: Path, adapter: Path) -> PeftModel:
    """Return the model with the saved *adapter*, in float32, whose product is added."""
    return PeftModel.from_pretrained(load_model(model), adapter).eval()


def merged_by_peft(model: Path, adapter: Path) -> PreTrainedModel:
    """Return what PEFT makes of the saved *adapter*, in float32."""
    return adapted_by_peft(model, adapter).merge_and_unload()


def edit_config(adapter: Path, **values: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_weights(adapter: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
