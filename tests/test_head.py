"""Fused logits beside the formula in float64: vLLM's own layers, no engine.

A rank of a tensor-parallel group of two is had by telling vLLM's layers that they are one.
"""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import nn
from vllm import envs
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from support.heads import HIDDEN, ROWS, Member, Triple, by_ranks, rank_of
from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.request import RequestControl
from vllm_proxy.config.roles import ROLES
from vllm_proxy.model import fused_product, products
from vllm_proxy.model import head as head_module
from vllm_proxy.model.controls import ExtraOps, LogitControls
from vllm_proxy.model.fusion import NUM_CONTROLS, controlled_logits, controls_at, fuse
from vllm_proxy.model.head import ProxyHead
from vllm_proxy.model.proxy_model import NUM_EXTRA_COLUMNS
from vllm_proxy.model.side_by_side import SideBySide

VOCABULARIES = {
    "alike": (512, 512, 512),
    "small members smaller": (500, 430, 449),
    "small members larger": (430, 500, 512),
    "a shard that a member lacks": (512, 200, 512),
}
ALL_EXTRA_OPS = ExtraOps(adaptive=True, top_p=True, plausibility=True)


@pytest.fixture(autouse=True)
def restore_default_dtype() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    with rank_of(1, 0):
        yield


def assert_formula(triple: Triple, logits: torch.Tensor, coefficients, atol=1e-4, **configs):
    shared = min(triple.sizes.values())
    weights = torch.as_tensor(coefficients, dtype=torch.float64).expand(ROWS, 3)
    truth = sum(
        weights[:, i, None] * triple.logits(role, **configs.get(role, {}))
        for i, role in enumerate(ROLES)
    )
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits[:, :shared].double(), truth, rtol=0, atol=atol)
    assert (logits[:, shared:] == float("-inf")).all()


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0, -2.0])
@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_is_the_reference(monkeypatch, dtype, is_fused, alpha):
    """`fuse` in float64, from the same hidden states and weights.

    The product rounds once, in float32: 1e-5 of logits of up to 60. In bfloat16 it splits rows
    into halves of 16 bits, which adds about as much. The members' own heads round to bfloat16.
    """
    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", not is_fused)
    triple = Triple(VOCABULARIES["alike"], dtype, alpha).ready()
    assert (triple.head.product is not None) == is_fused
    reference = fuse(*(triple.logits(role) for role in ROLES), alpha)
    atol = 0.5 if dtype == torch.bfloat16 and not is_fused else 1e-3
    logits = triple.head(triple.hidden_states)
    torch.testing.assert_close(logits.double(), reference, rtol=0, atol=atol)
    if is_fused:
        logits = triple.head.product(triple.hidden_states)
        torch.testing.assert_close(logits.double(), reference, rtol=0, atol=atol)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("sizes", VOCABULARIES.values(), ids=VOCABULARIES)
@pytest.mark.parametrize("fused", [True, False])
def test_ids_are_aligned_whatever_the_vocabularies(monkeypatch, fused, sizes, ranks, tied):
    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", not fused)
    configs = {"expert": {"tied": tied}, "antiexpert": {"tied": tied}}
    triples, logits = by_ranks(ranks, sizes, torch.float32, 0.7, **configs)
    assert [triple.head.product is not None for triple in triples] == [fused] * ranks
    assert_formula(triples[0], logits, (1, 0.7, -0.7))
    if ranks == 1:
        gathered = triples[0].head(triples[0].hidden_states)
        assert gathered.shape == (ROWS, sizes[0])
        torch.testing.assert_close(gathered, logits[:, : sizes[0]])


@pytest.mark.parametrize("sizes", VOCABULARIES.values(), ids=VOCABULARIES)
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        pytest.param(torch.bfloat16, {"may_compile": True}, marks=pytest.mark.slow),
        (torch.float32, {"expert": {"soft_cap": 5.0}}),
    ],
    ids=["float32", "bfloat16", "compiled", "own heads"],
)
def test_a_member_apart_is_what_it_is_alone(sizes, dtype, options):
    """And the others with it are what they are without."""
    triple = Triple(sizes, dtype, 0.7, separate_role="expert", **options).ready()
    configs = {role: options[role] for role in ROLES if role in options}
    atol = 1e-4 if dtype == torch.float32 else 1e-2
    logits = triple.head(triple.hidden_states)
    assert_formula(triple, logits, (1, 0.7, -0.7), atol, **configs)
    part = triple.hidden_states.split(triple.hidden_sizes, dim=-1)[1]
    assert_formula(triple, triple.head.member_logits("expert", part), (0, 1, 0), atol, **configs)
    for role, found in zip(ROLES, triple.head.by_role(triple.hidden_states), strict=True):
        truth = triple.logits(role, **configs.get(role, {}))
        torch.testing.assert_close(found.double(), truth, rtol=0, atol=atol)


@pytest.mark.parametrize("separate_role", ["expert", None])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        pytest.param(torch.bfloat16, {"may_compile": True}, marks=pytest.mark.slow),
        (torch.float32, {"expert": {"soft_cap": 5.0}, "antiexpert": {"soft_cap": 5.0}}),
    ],
    ids=["float32", "bfloat16", "compiled", "own heads"],
)
def test_members_that_are_one_module_have_one_head(monkeypatch, dtype, options, separate_role):
    """Its hidden states are of both, and its weight is there once."""
    monkeypatch.setitem(HIDDEN, "expert", HIDDEN["antiexpert"])
    sizes = (512, 500, 500)
    triple = Triple(sizes, dtype, 0.7, separate_role=separate_role, one_module=True, **options)
    if triple.head.product is not None:
        assert triple.head.product.weight.shape == (512, HIDDEN["base"] + HIDDEN["antiexpert"])
    triple.ready()
    configs = {role: options[role] for role in ROLES if role in options}
    atol = 1e-4 if dtype == torch.float32 else 1e-2
    assert_formula(triple, triple.head(triple.hidden_states), (1, 0.7, -0.7), atol, **configs)
    controls = torch.zeros(ROWS, NUM_CONTROLS, dtype=torch.float32)
    controls[:, :3] = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(1))
    found = triple.head(triple.hidden_states, controls)
    assert_formula(triple, found, controls[:, :3].double(), 3 * atol, **configs)
    for role, logits in zip(ROLES, triple.head.by_role(triple.hidden_states), strict=True):
        truth = triple.logits(role, **configs.get(role, {}))
        torch.testing.assert_close(logits.double(), truth, rtol=0, atol=atol)
    if separate_role:
        part = triple.hidden_states.split(triple.hidden_sizes, dim=-1)[1]
        assert_formula(
            triple, triple.head.member_logits("expert", part), (0, 1, 0), atol, **configs
        )


@pytest.mark.parametrize("config", [{}, {"soft_cap": 5.0}], ids=["fused", "three heads"])
def test_ranks_gather_once(monkeypatch, config):
    gathered = []

    def gather(_: LogitsProcessor, logits: torch.Tensor) -> torch.Tensor:
        gathered.append(logits.shape)
        return torch.cat([logits, logits], dim=-1)

    monkeypatch.setattr(LogitsProcessor, "_gather_logits", gather)
    with rank_of(2, 0):
        triple = Triple((500, 430, 449), torch.float32, 1.0, expert=config).ready()
    logits = triple.head(triple.hidden_states)
    assert gathered == [(ROWS, 256)]
    assert logits.shape == (ROWS, 500)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_may_have_their_own_coefficients(monkeypatch, dtype, fused):
    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", not fused)
    triple = Triple(VOCABULARIES["alike"], dtype, 1.0).ready()
    coefficients = torch.tensor(
        [[1, 1, -1], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0.3, -0.3], [1, -2, 2], [0.5, 1.7, -0.9]]
    )
    off = torch.tensor([0, 1, 0, 0]).expand(ROWS, 4)  # adaptive, top_p, plausibility, lenient
    controls = torch.cat([coefficients, off], dim=-1).float()
    logits = triple.head(triple.hidden_states, controls)
    # The members' own heads round their logits (up to 60) to bfloat16.
    coarse = dtype == torch.bfloat16 and not fused
    assert_formula(triple, logits, coefficients, atol=0.5 if coarse else 1e-4)


@pytest.mark.parametrize("missing", ["expert", "antiexpert"])
@pytest.mark.parametrize("fused", [True, False])
def test_the_base_plays_the_part_of_a_missing_member(monkeypatch, fused, missing):
    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", not fused)
    triple = Triple(VOCABULARIES["small members smaller"], torch.float32, 0.7, **{missing: None})
    triple.ready()
    assert_formula(triple, triple.head(triple.hidden_states), (1, 0.7, -0.7))
    rows = [LogitControls(0.5, 2.0, -1.5)] * ROWS
    controls = controls_at(torch.tensor(rows), torch.zeros(ROWS))
    assert_formula(triple, triple.head(triple.hidden_states, controls), (0.5, 2.0, -1.5))
    controls = controls_at(torch.tensor(CONTROLLED), torch.zeros(ROWS))
    logits = triple.head(triple.hidden_states, controls, ALL_EXTRA_OPS)
    assert_controlled(triple, logits, controls)


CONTROLLED = [
    LogitControls(1.0, 0.7, -0.7),
    LogitControls(1.0, 0.0, 0.0, adaptive=1.0),
    LogitControls(1.0, 1.0, -1.0, top_p=0.6),
    LogitControls(0.0, 1.0, 0.0, plausibility=0.05),
    LogitControls(0.5, 2.0, -1.5, top_p=0.9, plausibility=0.02),
    LogitControls(1.0, 0.0, 0.0, adaptive=1.0, top_p=0.95),
    LogitControls(1.0, 0.0, 0.0, adaptive=1.0, plausibility=0.01),
]


def controlled_among(monkeypatch, triples: list[Triple], controls) -> torch.Tensor:
    """Return the ranks' controlled logits side by side, `[R, V]`.

    Every rank runs twice: for the parts it sends, and then with what all have sent.
    """

    def run(triple: Triple, gather) -> torch.Tensor:
        monkeypatch.setattr(head_module, "tensor_model_parallel_all_gather", gather)
        return triple.head(triple.hidden_states, controls, ALL_EXTRA_OPS, gather=False)

    sent: list[list[torch.Tensor]] = []
    for triple in triples:
        parts: list[torch.Tensor] = []

        def send(part: torch.Tensor, parts=parts) -> torch.Tensor:
            parts.append(part)
            return torch.cat([part] * len(triples), dim=-1)

        run(triple, send)
        sent.append(parts)
    gathered = [torch.cat(parts, dim=-1) for parts in zip(*sent, strict=True)]
    assert bool(gathered) == (len(triples) > 1)
    logits = []
    for triple in triples:
        received = iter(gathered)
        logits.append(run(triple, lambda _, received=received: next(received)))
    return torch.cat(logits, dim=-1)


def assert_controlled(triple: Triple, logits, controls, coarse: bool = False, **configs):
    """Compare with the arithmetic on members' logits that were made in float64.

    Sums in another order move a logit by 1e-5, and an adaptive one by some times that: 1e-3 is
    allowed. If *coarse*, members round their logits (up to 8) to bfloat16, by up to 2 ** -6: so
    does what they are compared with, but an element now and then is rounded the other way, which
    also moves adaptive strengths (0.2 is allowed) and the filters' bounds (by as much).
    """
    shared = min(triple.sizes.values())
    members = [triple.logits(role, **configs.get(role, {})) for role in ROLES]
    if coarse:
        members = [member.bfloat16() for member in members]
    expected = controlled_logits(*(member.float() for member in members), controls, ALL_EXTRA_OPS)
    assert logits.dtype == torch.float32
    assert (logits[:, shared:] == float("-inf")).all()
    logits, atol = logits[:, :shared], 0.2 if coarse else 1e-3
    base = members[0].float()
    kept = expected.isfinite()
    bound = base.masked_fill(~kept, float("inf")).amin(-1, keepdim=True)
    doubtful = (base - bound).abs() < (2**-5 if coarse else 1e-4)
    assert not ((logits.isfinite() != kept) & ~doubtful).any()
    both = logits.isfinite() & kept
    torch.testing.assert_close(logits[both], expected[both], rtol=0, atol=atol)
    filtered = (controls[:, 4] < 1) | (controls[:, 5] > 0)
    assert ((kept.sum(-1) < shared) == filtered).all()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("sizes", VOCABULARIES.values(), ids=VOCABULARIES)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_controlled_rows(monkeypatch, dtype, fused, sizes, ranks):
    """Adaptive and filtered rows: whole vocabularies are summed, however they are split."""
    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", not fused)
    triples, _ = by_ranks(ranks, sizes, dtype, 1.0)
    for triple in triples:
        triple.hidden_states /= 4  # makes logits of up to 8
    assert [triple.head.product is not None for triple in triples] == [fused] * ranks
    controls = controls_at(torch.tensor(CONTROLLED, dtype=torch.float32), torch.zeros(ROWS))
    logits = controlled_among(monkeypatch, triples, controls)
    assert_controlled(triples[0], logits, controls, coarse=dtype == torch.bfloat16 and not fused)
    monkeypatch.setattr(LogitsProcessor, "_gather_logits", lambda *_: logits)
    monkeypatch.setattr(
        head_module, "tensor_model_parallel_all_gather", lambda part: part.repeat(1, 1, ranks)
    )
    gathered = triples[0].head(triples[0].hidden_states, controls, ALL_EXTRA_OPS)
    assert gathered.shape == (ROWS, sizes[0])
    torch.testing.assert_close(gathered, logits[:, : sizes[0]])


@pytest.mark.parametrize("config", [{"soft_cap": 5.0}, {"bias": True}], ids=str)
@pytest.mark.parametrize("ranks", [1, 2])
def test_controlled_rows_of_heads_that_are_more_than_a_product(monkeypatch, ranks, config):
    configs = {"expert": config}
    triples, _ = by_ranks(ranks, VOCABULARIES["alike"], torch.float32, 1.0, **configs)
    for triple in triples:
        triple.hidden_states /= 4
    controls = controls_at(torch.tensor(CONTROLLED), torch.zeros(ROWS))
    logits = controlled_among(monkeypatch, triples, controls)
    assert_controlled(triples[0], logits, controls, **configs)


@pytest.mark.parametrize("ranks", [1, 2])
def test_many_controlled_rows_are_taken_in_parts(monkeypatch, ranks):
    monkeypatch.setattr(head_module, "CONTROLLED_ROWS", 3)
    held = []

    def arithmetic(base: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        held.append(base.shape)
        return controlled_logits(base, *others)

    monkeypatch.setattr(head_module, "controlled_logits", arithmetic)
    triples, _ = by_ranks(ranks, VOCABULARIES["small members smaller"], torch.float32, 1.0)
    controls = controls_at(torch.tensor(CONTROLLED), torch.zeros(ROWS))
    logits = controlled_among(monkeypatch, triples, controls)
    assert held == [(3, 430), (3, 430), (1, 430)] * 2 * ranks
    assert_controlled(triples[0], logits, controls)


def test_members_alone_need_no_low_half(monkeypatch):
    """Where hardware multiplies bfloat16 to float32: ones and zeros are exact factors."""

    def multiply(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        assert rows.dtype == weight.dtype == torch.bfloat16
        assert rows.shape == (3 * ROWS, sum(HIDDEN.values()))
        return (rows.double() @ weight.double().T).float()

    monkeypatch.setattr(fused_product, "MM_TO_FLOAT32", True)
    monkeypatch.setattr(fused_product, "multiply_to_float32", multiply)
    triple = Triple(VOCABULARIES["alike"], torch.bfloat16, 0.7).ready()
    triple.hidden_states /= 4
    controls = controls_at(torch.tensor(CONTROLLED, dtype=torch.float32), torch.zeros(ROWS))
    logits = triple.head(triple.hidden_states, controls, ALL_EXTRA_OPS)
    assert_controlled(triple, logits, controls)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "config",
    [
        {"bias": True},
        {"soft_cap": 5.0},
        {"scale": 0.25},
        {"multiplier": 0.5},
        {"bias": True, "soft_cap": 5.0, "scale": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("role", ROLES)
def test_heads_that_are_more_than_a_product(role, config, ranks):
    triples, logits = by_ranks(
        ranks, VOCABULARIES["small members smaller"], torch.float32, 1.5, **{role: config}
    )
    assert all(triple.head.product is None for triple in triples)
    assert_formula(triples[0], logits, (1, 1.5, -1.5), **{role: config})


class Outputs(nn.Module):
    """A member without layers: random hidden states."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.size, self.dtype = size, dtype

    def forward(self, input_ids: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return torch.randn(len(input_ids), self.size, dtype=self.dtype)


@pytest.mark.parametrize("rows", [[0], [2], [1, 3], range(ROWS)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_head_is_given_is_aligned(dtype, rows):
    """For Marlin's kernels, and for those that take rows to be contiguous (`gptq_gemm`)."""
    triple = Triple(VOCABULARIES["alike"], dtype, 1.0, base={"bias": True}).ready()
    model = SideBySide(
        {role: Outputs(HIDDEN[role], dtype) for role in ROLES},
        roles=ROLES,
        hidden_sizes=triple.hidden_sizes,
        vocab_sizes=triple.sizes,
        max_tokens=ROWS,
        num_columns=NUM_EXTRA_COLUMNS,
        dtype=dtype,
        is_last_rank=True,
    )
    given = []
    for member in triple.members.values():

        def compute(hidden_states: torch.Tensor, compute=member.compute_logits) -> torch.Tensor:
            given.append(hidden_states)
            return compute(hidden_states)

        member.compute_logits = compute
    hidden_states = model(torch.zeros(ROWS, dtype=torch.int), torch.zeros(ROWS, dtype=torch.long))
    picked = hidden_states[list(rows)]
    triple.head(picked[:, : sum(triple.hidden_sizes)])
    triple.head.by_role(picked[:, : sum(triple.hidden_sizes)])
    assert len(given) == 2 * len(ROLES)
    for part in (*given, picked):
        assert part.is_contiguous()
        assert (part.stride(0) % 8, part.data_ptr() % 16) == (0, 0)


def test_float32_head_of_a_bfloat16_model_is_what_the_product_gives():
    triple = Triple(
        VOCABULARIES["alike"], torch.bfloat16, 0.7, base={"head_dtype": torch.float32}
    ).ready()
    assert triple.head.product is not None
    assert_formula(triple, triple.head(triple.hidden_states), (1, 0.7, -0.7))


def test_head_in_another_dtype_is_computed_by_its_member():
    triple = Triple(
        VOCABULARIES["alike"], torch.float32, 1.0, base={"head_dtype": torch.bfloat16}
    ).ready()
    assert triple.head.product is None
    assert_formula(triple, triple.head(triple.hidden_states), (1, 1, -1), atol=0.5)


def test_a_bias_that_comes_with_the_checkpoint_is_not_lost():
    """vLLM's Transformers backend adds a head's bias while it loads it."""
    triple = Triple(VOCABULARIES["alike"], torch.float32, 1.0, expert={"tied": True})
    assert triple.head.product is not None
    layer = triple.members["expert"].lm_head
    layer._register_bias()
    layer.bias.weight_loader(layer.bias, triple.biases["expert"])
    triple.ready()
    assert triple.head.product is None
    logits = triple.head(triple.hidden_states)
    assert_formula(triple, logits, (1, 1, -1), expert={"bias": True})


def test_a_bias_that_the_model_class_leaves_out_is_added():
    """vLLM's class of Phi-3.5 MoE loads one, and does not pass it on."""
    triple = Triple(VOCABULARIES["alike"], torch.float32, 1.0, expert={"bias": True}).ready()
    expert = triple.members["expert"]
    expert.compute_logits = partial(expert.logits_processor, expert.lm_head)
    logits = triple.head(triple.hidden_states)
    assert_formula(triple, logits, (1, 1, -1), expert={"bias": True})


def storages(*modules: nn.Module) -> dict[int, int]:
    """Bytes by storage of all parameters and buffers."""
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def test_head_weights_exist_once():
    sizes = VOCABULARIES["alike"]
    configs = {"antiexpert": {"tied": True}}
    triple = Triple(sizes, torch.bfloat16, 1.0, **configs).ready()
    held = storages(*triple.members.values(), triple.head)
    heads = 512 * sum(HIDDEN.values())
    embeddings = 512 * (HIDDEN["base"] + HIDDEN["expert"])  # the antiexpert's is in its head
    buffers = sum(b.untyped_storage().nbytes() for b in triple.head.buffers())
    assert sum(held.values()) == 2 * (heads + embeddings) + buffers
    ids = torch.tensor([0, 5, 511])
    torch.testing.assert_close(
        triple.members["antiexpert"].embed_tokens(ids), triple.weights["antiexpert"][ids]
    )


def test_float32_weight_on_a_cpu_is_let_go_once_packed():
    triple = Triple(VOCABULARIES["alike"], torch.float32, 1.0, expert={"tied": True}).ready()
    assert triple.head.product.weight.numel() == 0
    lengths = {role: member.lm_head.weight.numel() for role, member in triple.members.items()}
    assert lengths == {"base": 0, "expert": 512 * HIDDEN["expert"], "antiexpert": 0}
    ids = torch.tensor([0, 5, 511])
    torch.testing.assert_close(
        triple.members["expert"].embed_tokens(ids), triple.weights["expert"][ids]
    )


@pytest.mark.parametrize("separate_role", [None, "expert"])
def test_new_weights_of_one_member_are_packed_with_the_others(separate_role):
    triple = Triple(
        *(VOCABULARIES["alike"], torch.float32, 1.0),
        expert={"tied": True},
        separate_role=separate_role,
    ).ready()
    embedding = triple.members["expert"].embed_tokens.weight.data_ptr()
    triple.weights["expert"] = new = torch.randn_like(triple.weights["expert"])
    with triple.head.loading_again():
        triple.members["expert"].lm_head.weight.data.copy_(new)
    assert_formula(triple, triple.head(triple.hidden_states), (1, 1, -1))
    ids = torch.tensor([0, 5, 511])
    torch.testing.assert_close(triple.members["expert"].embed_tokens(ids), new[ids])
    assert triple.members["expert"].embed_tokens.weight.data_ptr() == embedding
    assert triple.head.product.weight.numel() == 0


@pytest.mark.parametrize("alpha", [1.0, 0.7, -2.0, 3.3])
@pytest.mark.parametrize("hardware", ["casts", "mixes"])
def test_bfloat16_product_leaves_in_float32(monkeypatch, hardware, alpha):
    """Within 1e-5 of the largest logit, where three bfloat16 heads are within 1e-2."""
    if hardware == "mixes":  # stands for a GPU's product of bfloat16 operands in float32
        monkeypatch.setattr(fused_product, "MM_TO_FLOAT32", True)
        monkeypatch.setattr(fused_product, "SPLIT_ROWS", 3)
        monkeypatch.setattr(
            fused_product,
            "multiply_to_float32",
            lambda rows, weight: (rows.double() @ weight.double().T).float(),
        )
    monkeypatch.setattr(products, "CAST_BYTES", 100_000)
    triple = Triple(VOCABULARIES["small members smaller"], torch.bfloat16, alpha).ready()
    logits = triple.head(triple.hidden_states)
    largest = logits[logits.isfinite()].abs().max().item()
    assert_formula(triple, logits, (1, alpha, -alpha), atol=1e-5 * largest)


@pytest.mark.parametrize("alpha", [0.7, 3000.0, 4096.0, -1e30])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_strengths_beyond_float16(monkeypatch, dtype, alpha):
    """A float16 ends at 65504: hidden states times a strength go beyond, their halves must not."""
    monkeypatch.setattr(fused_product, "MM_TO_FLOAT32", True)  # as above
    monkeypatch.setattr(
        fused_product,
        "multiply_to_float32",
        lambda rows, weight: (rows.double() @ weight.double().T).float(),
    )
    triple = Triple(VOCABULARIES["alike"], dtype, alpha).ready()
    triple.hidden_states *= 20
    rows = torch.tensor([LogitControls(1, alpha, -alpha)] * ROWS, dtype=torch.float32)
    for controls in (None, controls_at(rows, torch.zeros(ROWS))):
        logits = triple.head(triple.hidden_states, controls)
        largest = logits[logits.isfinite()].abs().max().item()
        assert_formula(triple, logits, (1, alpha, -alpha), atol=1e-5 * largest)


def test_quantized_head_that_cannot_follow_the_base_is_refused():
    class Quantized(QuantizeMethodBase):
        def create_weights(self, *args, **kwargs): ...
        def apply(self, *args, **kwargs): ...

    with rank_of(2, 0):
        members = {role: Member(512, HIDDEN[role]) for role in ROLES}
        members["expert"] = Member(480, HIDDEN["expert"])
        members["expert"].lm_head.quant_method = Quantized()
        sizes = {"base": 512, "expert": 480, "antiexpert": 512}
        with pytest.raises(ProxyConfigError, match=r"expert.*480.*512.*tensor_parallel_size 1"):
            ProxyHead(
                members, list(HIDDEN.values()), sizes, LogitControls.of(RequestControl(alpha=1.0))
            )


def test_model_without_one_head_is_refused():
    members = {role: Member(512, HIDDEN[role]) for role in ROLES}
    members["expert"].second = LogitsProcessor(512)
    with pytest.raises(ProxyConfigError, match="Member has 2 logits processors") as error:
        ProxyHead(
            members,
            list(HIDDEN.values()),
            dict.fromkeys(ROLES, 512),
            LogitControls.of(RequestControl(alpha=1.0)),
        )
    assert error.value.field == "expert"
    assert error.value.remedy is not None
