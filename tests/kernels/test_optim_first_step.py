"""Anchors that the first step takes, and parameters that changed after the optimizer was made."""

import copy
import re

import pytest
import torch

from fastppt_kernels import AnchoredAdamW, optim_groups, optim_settle
from fastppt_kernels.testing import draw_tensors

SHAPES = [(3, 7), (5, 3)]
OPTIONS = {"lr": 1e-2, "anchor_weight": 0.3, "max_grad_norm": 0.5}
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def make_params(seed=0, dtype=F64):
    return [torch.nn.Parameter(v.to(dtype)) for v in draw_tensors(SHAPES, seed=seed)]


def make_optimizer(params, anchor="first_step", **options):
    return AnchoredAdamW(params, anchor=anchor, **OPTIONS | options)


def train(params, optimizer, numbers):
    for number in numbers:
        for param in params:
            param.grad = torch.sin(param.detach().double() * (1 + number)).to(param.dtype)
        optimizer.step()


def write_values(params, values):
    with torch.no_grad():
        for param, value in zip(params, values, strict=True):
            param.copy_(value)


def effective(params):
    return [{"params": params, "form": "effective", "lora_pairs": [(params[0], params[1], 0.7)]}]


@pytest.mark.parametrize("form", ["raw", "decoupled", "effective"])
def test_anchors_are_the_values_that_the_first_step_finds(form):
    late, wanted = make_params(seed=1), make_params(seed=2)
    groups = effective(late) if form == "effective" else late
    optimizer = make_optimizer(groups, form=form)
    assert not optimizer.state
    write_values(late, wanted)
    groups = effective(wanted) if form == "effective" else wanted
    plain = make_optimizer(groups, "start", form=form)
    for number in range(4):
        train(late, optimizer, [number])
        train(wanted, plain, [number])
        assert torch.equal(optimizer.penalty, plain.penalty)
    assert plain.penalty > 0
    assert all(torch.equal(a, b) for a, b in zip(late, wanted, strict=True))
    for param, value in zip(late, make_params(seed=2), strict=True):
        assert torch.equal(optimizer.state[param]["anchor"], value)


def test_the_first_step_takes_the_anchors_of_parameters_without_a_gradient_too():
    params = make_params()
    optimizer = make_optimizer([{"params": [p]} for p in params])
    start = params[1].detach().clone()
    train(params[:1], optimizer, [0])
    write_values(params[1:], [start + 1])
    train(params, optimizer, [1])
    assert torch.equal(optimizer.state[params[1]]["anchor"], start)


@pytest.mark.parametrize("before_first_step", [True, False])
def test_a_resumed_run_keeps_the_anchors_of_its_first_step(before_first_step):
    params = make_params()
    optimizer = make_optimizer(params)
    train(params, optimizer, range(0 if before_first_step else 3))
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = make_optimizer(resumed)
    other.load_state_dict(saved)
    train(params, optimizer, range(3, 6))
    train(resumed, other, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))
    assert torch.equal(other.state[resumed[0]]["anchor"], make_params()[0])


def test_a_state_from_before_the_first_step_is_taken_by_an_optimizer_that_has_started():
    params = make_params()
    saved = make_optimizer(params).state_dict()
    optimizer = make_optimizer(params, "start")
    train(params, optimizer, [0])
    optimizer.load_state_dict(saved)
    now = params[0].detach().clone()
    train(params, optimizer, [1])
    assert optimizer.penalty == 0
    assert torch.equal(optimizer.state[params[0]]["anchor"], now)


def test_a_first_step_is_not_captured(monkeypatch):
    params = make_params()
    optimizer = make_optimizer(params)
    with monkeypatch.context() as patch:
        patch.setattr(optim_groups, "_is_capturing", lambda: True)
        with pytest.raises(ValueError, match="take a step before the capture"):
            train(params, optimizer, [0])
    train(params, optimizer, [0])
    monkeypatch.setattr(optim_groups, "_is_capturing", lambda: True)
    train(params, optimizer, [1])


def test_without_a_weight_nothing_is_kept():
    params = make_params()
    optimizer = make_optimizer(params, anchor_weight=0.0)
    train(params, optimizer, [0])
    assert "anchor" not in optimizer.state[params[0]]


def replace_parameters(optimizer, seed=5):
    """Do what FSDP2 does to a group: others take the parameters' places."""
    params = make_params(seed=seed)
    optimizer.param_groups[0]["params"][:] = params
    return params


@pytest.mark.parametrize("call", ["step", "state_dict"])
@pytest.mark.parametrize("anchor", ["start", "list"])
def test_replaced_parameters_whose_anchors_were_kept_are_refused(anchor, call):
    given = [p.detach() for p in make_params(seed=3)] if anchor == "list" else anchor
    optimizer = make_optimizer(make_params(), given)
    params = replace_parameters(optimizer)
    before = [p.detach().clone() for p in params]
    act = optimizer.state_dict if call == "state_dict" else lambda: train(params, optimizer, [0])
    with pytest.raises(ValueError, match=r'params\[0\]: took the place .* anchor="first_step"'):
        act()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("call", ["step", "state_dict"])
@pytest.mark.parametrize(
    "options", [{"anchor": "first_step"}, {"anchor": "zero"}, {"anchor_weight": 0.0}]
)
def test_replaced_parameters_without_kept_anchors_train_as_if_given(options, call):
    optimizer = make_optimizer(make_params(), **options)
    params, wanted = replace_parameters(optimizer), make_params(seed=5)
    if call == "state_dict":
        optimizer.state_dict()
    plain = make_optimizer(wanted, **options)
    train(params, optimizer, range(3))
    train(wanted, plain, range(3))
    assert all(torch.equal(a, b) for a, b in zip(params, wanted, strict=True))
    assert optimizer.state.keys() == set(params)


def cast(params, dtype):
    for param in params:
        param.data = param.data.to(dtype)


@pytest.mark.parametrize(("old", "new"), [(F32, F64), (F64, BF16)])
def test_parameters_cast_across_float64_are_refused(old, new):
    params = make_params(dtype=old)
    optimizer = make_optimizer(params, "start")
    cast(params, new)
    with pytest.raises(ValueError, match=r"params\[0\]: is .* was changed after .*first_step"):
        train(params, optimizer, [0])


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(("old", "new"), [(F32, F64), (F64, BF16)])
def test_one_parameter_cast_across_float64_is_refused_wherever_it_is(old, new, index):
    params = make_params(dtype=old)
    optimizer = make_optimizer(params, "start")
    train(params, optimizer, [0])
    cast([params[index]], new)
    # As backward passes give them.
    params[index].grad = None
    with pytest.raises(ValueError, match=rf"params\[{index}\]: is .* was changed after"):
        train(params, optimizer, [1])


@pytest.mark.parametrize("index", [0, 1])
def test_a_parameter_of_another_shape_is_refused(index):
    params = make_params()
    optimizer = make_optimizer(params, "start")
    train(params, optimizer, [0])
    shape = tuple(params[index].shape)
    params[index].grad = None
    params[index].data = params[index].data[:2].clone()
    said = re.escape(f"shape {(2, *shape[1:])}, ") + ".*" + re.escape(f"{shape}")
    with pytest.raises(ValueError, match=rf"params\[{index}\]: is .* {said}"):
        train(params, optimizer, [1])


def test_a_group_of_two_dtypes_steps_without_being_settled(monkeypatch):
    params = [*make_params(dtype=F32)[:1], *make_params(dtype=BF16)[1:]]
    optimizer = make_optimizer(params, "start")
    monkeypatch.setattr(optim_settle, "settle", lambda *_: pytest.fail("settled"))
    train(params, optimizer, range(2))


@pytest.fixture
def two_processes(monkeypatch):
    """As torch.distributed answers in one of two processes."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)


def with_zero_bias(seed=0):
    # Its anchor is not kept, so the group's anchors are but those of some parameters.
    return [*make_params(seed), torch.nn.Parameter(torch.zeros(3, dtype=F64))]


@pytest.mark.parametrize("storage", ["device", "host"])
@pytest.mark.parametrize("make", [make_params, with_zero_bias])
def test_values_changed_after_they_became_anchors_are_refused(two_processes, make, storage):
    params = make()
    optimizer = make_optimizer(params, "start", anchor_storage=storage)
    write_values(params[1:2], make(seed=2)[1:2])
    before = [p.detach().clone() for p in params]
    for _ in range(2):
        with pytest.raises(ValueError, match=r'params\[1\]: was changed .*anchor="first_step"'):
            train(params, optimizer, [0])
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("what", ["same", "cast", "list", "first_step", "zero", "one process"])
def test_values_that_may_differ_from_anchors_at_the_first_step_train(
    two_processes, monkeypatch, what
):
    params = make_params(dtype=F32)
    anchor = {"list": [p.detach() + 1 for p in params]}.get(what, what)
    anchor = "start" if what in ("same", "cast", "one process") else anchor
    optimizer = make_optimizer(params, anchor)
    if what == "cast":
        cast(params, BF16)
    elif what not in ("same", "list"):
        write_values(params, make_params(seed=2))
    if what == "one process":
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    train(params, optimizer, range(3))
    assert optimizer.penalty > 0


def test_anchors_are_compared_before_the_first_step_alone(two_processes, monkeypatch):
    def compare(where, group, state):
        compared.append(where)

    params, compared = make_params(), []
    optimizer = make_optimizer(params, "start")
    with monkeypatch.context() as patch:
        patch.setattr(optim_settle, "_compare_starts", compare)
        train(params, optimizer, range(3))
        assert compared == ["param_groups[0]"]
    write_values(params, make_params(seed=2))
    train(params, optimizer, [3])


@pytest.mark.parametrize("is_alone", [True, False])
def test_a_resumed_state_is_not_compared(two_processes, monkeypatch, is_alone):
    params = make_params()
    with monkeypatch.context() as patch:
        if is_alone:
            patch.setattr(torch.distributed, "get_world_size", lambda: 1)
        optimizer = make_optimizer(params, "start")
        train(params, optimizer, range(3))
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = make_optimizer(resumed, "start")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(resumed, other, [3])
    train(params, optimizer, [3])
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))


def test_a_cast_that_random_rounding_is_not_for_is_refused():
    params = make_params(dtype=BF16)
    optimizer = make_optimizer(params, "start", rounding="stochastic")
    cast(params, F32)
    with pytest.raises(ValueError, match="stochastic"):
        train(params, optimizer, [0])


@pytest.mark.parametrize("new", [BF16, F16])
def test_parameters_cast_from_float32_keep_the_anchors_they_had(new):
    params, plain = make_params(dtype=F32), make_params(dtype=F32)
    optimizer = make_optimizer(params, "start")
    cast(params, new)
    starts = [p.detach().clone() for p in plain]
    cast(plain, new)
    train(params, optimizer, range(3))
    train(plain, make_optimizer(plain, starts), range(3))
    assert all(torch.equal(a, b) for a, b in zip(params, plain, strict=True))


@pytest.mark.parametrize("dtype", [F64, BF16])
def test_a_cast_before_the_first_step_is_right_with_anchors_of_the_first_step(dtype):
    params, wanted = make_params(dtype=F32), make_params(dtype=F32)
    optimizer = make_optimizer(params)
    for each in (params, wanted):
        cast(each, dtype)
    train(params, optimizer, range(3))
    train(wanted, make_optimizer(wanted, "start"), range(3))
    assert all(torch.equal(a, b) for a, b in zip(params, wanted, strict=True))


def test_parameters_of_another_shape_are_refused():
    params = make_params()
    optimizer = make_optimizer(params, "start")
    for param in params:
        param.data = param.data.flatten()[:4].clone()
    with pytest.raises(ValueError, match=r"of shape \(4,\), and its moments are .*\(3, 7\)"):
        train(params, optimizer, [0])


def test_a_state_elsewhere_is_brought_to_its_parameters():
    params = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES]
    optimizer = make_optimizer(params, "start")
    for param, state in zip(params, [*optimizer.state.values()], strict=True):
        optimizer.state[param] = {n: torch.zeros_like(t, device="cpu") for n, t in state.items()}
    optim_settle.settle(0, optimizer.param_groups, optimizer.state)
    held = [tensor for state in optimizer.state.values() for tensor in state.values()]
    assert len(held) == 4 * len(params)
    assert {tensor.device.type for tensor in held} == {"meta"}


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ["device", "host"])
@pytest.mark.parametrize("anchor", ["start", "first_step"])
def test_parameters_that_were_moved_take_their_state_along(anchor, storage):
    def run(moves_late):
        net = torch.nn.ParameterList(make_params(dtype=F32))
        if not moves_late:
            net.to("cuda")
        optimizer = make_optimizer(net.parameters(), anchor, anchor_storage=storage)
        net.to("cuda")
        train([*net], optimizer, range(3))
        assert optimizer.penalty > 0
        return [*net]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))
