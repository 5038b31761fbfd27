"""The bytes of quantized weights, from the checkpoint's headers or from its config."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_ROUTED_EXPERT = re.compile(r"\.experts\.")
# safetensors' names of dtypes that an engine casts to its dtype; others are packed, or are scales.
_CAST = ("F16", "BF16", "F32", "F64")
_SCALE_BITS = 16


def bits_per_weight(config: Mapping[str, Any]) -> float | None:
    """Return the bits per weight of a quantized layer, including scales and zero points.

    Args:
        config: `quantization_config` of config.json.

    Returns:
        The bits; None if the config does not say.
    """
    method = config.get("quant_method", "")
    if method == "bitsandbytes":
        return 4 if config.get("load_in_4bit") else 8
    if method in ("fp8", "fbgemm_fp8"):
        return 8
    if method == "mxfp4":  # a scale of 8 bits for 32 weights
        return 4 + 8 / 32
    groups = [g["weights"] for g in (config.get("config_groups") or {}).values() if g["weights"]]
    weights = max(groups, key=lambda group: group["num_bits"]) if groups else config
    for names in (("num_bits",), ("bits", "w_bit")):
        bits = next((weights[name] for name in names if weights.get(name)), None)
        if bits:
            break
    if not bits:
        return None
    size = weights.get("group_size") or weights.get("q_group_size") or -1
    symmetric = weights.get("symmetric", weights.get("sym", not weights.get("zero_point")))
    zero = 0 if symmetric else bits
    return bits + ((_SCALE_BITS + zero) / size if size > 0 else 0)


def is_routed_expert(name: str) -> bool:
    """Whether a tensor belongs to the routed experts of a mixture-of-experts model."""
    return bool(_ROUTED_EXPERT.search(name))


def stored_bytes(files: Iterable[Path], itemsize: int) -> dict[str, int]:
    """Return name -> bytes in an engine for a checkpoint's tensors, from the files' headers."""
    from math import prod

    from safetensors import safe_open

    sizes = {}
    for file in files:
        # for "pt", memory is reserved for the whole file
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_slice(name)
                kind, count = tensor.get_dtype(), prod(tensor.get_shape())
                cast = kind in _CAST and name.endswith((".weight", ".bias"))
                sizes[name] = count * (itemsize if cast else _bytes(kind))
    return sizes


def _bytes(kind: str) -> int:
    """Return the bytes of one number: safetensors' names end with the number of bits."""
    bits = re.match(r"[A-Z]+(\d+)", kind)
    return max(1, int(bits.group(1)) // 8) if bits else 1
