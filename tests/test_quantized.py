"""The quantized checkpoints of `quantized.py` are what they say: read here another way.

GPTQ and AWQ by their definitions, value by value; compressed-tensors by transformers' own loader.
What engines make of them is `test_exactness.py`.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from support.quantized import GROUP_SIZE, METHODS, MIXED, quantize_activations, write_quantized
from support.tiny_models import write_model

LAYER = "model.layers.0.mlp.down_proj"  # input and output sizes differ
LEFT_ALONE = "model.layers.0.self_attn.o_proj"
IN_PLACE = "w8a8", "fp8", MIXED
"""Methods whose quantized weights of `LAYER` have the name of those that they replace."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Quantized checkpoint and twin by method; head quantized, one layer left alone."""
    root = tmp_path_factory.mktemp("quantized")
    source = write_model(root / "plain", seed=0, hidden_size=64, layers=1)
    written = {"plain": (source, source)}
    for method in (*METHODS, MIXED):
        path, twin = root / method, root / f"{method}-twin"
        head = method != MIXED
        write_quantized(source, path, twin, method, lm_head=head, plain=[LEFT_ALONE])
        written[method] = (path, twin)
    return written


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def nibble(packed: torch.Tensor, position: int) -> int:
    return (int(packed) >> (4 * position)) & 15


def read_gptq(stored: dict[str, torch.Tensor], row: int, column: int) -> float:
    """Weight of output *row* and input *column*: qweight packs inputs, qzeros packs outputs."""
    group = int(stored["g_idx"][column])
    q = nibble(stored["qweight"][column // 8, row], column % 8)
    zero = nibble(stored["qzeros"][group, row // 8], row % 8) + 1  # version 1 of the format
    return (q - zero) * float(stored["scales"][group, row])


def read_awq(stored: dict[str, torch.Tensor], row: int, column: int) -> float:
    """Weight of output *row* and input *column*: both pack outputs, even ones first."""
    group, position = column // GROUP_SIZE, (row % 8) // 2 + 4 * (row % 2)
    q = nibble(stored["qweight"][column, row // 8], position)
    zero = nibble(stored["qzeros"][group, row // 8], position)
    return (q - zero) * float(stored["scales"][group, row])


@pytest.mark.parametrize(("method", "read"), [("gptq", read_gptq), ("awq", read_awq)])
def test_int4_checkpoint_stands_for_its_twin(checkpoints, method, read):
    path, twin = checkpoints[method]
    written = tensors(path)
    for layer in (LAYER, "lm_head"):
        names = [name for name in written if name.startswith(f"{layer}.")]
        stored = {name.rpartition(".")[2]: written[name] for name in names}
        weight = tensors(twin)[f"{layer}.weight"]
        for row in range(0, 64, 3):
            for column in range(0, 64, 5):
                assert read(stored, row, column) == weight[row, column]


@pytest.mark.parametrize("method", ["w4a16", "w8a16", "w8a8", "fp8", MIXED])
def test_compressed_tensors_checkpoint_stands_for_its_twin(checkpoints, method):
    path, twin = checkpoints[method]
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    state = model.state_dict()
    for name, weight in tensors(twin).items():
        torch.testing.assert_close(state[name].float(), weight, rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_twin_is_near_what_was_quantized(checkpoints, method):
    """And differs from it, or the tests of a quantized engine would prove nothing."""
    (source, _), (path, twin) = checkpoints["plain"], checkpoints[method]
    before, after = tensors(source), tensors(twin)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        error = (after[name] - weight).norm() / weight.norm()
        quantized = name.removesuffix(".weight") not in (LEFT_ALONE, "model.embed_tokens") and (
            weight.dim() == 2
        )
        assert 1e-3 < error < 0.2 if quantized else error == 0
    assert f"{LAYER}.weight" not in tensors(path) or method in IN_PLACE
    assert torch.equal(tensors(path)[f"{LEFT_ALONE}.weight"], before[f"{LEFT_ALONE}.weight"])


def test_quantized_activations_are_whole_steps(checkpoints):
    model = AutoModelForCausalLM.from_pretrained(checkpoints["w8a8"][1], dtype=torch.float32)
    quantize_activations(model, "w8a8")
    seen = []
    layer = model.get_submodule(LAYER)
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        model(torch.tensor([[3, 4, 5]]))
    (x,) = seen
    steps = x / (x.abs().amax(-1, keepdim=True) / 127)
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert len(steps[0, 0].round().unique()) > 16
