"""What a step costs, counted instead of timed: products, gathers, bytes allocated."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from support.heads import HIDDEN, ROWS, Triple, by_ranks, rank_of
from support.proxy_models import make_model
from vllm_proxy.config.roles import ROLES
from vllm_proxy.model.controls import ExtraOps
from vllm_proxy.model.fused_product import FEW_ROWS
from vllm_proxy.model.fusion import NUM_CONTROLS, fuse
from vllm_proxy.model.products import compiled_row_product

V = 512
H = sum(HIDDEN.values())
PRODUCTS = {"mm", "addmm", "matmul", "linear", "onednn_mm", "bmm"}


class Work(TorchDispatchMode):
    """Counts operators by name, and the bytes of the storages they make."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        self.operators[operator._schema.name.rpartition("::")[2]] += 1
        given = [*args, *kwargs.values()]
        known = {t.untyped_storage().data_ptr() for t in given if isinstance(t, torch.Tensor)}
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.bytes += storage.nbytes() if storage.data_ptr() not in known else 0
        return result

    @property
    def products(self) -> int:
        return sum(self.operators[name] for name in PRODUCTS)


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    with rank_of(1, 0):
        yield
    torch.set_default_dtype(torch.float32)  # triples set another


@pytest.mark.parametrize("alpha", [1.0, 0.7])
def test_a_step_is_one_product_that_allocates_its_logits_and_its_weighted_rows(alpha):
    triple = Triple((V, V, V), torch.float32, alpha).ready()
    with Work() as work:
        triple.head(triple.hidden_states)
    assert work.products == 1
    logits, rows = 4 * ROWS * V, 4 * ROWS * H
    assert logits <= work.bytes <= logits + rows


def test_a_cast_weight_is_never_whole(monkeypatch):
    """In bfloat16 on a CPU the weight is cast through one small buffer."""
    monkeypatch.setattr("vllm_proxy.model.products.CAST_BYTES", 4 * H * 64)
    triple = Triple((V, V, V), torch.bfloat16, 1.0).ready()
    with Work() as work:
        triple.head(triple.hidden_states)
    logits, rows, buffer = 4 * ROWS * V, 4 * ROWS * H, 4 * H * 64
    assert work.bytes <= logits + 2 * rows + buffer
    assert work.products == V // 64


def test_requests_with_a_strength_of_their_own_cost_no_further_product():
    triple = Triple((V, V, V), torch.float32, 1.0).ready()
    controls = torch.rand(ROWS, 6)
    with Work() as work:
        triple.head(triple.hidden_states, controls)
    assert work.products == 1


def test_ranks_gather_once_a_step(monkeypatch):
    triples, _ = by_ranks(2, (V, V, V), torch.float32, 1.0)
    head, gathers = triples[0].head, []

    def gather(logits: torch.Tensor) -> torch.Tensor:
        gathers.append(tuple(logits.shape))
        return torch.cat([logits, logits], dim=-1)

    monkeypatch.setattr(triples[0].head.projections[0].processor, "_gather_logits", gather)
    head(triples[0].hidden_states)
    assert gathers == [(ROWS, V // 2)]


def test_members_outputs_are_copied_once_into_one_buffer():
    model = make_model()
    ids = torch.tensor([3, 7, 11], dtype=torch.int32)
    with Work() as members:
        for role in model.roles:
            model.member(role)(model.known_ids(role, ids), ids)
    with Work() as work:
        output = model(ids, ids)
    assert work.bytes - members.bytes == output.nbytes
    copies = work.operators["copy_"] - members.operators["copy_"]
    assert copies == len(model.roles) + 1  # and the controls


@pytest.mark.parametrize("columns", [slice(None), slice(64, 192)], ids=["whole", "strided"])
@pytest.mark.slow
def test_few_rows_are_multiplied_by_compiled_code(columns):
    """In float32 all the way, as float64 has it; made once, for every later row."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(V, 256, generator=random).bfloat16()[:, columns]
    rows = torch.randn(FEW_ROWS, weight.shape[1], generator=random)
    product = compiled_row_product(weight)
    with torch._dynamo.config.patch(error_on_recompile=True):
        logits = torch.stack([product(row, weight) for row in rows])
    truth = rows.double() @ weight.double().T
    torch.testing.assert_close(logits.double(), truth, rtol=0, atol=1e-4)


@pytest.fixture
def tiles(request, monkeypatch) -> bool:
    """Whether the CPU says that it has bfloat16 tiles; what is compiled for them runs on any."""
    monkeypatch.setattr("vllm_proxy.model.fused_product.has_bfloat16_tiles", lambda: request.param)
    return request.param


@pytest.mark.parametrize("tiles", [False], indirect=True)
@pytest.mark.parametrize("may_compile", [True, False])
def test_only_few_narrow_rows_are_multiplied_by_compiled_code(may_compile, tiles):
    triple = Triple((V, V, V), torch.bfloat16, 0.7, may_compile=may_compile).ready()
    product, calls = triple.head.product, []
    assert not product.packed
    assert (product.row_product is not None) == may_compile
    if may_compile:
        compiled = product.row_product
        product.row_product = lambda *args: calls.append(1) or compiled(*args)
    whole = triple.head(triple.hidden_states)
    assert not calls
    few = triple.head(triple.hidden_states[:FEW_ROWS])
    assert len(calls) == (FEW_ROWS if may_compile else 0)
    torch.testing.assert_close(few, whole[:FEW_ROWS], rtol=0, atol=1e-3)


@pytest.mark.parametrize("tiles", [True], indirect=True)
@pytest.mark.parametrize("alpha", [1.0, 0.7])
@pytest.mark.slow
def test_all_rows_are_multiplied_by_compiled_code_where_there_are_tiles(alpha, tiles):
    """As float64 has it, for any number of rows, with the weight let go."""
    expert = {"tied": True}
    triple = Triple((V, V, V), torch.bfloat16, alpha, may_compile=True, expert=expert).ready()
    assert triple.head.product.weight.numel() == 0
    embedding = triple.members["expert"].embed_tokens(torch.arange(V))
    torch.testing.assert_close(embedding, triple.weights["expert"])
    members = [triple.logits(role) for role in ROLES]
    formula = fuse(*members, alpha)
    shift = torch.linspace(-1.0, 2.0, ROWS, dtype=torch.float32)
    controls = torch.zeros(ROWS, NUM_CONTROLS, dtype=torch.float32)
    controls[:, 0], controls[:, 1], controls[:, 2], controls[:, 4] = 1.0, shift, -shift, 1.0
    controlled = fuse(*members, shift[:, None])
    with torch.compiler.set_stance("fail_on_recompile"), torch.inference_mode():
        for rows in (1, 2, 3, ROWS):
            part, own = triple.hidden_states[:rows], controls[:rows]
            close = {"rtol": 0, "atol": 2e-5 * formula.abs().max().item()}
            logits = triple.head(part).double()
            torch.testing.assert_close(logits, formula[:rows], **close)
            logits = triple.head(part, own).double()
            torch.testing.assert_close(logits, controlled[:rows], **close)
            logits = triple.head(part, own, ExtraOps(plausibility=True)).double()
            torch.testing.assert_close(logits, controlled[:rows], **close)


@pytest.mark.parametrize("tiles", [True], indirect=True)
@pytest.mark.parametrize(
    ("dtype", "may_compile"), [(torch.float16, True), (torch.bfloat16, False)], ids=str
)
def test_tiles_are_for_compiled_engines_in_bfloat16(dtype, may_compile, tiles):
    product = Triple((V, V, V), dtype, 1.0, may_compile=may_compile).ready().head.product
    assert not product.packed
    assert product.weight.numel() > 0
