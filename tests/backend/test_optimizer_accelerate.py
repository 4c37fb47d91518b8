"""AnchoredAdamW under accelerate: prepare, accumulation, clips, mixed precision, saved states."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from fastppt_kernels import AnchoredAdamW
from fastppt_kernels.testing import worst_error

OPTIONS = {"lr": 1e-2, "anchor_weight": 0.5, "max_grad_norm": 0.3}
NUM_STEPS = 6


def make_network(dtype=torch.float64):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2)).to(
        dtype
    )


def make_inputs(dtype=torch.float64):
    return torch.randn(NUM_STEPS, 4, 5, generator=torch.Generator().manual_seed(1)).to(dtype)


def values_of(net):
    return [p.detach().clone() for p in net.parameters()]


def drift_of(net):
    pairs = zip(net.parameters(), make_network().parameters(), strict=True)
    return [a.detach().double() - b.detach() for a, b in pairs]


def loss_of(net, inputs):
    return (net(inputs).float() if inputs.dtype != torch.float64 else net(inputs)).square().mean()


def train_plainly(net, optimizer, inputs):
    for each in inputs:
        loss_of(net, each).backward()
        optimizer.step()
        optimizer.zero_grad()


def train(accelerator, net, optimizer, inputs, max_norm=None):
    for each in inputs:
        with accelerator.accumulate(net):
            accelerator.backward(loss_of(net, each))
            if accelerator.sync_gradients and max_norm is not None:
                accelerator.clip_grad_norm_(net.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("anchor", ["start", "first_step", "zero"])
def test_a_prepared_run_is_the_plain_one(anchor):
    accelerator = Accelerator(cpu=True)
    net, plain = make_network(), make_network()
    optimizer = AnchoredAdamW(net.parameters(), anchor=anchor, **OPTIONS)
    prepared, optimizer = accelerator.prepare(net, optimizer)
    train(accelerator, prepared, optimizer, make_inputs())
    train_plainly(plain, AnchoredAdamW(plain.parameters(), anchor=anchor, **OPTIONS), make_inputs())
    assert all(map(torch.equal, values_of(net), values_of(plain)))
    assert optimizer.optimizer.penalty > 0


def test_accumulated_steps_are_those_of_the_larger_batch():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    net, plain = make_network(), make_network()
    prepared, optimizer = accelerator.prepare(net, AnchoredAdamW(net.parameters(), **OPTIONS))
    train(accelerator, prepared, optimizer, make_inputs())
    optimizer = AnchoredAdamW(plain.parameters(), **OPTIONS)
    train_plainly(plain, optimizer, make_inputs().view(NUM_STEPS // 2, 8, 5))
    assert worst_error(drift_of(net), drift_of(plain)) <= 1e-9


def test_a_clip_outside_does_not_see_the_anchor_and_that_of_ours_does():
    limit = 0.05
    accelerator = Accelerator(cpu=True)
    outside, by_hand, ours = make_network(), make_network(), make_network()
    options = OPTIONS | {"max_grad_norm": None, "anchor": "zero"}
    optimizer = AnchoredAdamW(outside.parameters(), **options)
    prepared, wrapped = accelerator.prepare(outside, optimizer)
    train(accelerator, prepared, wrapped, make_inputs(), max_norm=limit)
    # The gradient of the loss is within the limit, that of the anchor is not.
    assert optimizer.grad_norm > 4 * limit
    plain = AnchoredAdamW(by_hand.parameters(), **options)
    for each in make_inputs():
        plain.zero_grad()
        loss_of(by_hand, each).backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), limit)
        plain.step()
    assert worst_error(drift_of(outside), drift_of(by_hand)) <= 1e-9
    train_plainly(
        ours, AnchoredAdamW(ours.parameters(), **options | {"max_grad_norm": limit}), make_inputs()
    )
    assert worst_error(drift_of(outside), drift_of(ours)) > 1e-3


def test_bfloat16_autocast_trains_float32_parameters_as_a_plain_loop_does():
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    net, plain = make_network(torch.float32), make_network(torch.float32)
    optimizer = AnchoredAdamW(net.parameters(), **OPTIONS)
    prepared, wrapped = accelerator.prepare(net, optimizer)
    train(accelerator, prepared, wrapped, make_inputs(torch.float32))
    other = AnchoredAdamW(plain.parameters(), **OPTIONS)
    for each in make_inputs(torch.float32):
        other.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            predicted = plain(each)
        assert predicted.dtype == torch.bfloat16
        predicted.float().square().mean().backward()
        other.step()
    assert all(map(torch.equal, values_of(net), values_of(plain)))
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_parameters_of_bfloat16_keep_their_moments_in_float32_when_prepared():
    accelerator = Accelerator(cpu=True)
    net, plain = make_network(torch.bfloat16), make_network(torch.bfloat16)
    optimizer = AnchoredAdamW(net.parameters(), **OPTIONS)
    prepared, wrapped = accelerator.prepare(net, optimizer)
    train(accelerator, prepared, wrapped, make_inputs(torch.bfloat16))
    other = AnchoredAdamW(plain.parameters(), **OPTIONS)
    train_plainly(plain, other, make_inputs(torch.bfloat16))
    assert all(map(torch.equal, values_of(net), values_of(plain)))
    assert {s["exp_avg"].dtype for s in optimizer.state.values()} == {torch.float32}


@pytest.mark.parametrize("is_wrapped", [False, True], ids=["bare", "accelerate"])
def test_a_gradient_scaler_unscales_before_the_anchor_and_skips_what_is_not_finite(is_wrapped):
    Accelerator(cpu=True)
    net, plain = make_network(torch.float32), make_network(torch.float32)
    optimizer = AnchoredAdamW(net.parameters(), anchor="zero", **OPTIONS)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    wrapped = AcceleratedOptimizer(optimizer, scaler=scaler)
    other = AnchoredAdamW(plain.parameters(), anchor="zero", **OPTIONS)
    bad = 2
    for number, each in enumerate(make_inputs(torch.float32)):
        factor = torch.inf if number == bad else 1.0
        scaler.scale(loss_of(net, each) * factor).backward()
        before, steps = values_of(net), steps_of(optimizer)
        if is_wrapped:
            wrapped.step()
            assert wrapped.step_was_skipped == (number == bad)
        else:
            scaler.step(optimizer)
            scaler.update()
        if number == bad:
            assert all(map(torch.equal, values_of(net), before))
            assert steps_of(optimizer) == steps
        else:
            loss_of(plain, each).backward()
            other.step()
            other.zero_grad()
            torch.testing.assert_close(optimizer.grad_norm, other.grad_norm, rtol=1e-5, atol=0)
        optimizer.zero_grad()
    assert scaler.get_scale() == 512.0
    assert worst_error(drift_of(net), drift_of(plain)) <= 1e-4


def steps_of(optimizer):
    return [float(state["step"]) for state in optimizer.state.values()]


@pytest.mark.parametrize("anchor", ["start", "first_step"])
@pytest.mark.parametrize("moments", ["fp32", "8bit"])
def test_a_run_resumed_from_save_state_is_the_uninterrupted_one(anchor, moments, tmp_path):
    options = OPTIONS | {"anchor": anchor, "moments": moments}
    inputs = make_inputs(torch.float32)

    def prepare():
        net = make_network(torch.float32)
        accelerator = Accelerator(cpu=True)
        optimizer = AnchoredAdamW(net.parameters(), **options)
        return accelerator, net, optimizer, accelerator.prepare(net, optimizer)

    accelerator, net, optimizer, prepared = prepare()
    train(accelerator, *prepared, inputs[:3])
    accelerator.save_state(str(tmp_path))
    train(accelerator, *prepared, inputs[3:])
    resumed_accelerator, resumed, other, prepared = prepare()
    resumed_accelerator.load_state(str(tmp_path))
    train(resumed_accelerator, *prepared, inputs[3:])
    assert all(map(torch.equal, values_of(net), values_of(resumed)))
    assert torch.equal(optimizer.penalty, other.penalty)
    assert optimizer.penalty > 0
    starts = [p.detach() for p in make_network(torch.float32).parameters()]
    kept = [other.state[p]["anchor"] for p in resumed.parameters()]
    assert all(map(torch.equal, kept, starts))


def test_a_state_saved_before_the_first_step_is_resumed(tmp_path):
    accelerator = Accelerator(cpu=True)
    net, plain = make_network(), make_network()
    optimizer = AnchoredAdamW(net.parameters(), anchor="first_step", **OPTIONS)
    prepared = accelerator.prepare(net, optimizer)
    accelerator.save_state(str(tmp_path))
    accelerator.load_state(str(tmp_path))
    train(accelerator, *prepared, make_inputs())
    train_plainly(plain, AnchoredAdamW(plain.parameters(), **OPTIONS), make_inputs())
    assert all(map(torch.equal, values_of(net), values_of(plain)))
