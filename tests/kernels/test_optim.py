import copy
import math

import pytest
import torch

from fastppt_kernels import AnchoredAdamW, optim_groups
from fastppt_kernels.anchored_adamw import op, plain
from fastppt_kernels.lora_anchor_penalty.op import LoraAnchor
from fastppt_kernels.testing import (
    ForbidHostReads,
    draw_tensors,
    load_mutant,
    make_arena,
    worst_error,
)

STEPS = 20
LR = 1e-2
WEIGHT = 0.05
DECAY = 0.1
MAX_NORM = 0.5
SCALE = 0.7
FORMS = ("raw", "effective", "decoupled")
# A down and an up of each of two pairs.
SHAPES = [(3, 7), (5, 3), (1, 63), (4, 1)]


def make_params(dtype=torch.float64, zero_ups=False):
    values = draw_tensors(SHAPES)
    if zero_ups:
        values = [v * (i % 2 == 0) for i, v in enumerate(values)]
    return [torch.nn.Parameter(v.to(dtype)) for v in values]


def make_targets(seed=1):
    return draw_tensors(SHAPES, seed=seed)


def loss_of(tensors, step):
    """A loss whose gradients differ from step to step."""
    factor = 1 + math.sin(step)
    return sum(
        factor * (t - target.to(t.dtype)).square().mean()
        for t, target in zip(tensors, make_targets(), strict=True)
    )


def pairs_of(tensors, scale=SCALE):
    return [(tensors[0], tensors[1], scale), (tensors[2], tensors[3], scale)]


def make_optimizer(params, form="raw", tensors=None, **options):
    group = {"params": params}
    if form == "effective":
        group["lora_pairs"] = pairs_of(params if tensors is None else tensors)
    options = {
        "lr": LR,
        "weight_decay": DECAY,
        "anchor_weight": WEIGHT,
        "max_grad_norm": MAX_NORM,
    } | options
    return AnchoredAdamW([group], form=form, **options)


def train(params, optimizer, steps=STEPS, tensors=None, first_step=0):
    """Take steps; return the penalties and the norms."""
    seen = []
    for step in range(first_step, first_step + steps):
        optimizer.zero_grad()
        loss_of(params if tensors is None else tensors, step).backward()
        optimizer.step()
        seen.append((optimizer.penalty.item(), optimizer.grad_norm.item()))
    return seen


def oracle_penalty(params, anchors, form, weight):
    if form != "effective":
        return weight * sum((p - a).square().sum() for p, a in zip(params, anchors, strict=True))
    pairs = zip(pairs_of(params), pairs_of(anchors), strict=True)
    return weight * sum(
        (s * up @ down - s * up_0 @ down_0).square().sum()
        for (down, up, s), (down_0, up_0, _) in pairs
    )


def oracle(params, form, anchors=None, weight=WEIGHT, max_norm=MAX_NORM, lr=LR):
    """The class's equations by autograd, clip_grad_norm_ and torch.optim.AdamW."""
    anchors = [p.detach().clone() for p in params] if anchors is None else anchors
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=DECAY)
    seen = []
    for step in range(STEPS):
        optimizer.zero_grad()
        penalty = oracle_penalty(params, anchors, form, weight)
        loss = loss_of(params, step)
        (loss if form == "decoupled" else loss + penalty).backward()
        norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
        pulls = [lr * weight * (p.detach() - a) for p, a in zip(params, anchors, strict=True)]
        optimizer.step()
        if form == "decoupled":
            with torch.no_grad():
                for param, pull in zip(params, pulls, strict=True):
                    param -= pull
        seen.append((penalty.item(), norm.item()))
    return seen


def drift_of(params, dtype=torch.float64, **options):
    return [
        p.detach().double() - start.detach().double()
        for p, start in zip(params, make_params(dtype, **options), strict=True)
    ]


def check_against_oracle(form, dtype=torch.float64, tolerance=1e-9):
    params, oracle_params = make_params(dtype), make_params()
    seen = train(params, make_optimizer(params, form))
    wanted = oracle(oracle_params, form)
    assert worst_error(drift_of(params, dtype), drift_of(oracle_params)) <= tolerance
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(wanted), rtol=tolerance, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_twenty_steps_equal_the_float64_oracle(form):
    check_against_oracle(form)


@pytest.mark.parametrize("form", FORMS)
def test_twenty_float32_steps_stay_near_the_float64_oracle(form):
    check_against_oracle(form, torch.float32, tolerance=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_zero_anchor_equals_the_oracle(form):
    params, oracle_params = make_params(), make_params()
    optimizer = make_optimizer(params, form, anchor="zero")
    assert all("anchor" not in optimizer.state[p] for p in params)
    train(params, optimizer)
    oracle(oracle_params, form, [torch.zeros_like(p) for p in oracle_params])
    assert worst_error(drift_of(params), drift_of(oracle_params)) <= 1e-9


@pytest.mark.parametrize("form", FORMS)
def test_list_of_anchors_equals_the_oracle(form):
    params, oracle_params = make_params(), make_params()
    anchors = make_targets(seed=2)
    optimizer = make_optimizer(params, form, anchor=[anchors[0], None, *anchors[2:]])
    train(params, optimizer)
    oracle(oracle_params, form, [anchors[0], torch.zeros_like(anchors[1]), *anchors[2:]])
    assert worst_error(drift_of(params), drift_of(oracle_params)) <= 1e-9


@pytest.mark.parametrize("max_grad_norm", [None, MAX_NORM])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_without_an_anchor_it_is_clip_grad_norm_and_adamw(max_grad_norm, dtype, tolerance):
    params, others = make_params(dtype), make_params(dtype)
    optimizer = make_optimizer(params, anchor_weight=0.0, max_grad_norm=max_grad_norm)
    adamw = torch.optim.AdamW(others, lr=LR, weight_decay=DECAY)
    for step in range(STEPS):
        train(params, optimizer, steps=1, first_step=step)
        adamw.zero_grad()
        loss_of(others, step).backward()
        limit = math.inf if max_grad_norm is None else max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(others, limit)
        adamw.step()
        torch.testing.assert_close(optimizer.grad_norm, norm)
        assert optimizer.penalty == 0
    assert worst_error(drift_of(params, dtype), drift_of(others, dtype)) <= tolerance
    assert "anchor" not in optimizer.state[params[0]]


def test_the_norm_of_a_long_flat_parameter_keeps_float32_precision():
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.zeros(3_000_000))
    param.grad = torch.rand(3_000_000, generator=generator)
    wanted = param.grad.double().norm()
    optimizer = AnchoredAdamW([param])
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm.double(), wanted, rtol=1e-6, atol=0)


def flatten(params):
    """Return one parameter that holds all of ``params`` with gaps between, and its views."""
    flat, views = make_arena(SHAPES, alignment=16, dtype=params[0].dtype)
    for param, view in zip(params, views, strict=True):
        view.copy_(param.detach())
    return torch.nn.Parameter(flat), views


@pytest.mark.parametrize("anchor", ["start", "zero"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_flat_parameter_with_views_equals_separate_parameters(dtype, anchor):
    params = make_params(dtype)
    flat, views = flatten(make_params(dtype))
    # The clip is wide: its norm is summed in another order, all else is the same to the bit.
    options = {"form": "effective", "anchor": anchor, "max_grad_norm": None}
    optimizer = make_optimizer(params, **options)
    flat_optimizer = make_optimizer([flat], tensors=views, **options)
    for step in range(STEPS):
        train(params, optimizer, steps=1, first_step=step)
        flat_optimizer.zero_grad()
        offsets = [v.storage_offset() for v in views]
        leaves = [
            flat[o : o + v.numel()].view(v.shape) for o, v in zip(offsets, views, strict=True)
        ]
        loss_of(leaves, step).backward()
        flat_optimizer.step()
        assert torch.equal(optimizer.penalty, flat_optimizer.penalty)
    assert all(torch.equal(p, v) for p, v in zip(params, views, strict=True))


def test_parameters_that_share_a_storage_are_told_apart():
    arena = torch.cat([p.detach().flatten() for p in make_params()])
    sizes = [math.prod(s) for s in SHAPES]
    params = [
        torch.nn.Parameter(piece.view(shape))
        for piece, shape in zip(arena.split(sizes), SHAPES, strict=True)
    ]
    others = make_params()
    train(params, make_optimizer(params, "effective"))
    train(others, make_optimizer(others, "effective"))
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_run_equals_uninterrupted_run(form, dtype, tmp_path):
    params = make_params(dtype)
    optimizer = make_optimizer(params, form)
    train(params, optimizer, steps=8)
    torch.save([p.detach() for p in params], tmp_path / "params.pt")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    uninterrupted = train(params, optimizer, first_step=8)

    resumed = [torch.nn.Parameter(p) for p in torch.load(tmp_path / "params.pt")]
    other = make_optimizer(resumed, form, lr=1.0, anchor_weight=0.5)
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    start = make_params(dtype)
    for param, value in zip(resumed, start, strict=True):
        assert torch.equal(other.state[param]["anchor"], value)
        assert other.state[param]["exp_avg"].dtype == torch.float32
    assert train(resumed, other, first_step=8) == uninterrupted
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))


def anchor_bytes(optimizer):
    return sum(state["anchor"].nbytes for state in optimizer.state.values() if "anchor" in state)


@pytest.mark.parametrize("form", FORMS)
def test_anchors_that_are_zero_take_no_memory(form):
    params, full = make_params(zero_ups=True), make_params()
    downs = sum(p.nbytes for p in params[::2])
    optimizer = make_optimizer(params, form)
    assert anchor_bytes(optimizer) == (0 if form == "effective" else downs)
    assert anchor_bytes(make_optimizer(full, form)) == sum(p.nbytes for p in full)
    assert anchor_bytes(make_optimizer(full, form, anchor="zero")) == 0
    assert anchor_bytes(make_optimizer(full, form, anchor=[torch.zeros_like(p) for p in full])) == 0


@pytest.mark.parametrize("form", FORMS)
def test_a_new_lora_is_anchored_as_its_start_says(form):
    params, oracle_params = make_params(zero_ups=True), make_params(zero_ups=True)
    train(params, make_optimizer(params, form))
    oracle(oracle_params, form)
    drifts = [drift_of(ps, zero_ups=True) for ps in (params, oracle_params)]
    assert worst_error(*drifts) <= 1e-9


def test_one_pair_of_two_keeps_its_anchor():
    params = make_params()
    with torch.no_grad():
        params[3].zero_()
    optimizer = make_optimizer(params, "effective")
    assert ["anchor" in optimizer.state[p] for p in params] == [True, True, False, False]
    oracle_params = [torch.nn.Parameter(p.detach().clone()) for p in params]
    train(params, optimizer)
    oracle(oracle_params, "effective")
    starts = [
        torch.zeros_like(params[3]) if i == 3 else v for i, v in enumerate(draw_tensors(SHAPES))
    ]
    drifts = [
        [p.detach() - s for p, s in zip(ps, starts, strict=True)] for ps in (params, oracle_params)
    ]
    assert worst_error(*drifts) <= 1e-9


@pytest.mark.parametrize("form", FORMS)
def test_a_run_resumes_with_the_anchors_that_were_kept(form):
    params = make_params(zero_ups=True)
    optimizer = make_optimizer(params, form)
    train(params, optimizer, steps=3)
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = make_optimizer(resumed, form)
    other.load_state_dict(optimizer.state_dict())
    assert anchor_bytes(other) == anchor_bytes(optimizer)
    assert train(params, optimizer, first_step=3) == train(resumed, other, first_step=3)


def test_anchors_on_the_meta_device_count_as_not_zero():
    params = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES]
    assert anchor_bytes(make_optimizer(params)) == sum(p.nbytes for p in params)


def test_loading_writes_where_the_state_is_and_shares_nothing():
    params = make_params()
    optimizer = make_optimizer(params, lr=torch.tensor(LR), anchor_weight=torch.tensor(WEIGHT))
    train(params, optimizer, steps=2)
    saved = optimizer.state_dict()
    wanted = copy.deepcopy(saved)
    other_params = make_params()
    lr, weight = torch.tensor(1.0), torch.tensor(1.0)
    other = make_optimizer(other_params, lr=lr, anchor_weight=weight)
    addresses = [t.data_ptr() for p in other_params for t in other.state[p].values()]
    other.load_state_dict(saved)
    assert [t.data_ptr() for p in other_params for t in other.state[p].values()] == addresses
    assert other.param_groups[0]["lr"] is lr
    assert lr == torch.tensor(LR)
    assert weight == torch.tensor(WEIGHT)
    train(other_params, other, steps=2)
    for number, state in wanted["state"].items():
        assert all(torch.equal(saved["state"][number][k], v) for k, v in state.items())


def test_a_loaded_learning_rate_is_written_where_its_tensor_is():
    saved = make_optimizer(make_params(), lr=torch.tensor(LR)).state_dict()
    # A device of another kind than the one that the state was read to.
    lr = torch.tensor(1.0, device="meta")
    optimizer = make_optimizer(make_params(), lr=lr)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] is lr


def test_state_dict_holds_no_pairs_and_loading_keeps_them():
    params = make_params()
    optimizer = make_optimizer(params, "effective")
    saved = optimizer.state_dict()
    assert "lora_pairs" not in saved["param_groups"][0]
    optimizer.load_state_dict(saved)
    train(params, optimizer)
    oracle_params = make_params()
    oracle(oracle_params, "effective")
    assert worst_error(drift_of(params), drift_of(oracle_params)) <= 1e-9


@pytest.mark.parametrize("form", FORMS)
def test_deep_copy_trains_alike_and_apart(form):
    params = make_params()
    optimizer = make_optimizer(params, form)
    train(params, optimizer, steps=3)
    other_params, other = copy.deepcopy((params, optimizer))
    assert other.max_grad_norm == MAX_NORM
    assert train(params, optimizer) == train(other_params, other)
    assert all(torch.equal(a, b) for a, b in zip(params, other_params, strict=True))


def test_state_of_another_optimizer_is_refused():
    params = make_params()
    adamw = torch.optim.AdamW(params)
    train(params, make_optimizer(params), steps=1)
    with pytest.raises(ValueError, match="not that of an AnchoredAdamW"):
        make_optimizer(params).load_state_dict(adamw.state_dict())


def test_state_without_its_anchor_is_refused_and_nothing_is_loaded():
    params = make_params()
    optimizer = make_optimizer(params)
    saved = optimizer.state_dict()
    saved["state"] = {
        k: {n: t for n, t in v.items() if n != "anchor"} for k, v in saved["state"].items()
    }
    with pytest.raises(ValueError, match="parameter 0 lacks anchor"):
        optimizer.load_state_dict(saved)
    assert "anchor" in optimizer.state[params[0]]


def test_effective_state_is_refused_without_pairs():
    params = make_params()
    saved = make_optimizer(params, "effective").state_dict()
    with pytest.raises(ValueError, match="no lora_pairs"):
        make_optimizer(params).load_state_dict(saved)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tensors", [False, True], ids=["floats", "tensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_reads_nothing_on_the_host(form, tensors, dtype):
    params = make_params(dtype)
    kind = torch.tensor if tensors else float
    optimizer = make_optimizer(params, form, lr=kind(LR), anchor_weight=kind(WEIGHT))
    for step in range(2):
        loss_of(params, step).backward()
        with ForbidHostReads():
            optimizer.step()


def test_tensor_options_are_the_float_options():
    runs = []
    for kind in (float, lambda x: torch.tensor(x, dtype=torch.float64)):
        params = make_params()
        train(params, make_optimizer(params, lr=kind(LR), anchor_weight=kind(WEIGHT)))
        runs.append(drift_of(params))
    assert worst_error(*runs) <= 1e-12


@pytest.mark.parametrize("kind", [float, lambda x: torch.tensor(x, dtype=torch.float64)])
def test_a_scheduler_moves_the_learning_rate(kind):
    params, others = make_params(), make_params()
    optimizer = make_optimizer(params, lr=kind(LR), anchor_weight=0.0, max_grad_norm=None)
    adamw = torch.optim.AdamW(others, lr=LR, weight_decay=DECAY)
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.8**step) for o in (optimizer, adamw)
    ]
    for step in range(STEPS):
        train(params, optimizer, steps=1, first_step=step)
        adamw.zero_grad()
        loss_of(others, step).backward()
        adamw.step()
        for scheduler in schedulers:
            scheduler.step()
    assert worst_error(drift_of(params), drift_of(others)) <= 1e-12


def test_groups_override_options_and_share_the_clip():
    params, oracle_params = make_params(), make_params()
    optimizer = AnchoredAdamW(
        [
            {"params": params[:2], "form": "effective", "lora_pairs": pairs_of(params)[:1]},
            {"params": params[2:3], "anchor_weight": 0.3, "lr": 5e-3, "weight_decay": 0.0},
        ],
        lr=LR,
        weight_decay=DECAY,
        anchor_weight=WEIGHT,
        max_grad_norm=MAX_NORM,
    )
    anchor = make_targets(seed=2)[3]
    optimizer.add_param_group({"params": params[3:], "form": "decoupled", "anchor": [anchor]})
    starts = [p.detach().clone() for p in params]
    adamw = torch.optim.AdamW(
        [
            {"params": oracle_params[:2]},
            {"params": oracle_params[2:3], "lr": 5e-3, "weight_decay": 0.0},
            {"params": oracle_params[3:]},
        ],
        lr=LR,
        weight_decay=DECAY,
    )
    for step in range(STEPS):
        train(params, optimizer, steps=1, first_step=step)
        adamw.zero_grad()
        down, up, raw, decoupled = oracle_params
        change = SCALE * (up @ down - starts[1] @ starts[0])
        coupled = WEIGHT * change.square().sum() + 0.3 * (raw - starts[2]).square().sum()
        (loss_of(oracle_params, step) + coupled).backward()
        norm = torch.nn.utils.clip_grad_norm_(oracle_params, MAX_NORM)
        pull = decoupled.detach() - anchor
        adamw.step()
        with torch.no_grad():
            decoupled -= LR * WEIGHT * pull
        torch.testing.assert_close(optimizer.grad_norm, norm)
        penalty = coupled.detach() + WEIGHT * pull.square().sum()
        torch.testing.assert_close(optimizer.penalty, penalty)
    assert worst_error(drift_of(params), drift_of(oracle_params)) <= 1e-9


def test_a_list_of_anchors_runs_over_all_groups():
    params = make_params()
    anchors = make_targets(seed=2)
    groups = [{"params": params[:1]}, {"params": iter(params[1:])}]
    optimizer = AnchoredAdamW(groups, anchor_weight=WEIGHT, anchor=anchors)
    for param, anchor in zip(params, anchors, strict=True):
        assert torch.equal(optimizer.state[param]["anchor"], anchor)


def test_bfloat16_parameter_is_the_float32_step_rounded_once():
    params = make_params(torch.bfloat16)
    others = [torch.nn.Parameter(p.detach().float()) for p in params]
    starts = make_targets(seed=2)
    optimizers = [make_optimizer(ps, anchor=starts) for ps in (params, others)]
    for param, other in zip(params, others, strict=True):
        param.grad = torch.ones_like(param) * 0.1
        other.grad = param.grad.float()
    for optimizer in optimizers:
        optimizer.step()
    assert all(torch.equal(p, o.bfloat16()) for p, o in zip(params, others, strict=True))
    assert all(optimizers[0].state[p]["exp_avg"].dtype == torch.float32 for p in params)


def test_wide_copies_of_gradients_stay_where_they_are():
    params = make_params(torch.bfloat16)
    optimizer = make_optimizer(params, "effective")
    places = []
    for step in range(2):
        optimizer.zero_grad()
        loss_of(params, step).backward()
        batch = optimizer._gather(0, range(len(params)))
        assert all(torch.equal(g, p.grad) for g, p in zip(batch.grads, params, strict=True))
        places.append([g.data_ptr() for g in batch.grads])
        # A captured step reads them at every replay, and is replayed after loading too.
        optimizer.load_state_dict(optimizer.state_dict())
    assert places[0] == places[1]


def test_a_parameter_without_gradient_stays_and_so_does_its_pair():
    params = make_params()
    optimizer = make_optimizer(params, "effective", anchor="zero")
    before = [p.detach().clone() for p in params]
    loss_of(params, 0).backward()
    params[1].grad = None
    optimizer.step()
    assert torch.equal(params[1], before[1])
    assert optimizer.state[params[1]]["step"] == 0
    assert not torch.equal(params[0], before[0])
    wanted = WEIGHT * (SCALE * before[3] @ before[2]).square().sum()
    torch.testing.assert_close(optimizer.penalty, wanted)


def test_a_step_without_any_gradient_does_nothing():
    params = make_params()
    optimizer = make_optimizer(params)
    optimizer.step()
    assert optimizer.penalty == 0
    assert optimizer.grad_norm == 0
    assert all(torch.equal(a, b) for a, b in zip(params, make_params(), strict=True))


def test_channels_last_parameters_train_without_an_anchor():
    weights = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    params = [
        torch.nn.Parameter(w) for w in (weights, weights.to(memory_format=torch.channels_last))
    ]
    for param in params:
        param.grad = torch.sin(param.detach())
        AnchoredAdamW([param], max_grad_norm=MAX_NORM).step()
    assert torch.equal(*params)


def test_zeroed_gradients_do_for_absent_ones():
    runs = []
    for set_to_none in (True, False):
        params = make_params()
        optimizer = make_optimizer(params)
        for step in range(3):
            optimizer.zero_grad(set_to_none=set_to_none)
            loss_of(params, step).backward()
            optimizer.step()
        runs.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_closure_is_called_with_gradients_and_its_loss_returned():
    params = make_params()
    optimizer = make_optimizer(params)

    def closure():
        loss = loss_of(params, 0)
        loss.backward()
        return loss

    assert optimizer.step(closure) == loss_of(make_params(), 0)


def test_two_runs_are_equal():
    runs = []
    for _ in range(2):
        params = make_params(torch.float32)
        seen = train(params, make_optimizer(params, "effective"))
        runs.append((seen, params))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_flag_makes_a_step_a_no_op(form, dtype):
    runs = []
    for skipped in (False, True):
        params = make_params(dtype)
        optimizer = make_optimizer(params, form)
        skip = torch.zeros((), dtype=torch.bool)
        for step in range(4):
            optimizer.zero_grad()
            loss_of(params, step).backward()
            if skipped and step == 2:
                # A bad step between two good ones.
                grads = [p.grad.clone() for p in params]
                params[1].grad[0, 0] = math.nan
                with ForbidHostReads():
                    optimizer.step(skip=skip.fill_(True))
                assert optimizer.grad_norm.isnan()
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad
            with ForbidHostReads():
                optimizer.step(skip=skip.fill_(False))
        runs.append([*params, *(t for p in params for t in optimizer.state[p].values())])
    assert all(map(torch.equal, *runs))


def bits_of(tensors):
    return [t.detach().reshape(-1).view(torch.uint8).clone() for t in tensors]


def make_guarded(form, dtype=torch.float32, **options):
    """Two groups with working copies: the second is never bad itself."""
    params = make_params(dtype)
    copies = [p.detach().to(torch.bfloat16) for p in params]
    groups = [
        {"params": params[:2], "working_copy": copies[:2], "lr": 2 * LR},
        {"params": params[2:], "working_copy": copies[2:]},
    ]
    if form == "effective":
        for group, pair in zip(groups, pairs_of(params), strict=True):
            group["lora_pairs"] = [pair]
    optimizer = AnchoredAdamW(
        groups, form=form, weight_decay=DECAY, anchor_weight=WEIGHT, **options
    )
    return params, copies, optimizer


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_grad_norm", [None, MAX_NORM])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_step_that_is_not_finite_leaves_every_bit_as_it_was(form, dtype, max_grad_norm, bad):
    runs = []
    for is_bad in (False, True):
        params, copies, optimizer = make_guarded(form, dtype, max_grad_norm=max_grad_norm)
        for step in range(4):
            optimizer.zero_grad()
            loss_of(params, step).backward()
            written = [*params, *copies, *(t for p in params for t in optimizer.state[p].values())]
            if is_bad and step == 2:
                grads, before = [p.grad.clone() for p in params], bits_of(written)
                params[1].grad[2, 1] = bad
                with ForbidHostReads():
                    optimizer.step(skip_non_finite=True)
                assert not optimizer.grad_norm.isfinite() and optimizer.penalty.isfinite()
                assert optimizer.skipped.dtype == torch.bool and optimizer.skipped
                assert all(map(torch.equal, bits_of(written), before))
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad
            with ForbidHostReads():
                optimizer.step(skip_non_finite=True)
            assert not optimizer.skipped
        runs.append(bits_of(written))
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("bad", [False, True])
def test_a_step_is_skipped_by_its_norm_or_by_the_flag(skip, bad):
    params, _, optimizer = make_guarded("raw")
    loss_of(params, 0).backward()
    if bad:
        params[3].grad[1] = math.nan
    before = bits_of(params)
    optimizer.step(skip=torch.tensor(3.0 * skip), skip_non_finite=True)
    assert optimizer.skipped == (skip or bad)
    assert all(map(torch.equal, bits_of(params), before)) == (skip or bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_gradients_whose_squares_overflow_count_as_not_finite(dtype):
    param = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    param.grad = torch.full_like(param, 1e30)
    optimizer = AnchoredAdamW([param], max_grad_norm=1.0)
    optimizer.step(skip_non_finite=True)
    assert optimizer.skipped == (dtype == torch.float32)
    assert optimizer.grad_norm.isinf() == optimizer.skipped


@pytest.mark.parametrize("form", ["raw", "decoupled"])
def test_a_skipped_step_keeps_the_sign_of_a_zero(form):
    param = torch.nn.Parameter(torch.full((17,), -0.0))
    param.grad = torch.full_like(param, math.nan)
    optimizer = AnchoredAdamW(
        [param], anchor_weight=WEIGHT, anchor=[torch.ones(17)], form=form, max_grad_norm=1.0
    )
    optimizer.step(skip_non_finite=True)
    assert optimizer.skipped and param.signbit().all()


def test_a_step_that_is_not_asked_to_skip_says_so():
    params, _, optimizer = make_guarded("raw")
    assert not optimizer.skipped
    loss_of(params, 0).backward()
    params[0].grad[0, 0] = math.nan
    optimizer.step()
    assert not optimizer.skipped
    assert params[0].isnan().any()
    optimizer.zero_grad()
    optimizer.step(skip_non_finite=True)
    assert not optimizer.skipped


def test_a_skipped_step_returns_the_loss_of_its_closure():
    params, _, optimizer = make_guarded("raw")

    def closure():
        optimizer.zero_grad()
        loss = loss_of(params, 0) * math.inf
        loss.backward()
        return loss

    assert optimizer.step(closure, skip_non_finite=True) == math.inf
    assert optimizer.skipped
    assert copy.deepcopy(optimizer).skipped


def test_gradients_that_are_not_finite_do_what_clip_grad_norm_does():
    for bad in (math.nan, math.inf):
        params, others = make_params(), make_params()
        for ps in (params, others):
            loss_of(ps, 0).backward()
            ps[2].grad[0, 5] = bad
        make_optimizer(params, anchor_weight=0.0).step()
        torch.nn.utils.clip_grad_norm_(others, MAX_NORM)
        torch.optim.AdamW(others, lr=LR, weight_decay=DECAY).step()
        for one, other in zip(params, others, strict=True):
            torch.testing.assert_close(one, other, equal_nan=True)


@pytest.mark.parametrize("form", FORMS)
def test_a_working_copy_is_the_parameter_rounded(form):
    params = make_params(torch.float32)
    copies = [torch.zeros_like(p, dtype=torch.bfloat16, requires_grad=False) for p in params]
    group = {"params": params, "working_copy": copies}
    if form == "effective":
        group["lora_pairs"] = pairs_of(params)
    optimizer = AnchoredAdamW([group], lr=LR, anchor_weight=WEIGHT, form=form)
    for steps in (0, 3):
        train(params, optimizer, steps)
        assert all(torch.equal(c, p.bfloat16()) for c, p in zip(copies, params, strict=True))
    saved = optimizer.state_dict()
    assert "working_copy" not in saved["param_groups"][0]
    copies[0].zero_()
    optimizer.load_state_dict(saved)
    assert torch.equal(copies[0], params[0].bfloat16())
    assert optimizer.param_groups[0]["working_copy"][0] is copies[0]


def test_a_flat_parameter_takes_one_working_copy():
    flat, _ = flatten(make_params(torch.float32))
    copy_of_flat = torch.zeros_like(flat, dtype=torch.bfloat16, requires_grad=False)
    optimizer = AnchoredAdamW([{"params": [flat], "working_copy": copy_of_flat}], lr=LR)
    flat.grad = torch.ones_like(flat)
    optimizer.step()
    assert torch.equal(copy_of_flat, flat.bfloat16())


def test_capture_refuses_a_parameter_without_a_gradient(monkeypatch):
    params = make_params()
    optimizer = make_optimizer(params)
    loss_of(params, 0).backward()
    params[1].grad = None
    monkeypatch.setattr(optim_groups, "_is_capturing", lambda: True)
    with pytest.raises(ValueError, match=r"param_groups\[0\], params\[1\]: has no gradient"):
        optimizer.step()


@pytest.mark.parametrize("layout", ["gradient", "parameter", "sliced"])
def test_strides_do_not_change_a_step(layout):
    weights = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(0))
    channels_last = weights.to(memory_format=torch.channels_last)
    param = {
        "gradient": weights.clone(),
        "parameter": channels_last,
        "sliced": torch.cat([weights, weights], dim=1)[:, :6],
    }[layout]
    params = [torch.nn.Parameter(weights), torch.nn.Parameter(param)]
    grads = [weights.sin(), (channels_last if layout == "gradient" else weights).sin()]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
        AnchoredAdamW([param], max_grad_norm=MAX_NORM).step()
    torch.testing.assert_close(*params, rtol=0, atol=1e-8)


def test_accumulated_gradients_are_their_sum():
    runs = []
    for num_passes in (1, 4):
        params = make_params()
        optimizer = make_optimizer(params)
        for step in range(3):
            for _ in range(num_passes):
                (loss_of(params, step) / num_passes).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        runs.append(drift_of(params))
    assert worst_error(*runs) <= 1e-12


def test_an_optimizer_prints_the_number_of_its_pairs():
    assert "lora_pairs: 2 pairs" in repr(make_optimizer(make_params(), "effective"))


WRONG = {
    "form": (lambda p: {"params": p, "form": "elastic"}, 'form: got "elastic", want one of raw'),
    "anchor": (lambda p: {"params": p, "anchor": "base"}, 'anchor: got "base", want one of start'),
    "anchor length": (lambda p: {"params": p, "anchor": [None]}, "anchor: got 1 entries, want 4"),
    "anchor shape": (
        lambda p: {"params": p, "anchor": [None, p[0], None, None]},
        r"anchor\[1\]: got shape \(3, 7\)",
    ),
    "no pairs": (lambda p: {"params": p, "form": "effective"}, "pass lora_pairs="),
    "foreign pair": (
        lambda p: {
            "params": p,
            "form": "effective",
            "lora_pairs": [*pairs_of(p), (torch.ones(1, 2), torch.ones(3, 1), 1.0)],
        },
        r"lora_pairs\[2\], down: lies in no parameter",
    ),
    "ranks": (
        lambda p: {"params": p, "form": "effective", "lora_pairs": [(p[0], p[3], 1.0)]},
        r"lora_pairs\[0\]: got down \(3, 7\) and up \(4, 1\)",
    ),
    "uncovered": (
        lambda p: {"params": p, "form": "effective", "lora_pairs": pairs_of(p)[:1]},
        r"params\[2\]: no pair",
    ),
    "pair twice": (
        lambda p: {"params": p, "form": "effective", "lora_pairs": pairs_of(p) + pairs_of(p)[:1]},
        r"lora_pairs\[2\]: shares a tensor with lora_pairs\[0\]",
    ),
    "strided pair": (
        lambda p: {"params": p, "form": "effective", "lora_pairs": [(p[0][:, :2], p[1], 1.0)]},
        r"lora_pairs\[0\], down: got strides",
    ),
    "useless pairs": (lambda p: {"params": p, "lora_pairs": pairs_of(p)}, "lora_pairs: the group"),
    "lr": (lambda p: {"params": p, "lr": -1.0}, "lr: got -1.0"),
    "betas": (lambda p: {"params": p, "betas": (0.9, 1.0)}, r"betas\[1\]: got 1.0"),
    "weight": (lambda p: {"params": p, "anchor_weight": math.nan}, "anchor_weight: got nan"),
    "tensor weight": (
        lambda p: {"params": p, "anchor_weight": torch.ones(1)},
        r"anchor_weight: got a tensor of shape \(1,\)",
    ),
    "integers": (
        lambda p: {"params": [*p, torch.ones(2, dtype=torch.int64)]},
        r"params\[4\]: got dtype torch.int64",
    ),
    "copies": (lambda p: {"params": p, "working_copy": p[:1]}, "working_copy: got 1 tensors"),
    "copy shape": (
        lambda p: {"params": p, "working_copy": [None, p[0].detach(), None, None]},
        r"working_copy\[1\]: got shape \(3, 7\)",
    ),
    "strides": (
        lambda p: {"params": [*p, torch.ones(2, 3).T]},
        r"params\[4\]: got strides \(1, 3\)",
    ),
}


@pytest.mark.parametrize(("make_group", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_group_is_refused_and_leaves_the_optimizer_as_it_was(make_group, message):
    other = torch.nn.Parameter(torch.ones(2))
    optimizer = AnchoredAdamW([other], anchor_weight=WEIGHT)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(make_group(make_params()))
    assert len(optimizer.param_groups) == 1
    assert list(optimizer.state) == [other]


def test_wrong_options_are_refused():
    params = make_params()
    with pytest.raises(ValueError, match="max_grad_norm: got 0"):
        AnchoredAdamW(params, max_grad_norm=0)
    with pytest.raises(ValueError, match="anchor: got 1 entries, want 4"):
        AnchoredAdamW(params, anchor=[None])


def test_a_weight_given_late_is_refused_where_no_anchor_was_kept():
    params = make_params()
    optimizer = make_optimizer(params, anchor_weight=0.0)
    optimizer.param_groups[0]["anchor_weight"] = 1.0
    loss_of(params, 0).backward()
    with pytest.raises(ValueError, match="no anchor was kept"):
        optimizer.step()


def plant(monkeypatch, folder, faults):
    """Make the optimizer step as plain.py says with each (right, wrong) of the faults replaced."""
    mutant = load_mutant(plain.__file__, faults, folder)
    monkeypatch.setattr(op, "plain_step_", mutant.plain_step_)


# Each with the form in which it shows.
FAULTS = {
    "sign": ("raw", [("differences, 2 * weight)", "differences, -2 * weight)")]),
    "factor 2": ("raw", [("differences, 2 * weight)", "differences, weight)")]),
    "clip by the squared norm": ("raw", [(".sum().sqrt()", ".sum()")]),
    "clip forgotten": ("effective", [(".clamp(min=1.0)", ".clamp(max=1.0)")]),
    "anchor not in the clip norm": (
        "raw",
        [
            ("        squares += _squares(grads)\n", ""),
            (
                "anchors in _cut(batch):\n        if batch",
                "anchors in _cut(batch):\n        squares += _squares(grads)\n        if batch",
            ),
        ],
    ),
    "anchor not read": ("raw", [("    if not anchors:\n", "    if True:\n")]),
    "decoupled sign": (
        "decoupled",
        [("_foreach_sub_(params, pulls)", "_foreach_add_(params, pulls)")],
    ),
    "decoupled pull left out": ("decoupled", [("torch._foreach_sub_(params, pulls)", "pass")]),
    "decay after the decoupled pull": (
        "decoupled",
        [('0.0 if batch.form == "decoupled" else batch', "batch")],
    ),
    "tails left out": ("raw", [("torch._foreach_copy_(tails, padded)", "pass")]),
}


@pytest.mark.parametrize(("form", "faults"), FAULTS.values(), ids=FAULTS.keys())
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_a_planted_fault_turns_the_oracle_test_red(
    monkeypatch, tmp_path, form, faults, dtype, tolerance
):
    plant(monkeypatch, tmp_path, faults)
    with pytest.raises(AssertionError):
        check_against_oracle(form, dtype, tolerance)


SKIP_FAULTS = {
    "NaN passes for finite": ("raw", math.nan, ("~grad_norm.isfinite()", "grad_norm.isinf()")),
    "infinity passes for finite": ("raw", math.inf, ("~grad_norm.isfinite()", "grad_norm.isnan()")),
    "steps counted": ("raw", math.nan, ("[1 - found_inf] * len", "[1 - 0 * found_inf] * len")),
    "moments written": ("raw", math.nan, ("found_inf=found_inf", "found_inf=None")),
    "decoupled pull all the same": (
        "decoupled",
        math.nan,
        ("lr = lr * (1 - skipped", "lr = lr * (1 - 0 * skipped"),
    ),
}


@pytest.mark.parametrize(("form", "bad", "fault"), SKIP_FAULTS.values(), ids=SKIP_FAULTS.keys())
def test_a_planted_fault_turns_the_skipped_step_red(monkeypatch, tmp_path, form, bad, fault):
    check = test_a_step_that_is_not_finite_leaves_every_bit_as_it_was
    check(form, torch.float32, MAX_NORM, bad)
    plant(monkeypatch, tmp_path, [fault])
    with pytest.raises(AssertionError):
        check(form, torch.float32, MAX_NORM, bad)


def effective_of(sign, factor):
    pull_ = LoraAnchor.pull_

    def planted(self, weight):
        return pull_(self, sign * factor * weight) / (sign * factor)

    return planted


@pytest.mark.parametrize("planted", [effective_of(-1, 1), effective_of(1, 0.5)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_a_planted_fault_in_the_effective_form_turns_the_oracle_test_red(
    monkeypatch, planted, dtype, tolerance
):
    monkeypatch.setattr(LoraAnchor, "pull_", planted)
    with pytest.raises(AssertionError):
        check_against_oracle("effective", dtype, tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_a_stale_anchor_after_loading_turns_the_resume_test_red(monkeypatch, form, tmp_path):
    load = AnchoredAdamW.load_state_dict

    def planted(self, state_dict):
        own = {p: state["anchor"].clone() for p, state in self.state.items()}
        load(self, state_dict)
        for param, anchor in own.items():
            self.state[param]["anchor"] = anchor

    monkeypatch.setattr(AnchoredAdamW, "load_state_dict", planted)
    with pytest.raises(AssertionError):
        test_resumed_run_equals_uninterrupted_run(form, torch.float32, tmp_path)
