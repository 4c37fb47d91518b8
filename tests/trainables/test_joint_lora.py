"""Adapters of one input, computed together, are the plain formula with autograd's gradients."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastppt.families.attention import Projections
from fastppt.trainables.lora import LoraAdapters
from fastppt.trainables_config import LoraConfig
from fastppt_kernels.testing import ForbidHostReads

INPUT, OUTPUT = 24, 20
ALL = (True, True, True)
CHOICES = [
    flags for n in (1, 2, 3) for flags in itertools.product((False, True), repeat=n) if any(flags)
]


def make_group(
    count: int, *, bias: bool = True, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> Projections:
    generator = torch.Generator().manual_seed(count)
    linears = []
    for _ in range(count):
        linear = nn.Linear(INPUT, OUTPUT, bias=bias, dtype=torch.float64).requires_grad_(False)
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).double())
        linears.append(linear.to(device, dtype))
    return Projections(tuple(f"to_{place}" for place in range(count)), tuple(linears))


def adapt(
    group: Projections,
    adapted: Sequence[bool],
    *,
    rank: int = 4,
    alpha: float = 6.0,
    dtype: torch.dtype = torch.float64,
) -> LoraAdapters:
    """Adapters with values that are zero nowhere."""
    targets = [name for name, flag in zip(group.names, adapted, strict=True) if flag]
    config = LoraConfig(rank=rank, alpha=alpha, targets=targets)
    device = group.linears[0].weight.device
    adapters = LoraAdapters([group], config, seed=0, device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    for pair in adapters.pairs:
        pair.up.copy_(torch.randn(pair.up.shape, generator=generator))
    adapters.refresh()
    return adapters


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def wanted_of(
    adapters: LoraAdapters, group: Projections, inputs: Tensor, weights: Sequence[Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs x (W + s B A)^T + b and the gradients of sum_i <y_i, w_i>, in float64."""
    inputs = inputs.detach().double().requires_grad_()
    leaves: dict[str, Tensor] = {"inputs": inputs}
    outputs = []
    pairs = {pair.name: pair for pair in adapters.pairs}
    for name, linear in zip(group.names, group.linears, strict=True):
        weight = linear.weight.detach().double()
        if name in pairs:
            down = leaves[f"{name}.down"] = pairs[name].down.double().clone().requires_grad_()
            up = leaves[f"{name}.up"] = pairs[name].up.double().clone().requires_grad_()
            weight = weight + pairs[name].scale * up @ down
        bias = 0 if linear.bias is None else linear.bias.double()
        outputs.append(inputs @ weight.T + bias)
    loss = sum((output * w.double()).sum() for output, w in zip(outputs, weights, strict=True))
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return [output.detach() for output in outputs], dict(zip(leaves, grads, strict=True))


def run(group: Projections, inputs: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of the group; the gradients of sum_i <y_i, w_i> are added where they belong."""
    outputs = group(inputs)
    sum((output * w).sum() for output, w in zip(outputs, weights, strict=True)).backward()
    return [output.detach() for output in outputs]


def grads_of(adapters: LoraAdapters) -> dict[str, Tensor]:
    """The gradients of the pairs, cut out of the flat gradient at the pairs' own places."""
    return {
        f"{pair.name}.{side}": adapters.arena.grad.as_strided(
            view.shape, view.stride(), view.storage_offset()
        )
        for pair in adapters.pairs
        for side, view in (("down", pair.down), ("up", pair.up))
    }


def assert_agree(given: Tensor, wanted: Tensor, tolerance: float, what: str = "") -> None:
    assert given.shape == wanted.shape, what
    error = (given.double() - wanted.double()).abs().max() / wanted.double().abs().max()
    assert error <= tolerance, f"{what}: {error:.1e}"


def check(
    adapters: LoraAdapters,
    group: Projections,
    inputs: Tensor,
    tolerance: float,
    *,
    batch: Sequence[int] = (2, 7),
) -> None:
    weights = [draw(*batch, OUTPUT, seed=9 + i).to(inputs) for i in range(len(group.linears))]
    outputs = run(group, inputs, weights)
    wanted_outputs, wanted_grads = wanted_of(adapters, group, inputs, weights)
    for place, (output, wanted) in enumerate(zip(outputs, wanted_outputs, strict=True)):
        assert_agree(output, wanted, tolerance, f"output {place}")
    given = grads_of(adapters)
    if inputs.requires_grad:
        given["inputs"] = inputs.grad
    else:
        wanted_grads.pop("inputs")
    assert given.keys() == wanted_grads.keys()
    for name, grad in given.items():
        assert_agree(grad, wanted_grads[name], tolerance, name)


@pytest.mark.parametrize("adapted", CHOICES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_values_and_gradients_are_those_of_the_formula(
    adapted: tuple[bool, ...], bias: bool, needs_grad: bool
) -> None:
    group = make_group(len(adapted), bias=bias)
    adapters = adapt(group, adapted)
    check(adapters, group, draw(2, 7, INPUT).requires_grad_(needs_grad), 1e-12)


@pytest.mark.parametrize("rank", [1, 3, 32, 128])
@pytest.mark.parametrize("batch", [(1,), (1, 1), (63,), (3, 5), (2, 3, 4)])
def test_any_rank_and_any_number_of_rows(rank: int, batch: tuple[int, ...]) -> None:
    group = make_group(3)
    adapters = adapt(group, ALL, rank=rank)
    check(adapters, group, draw(*batch, INPUT).requires_grad_(), 1e-12, batch=batch)


@pytest.mark.parametrize("kind", ["transposed", "sliced", "strided", "expanded"])
def test_inputs_of_any_strides(kind: str) -> None:
    inputs = {
        "transposed": lambda: draw(2, INPUT, 7).mT,
        "sliced": lambda: draw(2, 11, INPUT)[:, 3:10],
        "strided": lambda: draw(2, 7, 2 * INPUT)[..., ::2],
        "expanded": lambda: draw(2, 1, INPUT).expand(2, 7, INPUT),
    }[kind]()
    assert not inputs.is_contiguous()
    group = make_group(3)
    adapters = adapt(group, ALL)
    check(adapters, group, inputs.detach().requires_grad_(), 1e-12)


@pytest.mark.parametrize(
    ("dtype", "master", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 2e-2),
        (torch.float16, torch.float32, 2e-3),
        (torch.float64, torch.float32, 1e-6),
    ],
)
def test_other_dtypes_stay_near_float64(
    dtype: torch.dtype, master: torch.dtype, tolerance: float
) -> None:
    group = make_group(3, dtype=dtype)
    adapters = adapt(group, ALL, dtype=master)
    assert adapters.arena.grad.dtype == master
    check(adapters, group, draw(2, 7, INPUT).to(dtype).requires_grad_(), tolerance)


@pytest.mark.parametrize(
    ("dtype", "master", "tolerance"),
    [(torch.float64, torch.float64, 1e-12), (torch.bfloat16, torch.float32, 2e-2)],
)
def test_gradients_of_several_passes_add_up_in_place(
    dtype: torch.dtype, master: torch.dtype, tolerance: float
) -> None:
    group = make_group(3, dtype=dtype)
    adapters = adapt(group, ALL, dtype=master)
    addresses = [tensor.grad.data_ptr() for tensor in adapters.arena.tensors]
    weights = [draw(2, 7, OUTPUT, seed=9 + i).to(dtype) for i in range(3)]
    total: dict[str, Tensor] = {}
    for seed in (1, 2):
        inputs = draw(2, 7, INPUT, seed=seed).to(dtype)
        run(group, inputs, weights)
        for name, grad in wanted_of(adapters, group, inputs, weights)[1].items():
            total[name] = total.get(name, 0) + grad
    for name, grad in grads_of(adapters).items():
        assert_agree(grad, total[name], tolerance, name)
    assert [tensor.grad.data_ptr() for tensor in adapters.arena.tensors] == addresses


def test_gradient_of_a_scaled_loss_is_scaled() -> None:
    """As float16 has it: a power of two changes no digit."""
    grads = []
    for scale in (1.0, 2.0**9):
        group = make_group(3, dtype=torch.float16)
        adapters = adapt(group, ALL, dtype=torch.float32)
        weights = [scale * draw(2, 7, OUTPUT, seed=9 + i).half() / 64 for i in range(3)]
        run(group, draw(2, 7, INPUT).half(), weights)
        grads.append(adapters.arena.grad / scale)
    assert_agree(grads[1], grads[0], 1e-3)
    assert grads[0].abs().max() > 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_pass_gives_the_same_gradients(use_reentrant: bool) -> None:
    grads = []
    for recompute in (False, True):
        first, second = make_group(3), make_group(1)
        adapters = adapt(first, ALL)
        others = adapt(second, (True,))

        def block(
            inputs: Tensor, first: Projections = first, second: Projections = second
        ) -> Tensor:
            query, key, value = first(inputs)
            (output,) = second(_widen(query * key.sigmoid() + value))
            return output

        inputs = draw(2, 7, INPUT).requires_grad_()
        output = (
            checkpoint(block, inputs, use_reentrant=use_reentrant) if recompute else block(inputs)
        )
        output.square().sum().backward()
        grads.append([adapters.arena.grad.clone(), others.arena.grad.clone(), inputs.grad])
    assert all(map(torch.equal, *grads))
    assert all(grad.abs().max() > 0 for grad in grads[0])


def _widen(values: Tensor) -> Tensor:
    return nn.functional.pad(values, (0, INPUT - OUTPUT))


@pytest.mark.parametrize("adapted", [ALL, (True, False, True), (True,)], ids=str)
def test_compiled_code_takes_the_formula_and_agrees(adapted: tuple[bool, ...]) -> None:
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        group = make_group(len(adapted))
        adapters = adapt(group, adapted)
        call = torch.compile(group, backend="aot_eager", fullgraph=True) if compiled else group
        inputs = draw(2, 7, INPUT).requires_grad_()
        addresses = [tensor.grad.data_ptr() for tensor in adapters.arena.tensors]
        for _ in range(2):
            outputs = call(inputs)
            sum(output.square().sum() for output in outputs).backward()
        assert [tensor.grad.data_ptr() for tensor in adapters.arena.tensors] == addresses
        results.append([*(o.detach() for o in outputs), inputs.grad, adapters.arena.grad.clone()])
    for eager, other in zip(*results, strict=True):
        assert_agree(other, eager, 1e-12)


def test_second_derivative_is_refused() -> None:
    group = make_group(3)
    adapt(group, ALL)
    inputs = draw(2, 7, INPUT).requires_grad_()
    loss = sum(output.square().sum() for output in group(inputs))
    (grad,) = torch.autograd.grad(loss, inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


class Operators(TorchDispatchMode):
    """Notes what is dispatched, but for views and allocations, which launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func is not torch.ops.aten.empty_like.default:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("needs_grad", [False, True])
def test_pass_has_no_operators_but_its_products(needs_grad: bool) -> None:
    group = make_group(3)
    adapt(group, ALL)
    inputs = draw(2, 7, INPUT).requires_grad_(needs_grad)
    with Operators() as forward:
        outputs = group(inputs)
    assert forward.names == ["mm", "addmm", "baddbmm_"]
    grads = [torch.ones_like(output) for output in outputs]
    with Operators() as backward:
        torch.autograd.backward(outputs, grads)
    to_inputs = ["mm", "addmm_"] if needs_grad else []
    assert backward.names == ["cat", "baddbmm_", "baddbmm_", "addmm_", *to_inputs]


def test_pass_of_one_linear_has_no_products_of_batches() -> None:
    group = make_group(1)
    adapt(group, [True])
    inputs = draw(2, 7, INPUT).requires_grad_()
    with Operators() as forward:
        (output,) = group(inputs)
    assert forward.names == ["mm", "addmm", "addmm_"]
    grad = torch.ones_like(output)
    with Operators() as backward:
        output.backward(grad)
    assert backward.names == ["addmm_", "addmm_", "addmm_", "mm", "addmm_"]


def test_base_pass_has_the_product_of_the_base_alone() -> None:
    group = make_group(3, dtype=torch.bfloat16)
    adapters = adapt(group, ALL, dtype=torch.float32)
    inputs = draw(2, 7, INPUT).bfloat16()
    with Operators() as operators, adapters.switch.base():
        outputs = group(inputs)
    assert operators.names == ["addmm"]
    for output, linear in zip(outputs, group.linears, strict=True):
        assert torch.equal(output, linear(inputs))


def test_tuned_pass_with_ups_of_zero_is_the_base_pass() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        group = make_group(3, dtype=dtype)
        adapters = adapt(group, ALL, dtype=torch.float32)
        for pair in adapters.pairs:
            pair.up.zero_()
        adapters.refresh()
        inputs = draw(7, INPUT).to(dtype)
        tuned = group(inputs)
        with adapters.switch.base():
            base = group(inputs)
        assert all(map(torch.equal, tuned, base))


def test_joined_weights_are_the_modules_own_parameters() -> None:
    group = make_group(3)
    before = [(linear.weight.clone(), linear.bias.clone()) for linear in group.linears]
    parameters = [linear.weight for linear in group.linears]
    adapters = adapt(group, ALL)
    for linear, (weight, bias), parameter in zip(group.linears, before, parameters, strict=True):
        assert linear.weight is parameter
        assert torch.equal(linear.weight, weight) and torch.equal(linear.bias, bias)
        assert linear.weight.is_contiguous() and not linear.weight.requires_grad
    # What is loaded into the module afterwards is what base passes see.
    group.linears[1].load_state_dict({"weight": 2 * before[1][0], "bias": 3 * before[1][1]})
    inputs = draw(7, INPUT)
    with adapters.switch.base():
        _, output, _ = group(inputs)
    assert_agree(output, inputs @ (2 * before[1][0]).T + 3 * before[1][1], 1e-14)


def test_narrow_network_sees_new_adapters_as_they_start() -> None:
    group = make_group(3, dtype=torch.bfloat16)
    config = LoraConfig(rank=2)
    adapters = LoraAdapters([group], config, seed=0, device=torch.device("cpu"))
    assert adapters.arena.flat.any()
    assert torch.equal(adapters.arena.working_copy, adapters.arena.flat.detach().bfloat16())


def test_narrow_network_sees_new_values_after_a_refresh() -> None:
    group = make_group(3, dtype=torch.bfloat16)
    adapters = adapt(group, ALL, dtype=torch.float32)
    inputs = draw(7, INPUT).bfloat16()
    with torch.no_grad():
        before = group(inputs)
        adapters.arena.flat.mul_(2)
        assert all(map(torch.equal, group(inputs), before))
        adapters.refresh()
        assert not any(map(torch.equal, group(inputs), before))


def test_network_in_the_adapters_dtype_needs_no_copy() -> None:
    group = make_group(3, dtype=torch.float32)
    adapters = adapt(group, ALL, dtype=torch.float32)
    assert adapters.arena.working_copy is None
    for trained, working in zip(adapters.arena.tensors, adapters.arena.working, strict=True):
        assert trained.data_ptr() == working.data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapted", [ALL, (True, False, True), (False, True), (True,)], ids=str)
def test_gpu_agrees_with_float64(dtype: torch.dtype, adapted: tuple[bool, ...]) -> None:
    group = make_group(len(adapted), dtype=dtype, device="cuda")
    adapters = adapt(group, adapted, dtype=torch.float32)
    inputs = draw(2, 7, INPUT).to("cuda", dtype).requires_grad_()
    check(adapters, group, inputs, 2e-2 if dtype == torch.bfloat16 else 3e-3)


@pytest.mark.gpu
def test_gpu_gradients_of_adapters_are_not_rounded_to_16_bits() -> None:
    """A product of ones and one small number, of which a 16-bit total would lose the small one."""
    group = make_group(1, dtype=torch.bfloat16, device="cuda")
    adapters = adapt(group, (True,), dtype=torch.float32, rank=1, alpha=1.0)
    adapters.arena.grad.fill_(1.0)
    (pair,) = adapters.pairs
    pair.down.fill_(1.0)
    adapters.refresh()
    inputs = torch.zeros(1, INPUT, device="cuda", dtype=torch.bfloat16)
    inputs[0, 0] = 1.0
    (output,) = group(inputs)
    output.backward(torch.full_like(output, 2.0**-12))
    up_grad = grads_of(adapters)[f"{pair.name}.up"]
    assert torch.equal(up_grad, torch.full_like(up_grad, 1 + 2.0**-12))


@pytest.mark.gpu
def test_gpu_replayed_pass_adds_the_gradients_of_an_eager_one() -> None:
    group = make_group(3, dtype=torch.bfloat16, device="cuda")
    adapters = adapt(group, ALL, dtype=torch.float32)
    inputs = draw(2, 7, INPUT).to("cuda", torch.bfloat16).requires_grad_()
    inputs.grad = torch.zeros_like(inputs)
    weights = [draw(2, 7, OUTPUT, seed=9 + i).to(inputs) for i in range(3)]

    def one_pass() -> None:
        sum((o * w).sum() for o, w in zip(group(inputs), weights, strict=True)).backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), ForbidHostReads():
        one_pass()
        one_pass()
    torch.cuda.current_stream().wait_stream(stream)
    eager = adapters.arena.grad.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one_pass()
    adapters.arena.grad.zero_()
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(adapters.arena.grad, eager)
    assert eager.abs().max() > 0
