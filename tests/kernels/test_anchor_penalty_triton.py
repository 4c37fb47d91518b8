"""The kernels of the anchor penalty: on a GPU, or in Triton's interpreter, a process of its own."""

import itertools

import pytest
import torch

from fastppt_kernels import anchor_penalty_, launch
from fastppt_kernels.anchor_penalty import op
from fastppt_kernels.anchor_penalty.reference import anchor_penalty_reference
from fastppt_kernels.testing import (
    HAS_GPU,
    INTERPRETED,
    ForbidHostReads,
    GuardedTensors,
    check_stored,
    run_in_interpreter,
)

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")]
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")

WEIGHT = 0.37
BLOCK = op.CHUNK_SIZE
SIZES = [1, 7, 63, 64, 65, 1000, BLOCK, BLOCK + 1, 2 * BLOCK + 17]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(
    params=[pytest.param("cpu", marks=needs_interpreter), pytest.param("cuda", marks=needs_gpu)]
)
def device(request):
    return request.param


@pytest.fixture
def _poisoned_scratch():
    """Fill every torch.empty with NaN."""
    # As a warning: cuBLAS, which the references use, refuses without a setting of its own.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(INTERPRETED, reason="is the interpreter")
def test_the_kernels_pass_in_the_interpreter():
    run_in_interpreter(__file__)


class Lists:
    """Lists for the op, each tensor between guards."""

    def __init__(self, device, sizes=SIZES, dtypes=(torch.float32,) * 3, none_at=(), shift=0):
        self.guarded = GuardedTensors(device)
        per_size = dtypes if isinstance(dtypes, list) else [dtypes] * len(sizes)
        made = [
            [self.guarded.draw(size, dtype, shift) for dtype in of_size]
            for size, of_size in zip(sizes, per_size, strict=True)
        ]
        self.params, anchors, self.grads = map(list, zip(*made, strict=True))
        self.anchors = [None if i in none_at else a for i, a in enumerate(anchors)]

    def check(self, run=anchor_penalty_, weight=WEIGHT):
        """Compare to float64: 1 ulp of what is stored and 1e-6 of the update."""
        old = [grad.clone() for grad in self.grads]
        read = [t for t in (*self.params, *self.anchors) if t is not None]
        before = [t.clone() for t in read]
        penalty = run(self.params, self.anchors, self.grads, weight)
        wanted_penalty, updates = anchor_penalty_reference(self.params, self.anchors, float(weight))
        torch.testing.assert_close(penalty.double(), wanted_penalty, rtol=1e-6, atol=0)
        wanted = [grad.double() + update for grad, update in zip(old, updates, strict=True)]
        check_stored(self.grads, old, wanted, elementwise=True)
        assert not any(map(torch.equal, self.grads, old))
        assert all(map(torch.equal, read, before))
        self.guarded.check()


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "off the alignment"])
@pytest.mark.parametrize("none_at", [(), (0, 4, 8)], ids=["anchors", "some None"])
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.usefixtures("_poisoned_scratch")
def test_updates_and_penalty_equal_the_reference(device, dtype, none_at, shift):
    Lists(device, dtypes=(dtype,) * 3, none_at=none_at, shift=shift).check()


def test_each_tensor_of_a_list_may_have_dtypes_of_its_own(device):
    mixes = list(itertools.product(DTYPES, repeat=3))
    Lists(device, [200 + i for i in range(len(mixes))], mixes, none_at=(4, 20)).check()


def test_tensor_weight_is_the_float_weight(device):
    for dtype in (torch.float32, torch.float64):
        Lists(device).check(weight=torch.tensor(WEIGHT, dtype=dtype, device=device))


def test_without_grads_only_the_penalty_is_computed(device):
    lists = Lists(device, none_at=(2,))
    alone = anchor_penalty_(lists.params, lists.anchors, None, WEIGHT)
    assert torch.equal(alone, anchor_penalty_(lists.params, lists.anchors, lists.grads, WEIGHT))


def test_two_runs_are_equal(device):
    runs = []
    for _ in range(2):
        lists = Lists(device)
        penalty = anchor_penalty_(lists.params, lists.anchors, lists.grads, WEIGHT)
        runs.append([penalty, *lists.grads])
    assert all(map(torch.equal, *runs))


def test_nothing_is_left_of_empty_tensors(device):
    params = [torch.ones(0, 4, device=device)]
    assert anchor_penalty_(params, [None], params, WEIGHT) == 0
    lists = Lists(device, [7])
    empty = torch.ones(0, device=device)
    penalty = anchor_penalty_(
        [empty, *lists.params], [None, *lists.anchors], [empty.clone(), *lists.grads], WEIGHT
    )
    assert torch.equal(penalty, anchor_penalty_(lists.params, lists.anchors, None, WEIGHT))


def test_float64_takes_the_plain_path(device):
    params = [torch.randn(9, device=device, dtype=torch.float64)]
    penalty = anchor_penalty_(params, [None], None, WEIGHT)
    assert penalty.dtype == torch.float64
    torch.testing.assert_close(penalty, WEIGHT * params[0].square().sum())


def test_a_repeated_call_builds_no_table(device, monkeypatch):
    lists = Lists(device)
    anchor_penalty_(lists.params, lists.anchors, lists.grads, WEIGHT)
    monkeypatch.setattr(launch, "build_chunk_rows", None)
    with ForbidHostReads():
        anchor_penalty_(lists.params, lists.anchors, lists.grads, WEIGHT)
    with pytest.raises(TypeError):
        anchor_penalty_(lists.params, lists.grads, None, WEIGHT)


def plant(monkeypatch, column, change):
    """Spoil a column of the table of chunks."""

    def spoiled(*arguments):
        table = launch.chunk_table(*arguments).clone()
        table[:, column] = change(table[:, column])
        return table

    monkeypatch.setattr(op, "chunk_table", spoiled)


FAULTS = {
    "anchor ignored": (1, torch.zeros_like),
    "mask one too wide": (3, lambda count: count + 1),
    "mask one too narrow": (3, lambda count: count - 1),
    "grad read for anchor's dtype": (4, lambda code: code & ~(3 << launch.ACCESS_SHIFT) | 1 << 2),
}


@pytest.mark.parametrize(("column", "change"), FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_in_the_table_turns_the_comparison_red(device, monkeypatch, column, change):
    # Not aligned: a chunk of one element more keeps within its block.
    sizes = [7, 63, 1000]
    Lists(device, sizes, shift=1).check()
    plant(monkeypatch, column, change)
    with pytest.raises(AssertionError):
        Lists(device, sizes, shift=1).check()


@pytest.mark.parametrize("factor", [-1.0, 0.5], ids=["wrong sign", "factor 2 missing"])
def test_a_planted_fault_in_the_gradient_turns_the_comparison_red(device, factor):
    def planted(params, anchors, grads, weight):
        anchor_penalty_(params, anchors, grads, factor * weight)
        return anchor_penalty_(params, anchors, None, weight)

    with pytest.raises(AssertionError):
        Lists(device).check(planted)


def test_rows_cut_tensors_beyond_2_to_the_31_elements():
    size = 2**31 + 5
    address = 1 << 40
    rows = launch.build_chunk_rows([[address], [0]], [[1], [0]], [size], BLOCK)
    assert len(rows) == -(-size // BLOCK)
    assert rows[-1, 0] == address + 2 * BLOCK * (size // BLOCK)
    assert rows[-1, 2] == size % BLOCK
    assert rows[:, 2].sum() == size
    assert (rows[:, 1] == 0).all()


def test_rows_know_the_kind_of_access():
    f32, bf16 = (launch.DTYPE_CODES[d] for d in DTYPES[:2])
    rows = launch.build_chunk_rows(
        [[16, 32, 48, 64], [16, 32, 52, 0]], [[f32, bf16, f32, f32], [f32] * 4], [8] * 4, BLOCK
    )
    assert (rows[:, 3] >> launch.ACCESS_SHIFT).tolist() == [
        launch.ACCESS_ALIGNED_FLOAT32,
        launch.ACCESS_ALIGNED,
        launch.ACCESS_ANY,
        launch.ACCESS_ALIGNED_FLOAT32,
    ]


def test_the_least_recently_used_table_is_dropped(monkeypatch):
    monkeypatch.setattr(launch, "_tables", type(launch._tables)())
    built = []

    def table(number):
        launch.cached_table(
            number, lambda: built.append(number) or torch.ones(1), torch.device("cpu")
        )

    for number in (*range(launch._MAX_TABLES), 0, launch._MAX_TABLES, 0, 1):
        table(number)
    assert built == [*range(launch._MAX_TABLES + 1), 1]


# Rank-r adapters of SDXL's attention: (in, out) and how many.
SDXL = [(640, 640, 50), (1280, 1280, 330), (2048, 640, 20), (2048, 1280, 160)]


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("rank", [4, 32])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_sdxl_adapters_equal_the_reference_and_two_runs_each_other(rank, dtype):
    sizes = [n * rank for i, o, num in SDXL for _ in range(num) for n in (i, o)]
    assert len(sizes) == 1120
    runs = []
    for _ in range(2):
        lists = Lists("cuda", sizes, (dtype,) * 3)
        lists.check()
        runs.append(lists.grads)
    assert all(map(torch.equal, *runs))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_replayed_graph_equals_eager():
    lists, twin = Lists("cuda"), Lists("cuda")
    weight = torch.tensor(WEIGHT, device="cuda")
    zeros = [torch.zeros_like(g) for g in lists.grads]
    anchor_penalty_(lists.params, lists.anchors, lists.grads, weight)
    anchor_penalty_(twin.params, twin.anchors, twin.grads, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        penalty = anchor_penalty_(lists.params, lists.anchors, lists.grads, weight)
    weight.fill_(2 * WEIGHT)
    graph.replay()
    wanted = anchor_penalty_(twin.params, twin.anchors, twin.grads, weight)
    assert torch.equal(penalty, wanted)
    assert all(map(torch.equal, lists.grads, twin.grads))
    with (
        pytest.raises(RuntimeError, match="set_to_none=False"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        anchor_penalty_(lists.params, lists.anchors, zeros, weight)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_nothing_waits_for_the_device():
    lists = Lists("cuda")
    anchor_penalty_(lists.params, lists.anchors, lists.grads, WEIGHT)
    other = Lists("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        # The tables of the second lists are built and copied here.
        anchor_penalty_(other.params, other.anchors, other.grads, WEIGHT)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_a_tensor_beyond_2_to_the_31_elements_is_right_at_both_ends():
    size = 2**31 + 77
    param = torch.zeros(size, dtype=torch.bfloat16, device="cuda")
    grad = torch.zeros_like(param)
    places = [0, 2**31 - 1, 2**31, size - 1]
    param[places] = torch.tensor([1.0, 2.0, 3.0, 4.0], device="cuda").bfloat16()
    penalty = anchor_penalty_([param], [None], [grad], 0.5)
    assert grad[places].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert penalty == 15.0
    assert int(grad.count_nonzero()) == 4
