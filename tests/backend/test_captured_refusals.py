"""What a captured step is blind to is refused by name, with what to do: on the CPU as on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from fastppt.foreign import captured
from fastppt.foreign.captured import CapturedStep
from fastppt.foreign.held import HeldState
from fastppt.training.constants import MODULES_EVERY
from fastppt.training.graph import Function
from fastppt_kernels import AnchoredAdamW
from tests.backend.captured_loops import (
    WARMUP,
    BlindRecorder,
    Loop,
    anchored,
    are_equal,
    capturing,
    draw_batch,
    loops,
    sgd,
)
from tests.training.replay import ReplayRecorder

__all__ = ["capturing", "loops"]


def run_before_capture(loops: list[Loop], loop: Loop, **settings: Any) -> CapturedStep:
    """The captured step of a loop, of which the next call is the one that is captured."""
    loops.append(loop)
    step = loop.captured(**settings)
    for seed in range(WARMUP):
        step(draw_batch(seed))
    return step


def run_after_capture(
    loops: list[Loop], make_optimizer: Callable[..., Any] = sgd, zero: str = "in place"
) -> tuple[Loop, CapturedStep]:
    loop = Loop(make_optimizer, zero)
    step = run_before_capture(loops, loop)
    step(draw_batch(7))
    step(draw_batch(8))
    return loop, step


# What Python changes after the capture.


def set_option(**options: Any) -> Callable[[Loop], object]:
    return lambda loop: loop.optimizer.param_groups[0].update(options)


def drop_gradients(loop: Loop) -> None:
    loop.optimizer.zero_grad(set_to_none=True)


def replace_gradient(loop: Loop) -> None:
    loop.network[0].bias.grad = torch.zeros(5)


def load_state(loop: Loop) -> None:
    loop.optimizer.load_state_dict(copy.deepcopy(loop.optimizer.state_dict()))


CHANGES: dict[str, tuple[Callable[[Loop], object], str]] = {
    "learning rate": (
        set_option(lr=5e-3),
        r"^SGD\.param_groups\.0\.lr was 0\.01 when .* is 0\.005 now, .*give .* as a 0-dim tensor",
    ),
    "momentum": (set_option(momentum=0.5), r"^SGD\.param_groups\.0\.momentum was 0\.9"),
    "mode": (lambda loop: loop.network.eval(), r"^Sequential\.training was True .* is False now"),
    "no gradient": (drop_gradients, r"^Sequential\.0\.weight: has none now than the gradient"),
    "other gradient": (replace_gradient, r"^Sequential\.0\.bias: has another now than the"),
    "loaded": (load_state, r"^SGD\.state of Sequential\.0\.weight: momentum_buffer is another"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_python_has_changed_is_named(loops: list[Loop], what: str) -> None:
    loop, step = run_after_capture(loops)
    change, message = CHANGES[what]
    change(loop)
    before = loop.state()
    with pytest.raises(ValueError, match=message) as raised:
        step(draw_batch(9))
    assert "engine" not in str(raised.value)
    assert are_equal(before, loop.state())


def test_a_gradient_that_a_replay_would_not_add_to_is_named(loops: list[Loop]) -> None:
    loop, step = run_after_capture(loops, zero="after")
    loop.network(draw_batch(0)["input"]).sum().backward()
    with pytest.raises(ValueError, match=r"0\.weight: had no gradient .* zero the gradients insid"):
        step(draw_batch(9))


def test_gradients_that_are_dropped_outside_are_dropped_before_every_replay(
    loops: list[Loop],
) -> None:
    plain, loop = Loop(sgd, "never"), Loop(sgd, "never")
    loops.append(loop)
    step = loop.captured()
    for seed in range(WARMUP + 3):
        for one, run in ((plain, plain.step), (loop, step)):
            drop_gradients(one)
            run(draw_batch(seed))
        assert torch.equal(plain.network[0].weight.grad, loop.network[0].weight.grad)
    with pytest.raises(ValueError, match=r"0\.weight: had no gradient .* and has one now"):
        step(draw_batch(9))


def test_gradients_that_the_step_drops_first_may_be_any(loops: list[Loop]) -> None:
    loop, step = run_after_capture(loops, zero="before")
    drop_gradients(loop)
    step(draw_batch(9))
    replace_gradient(loop)
    step(draw_batch(10))


def test_a_gradient_of_the_step_before_is_read_where_it_was(loops: list[Loop]) -> None:
    """A step that begins with the update of the last backward pass reads what lies there."""
    loop = Loop(sgd)
    loops.append(loop)

    def step(batch: dict[str, Tensor]) -> Tensor:
        loop.optimizer.step()
        loop.optimizer.zero_grad(set_to_none=True)
        loss = loop.network(batch["input"]).square().mean()
        loss.backward()
        return loss

    loop.network(draw_batch(0)["input"]).square().mean().backward()
    captured_step = CapturedStep(step, state=(loop.network, loop.optimizer), warmup=1)
    for seed in range(2):
        captured_step(draw_batch(seed))
    with pytest.raises(ValueError, match=r"0\.weight: has another now than the gradient"):
        captured_step(draw_batch(9))


def test_a_state_that_is_loaded_in_place_is_no_change(loops: list[Loop]) -> None:
    loop, step = run_after_capture(loops, anchored)
    load_state(loop)
    loop.network.load_state_dict(copy.deepcopy(loop.network.state_dict()))
    step(draw_batch(9))


@pytest.mark.parametrize("owned", [True, False], ids=["of a module", "of the optimizer alone"])
def test_weights_that_move_are_found_soon(loops: list[Loop], owned: bool) -> None:
    loop = Loop(sgd)
    state = (loop.network, loop.optimizer) if owned else (loop.optimizer,)
    step = run_before_capture(loops, loop, state=state)
    for seed in range(MODULES_EVERY):
        step(draw_batch(seed))
    weight = loop.network[0].weight
    weight.data = weight.data.clone()
    place = r"Sequential\.0\.weight" if owned else r"SGD\.params\.0"
    with pytest.raises(ValueError, match=rf"^the address of {place} was"):
        step(draw_batch(9))


# What the step itself does that no replay would do again.


def test_a_parameter_without_gradient_is_refused_by_name(loops: list[Loop]) -> None:
    loop = Loop(sgd)
    loop.network.extra = nn.Linear(2, 2)
    loop.optimizer.add_param_group({"params": [*loop.network.extra.parameters()]})
    layers = [*loop.network][:4]
    loop.network.forward = lambda x: nn.Sequential(*layers)(x)
    step = run_before_capture(loops, loop)
    message = r"^Sequential\.extra\.weight, Sequential\.extra\.bias: no gradient when the step was"
    with pytest.raises(ValueError, match=message):
        step(draw_batch(9))


def test_a_parameter_that_is_first_trained_at_the_capture_is_refused(loops: list[Loop]) -> None:
    loop = Loop(sgd)
    loops.append(loop)
    late, calls = loop.network[3].bias.requires_grad_(False), []

    def step(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        calls.append(batch)
        late.requires_grad_(len(calls) > WARMUP)
        return loop.step(batch)

    captured_step = CapturedStep(step, state=(loop.network, loop.optimizer), warmup=WARMUP)
    for seed in range(WARMUP):
        captured_step(draw_batch(seed))
    with pytest.raises(ValueError, match=r"^Sequential\.3\.bias: first trained when"):
        captured_step(draw_batch(9))


class HostCount(torch.optim.SGD):
    """Counts its steps in a Python number, as optimizers with a bias correction may."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["count"] = self.state[param].get("count", 0) + 1
        super().step(closure)


def test_an_optimizer_that_counts_in_python_is_refused(loops: list[Loop]) -> None:
    loop = Loop(lambda params: HostCount(params, lr=1e-2))
    step = run_before_capture(loops, loop)
    with pytest.raises(ValueError, match=r"count was 2 when .* is 3 now.*the step itself changes"):
        step(draw_batch(9))


class TensorCount(torch.optim.SGD):
    """Counts its steps in a tensor in host memory."""

    def step(self, closure: Any = None) -> None:
        for param in self.param_groups[0]["params"]:
            self.state[param].setdefault("count", torch.zeros(())).add_(1)
        super().step(closure)


def test_a_count_in_host_memory_is_refused_where_the_step_is_elsewhere() -> None:
    loop = Loop(lambda params: TensorCount(params, lr=1e-2))
    loop.step(draw_batch(0))
    state = HeldState((loop.network, loop.optimizer))
    with state.held(torch.device("cpu")):
        loop.step(draw_batch(1))
    message = "an optimizer keeps its step count in host memory"
    with pytest.raises(ValueError, match=message), state.held(torch.device("cuda")):
        loop.step(draw_batch(2))


@pytest.mark.parametrize("zero", ["before", "after"])
def test_gradients_of_an_anchored_optimizer_stay_in_place(loops: list[Loop], zero: str) -> None:
    step = run_before_capture(loops, Loop(anchored, zero))
    with pytest.raises(ValueError, match=r"0\.weight,.* and 3 more: .*zero_grad\(set_to_none=Fal"):
        step(draw_batch(9))


def test_autocast_around_the_step_is_refused(loops: list[Loop]) -> None:
    loop = Loop(anchored)
    loops.append(loop)
    step = loop.captured()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="enter it inside"):
        step(draw_batch(0))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        for seed in range(WARMUP + 1):
            step(draw_batch(seed))
    with pytest.raises(ValueError, match=r"is_autocast_enabled\(\) was True .* is False now"):
        step(draw_batch(9))


def test_a_capture_that_fails_says_what_to_do(
    capturing: list[Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: BlindRecorder, function: Function) -> Callable[[], None]:
        function()
        raise RuntimeError("operation not permitted when stream is capturing\nand a stack")

    monkeypatch.setattr(ReplayRecorder, "record", fail)
    loop = Loop(sgd, "before")
    step = run_before_capture(capturing, loop)
    before, gradients = loop.state()[:-1], [param.grad for param in loop.network.parameters()]
    message = r"cannot be captured \(operation not permitted .* capturing\)\. It must read nothing"
    with pytest.raises(ValueError, match=message):
        step(draw_batch(9))
    assert not step.is_captured and are_equal(before, loop.state()[:-1])
    assert all(p.grad is g for p, g in zip(loop.network.parameters(), gradients, strict=True))


# What cannot be captured at all.


def test_optimizers_that_read_on_the_host_are_refused(capturing: list[Loop]) -> None:
    loop = Loop(lambda params: torch.optim.AdamW(params, lr=1e-3))
    with pytest.raises(ValueError, match=r"AdamW\.param_groups\.0: capturable is False.*=True\)"):
        loop.captured()(draw_batch(0))
    state = HeldState(
        (Loop(lambda params: AnchoredAdamW(params, lr=torch.tensor(1e-3))).optimizer,)
    )
    state.check_capturable(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"param_groups\.0: lr is on cpu, want cuda:0"):
        state.check_capturable(torch.device("cuda", 0))


def test_a_generator_of_another_device_is_refused() -> None:
    device = torch.device("cuda", 0)
    with pytest.raises(ValueError, match=r"generators\[0\]: is on cpu, want cuda:0"):
        captured.make_recorder(device, [torch.Generator()])


def test_torch_must_keep_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    with pytest.raises(ValueError, match="unset PYTORCH_NO_CUDA_MEMORY_CACHING, or call the step"):
        captured.make_recorder(torch.device("cuda", 0), [])


@pytest.mark.parametrize(
    ("make_state", "message"),
    [
        (lambda loop: (), "^state: is empty"),
        (lambda loop: (loop.network, loop.step), r"^state\[1\]: got a method, want a torch.nn"),
        (lambda loop: (torch.amp.GradScaler("cpu"),), r"^state\[0\]: a gradient scaler reads on"),
        (
            lambda loop: (loop.network, torch.optim.lr_scheduler.ConstantLR(loop.optimizer)),
            r"^state\[1\]: got a ConstantLR, .*stays outside of the step",
        ),
    ],
)
def test_state_of_another_kind_is_refused(
    make_state: Callable[[Loop], Sequence[object]], message: str
) -> None:
    loop = Loop(sgd)
    with pytest.raises(ValueError, match=message):
        CapturedStep(loop.step, state=make_state(loop))


def test_an_optimizer_of_accelerate_with_a_scaler_is_refused() -> None:
    Accelerator(cpu=True)
    inner = Loop(sgd).optimizer
    optimizer = AcceleratedOptimizer(inner, scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match=r"^state\[0\]: a gradient scaler reads on"):
        HeldState((optimizer,))
    optimizers = HeldState((AcceleratedOptimizer(inner), AcceleratedOptimizer(Loop(sgd).optimizer)))
    assert list(optimizers.optimizers) == ["SGD", "SGD_1"]
    assert optimizers.optimizers["SGD"] is inner


def test_an_optimizer_that_accelerate_lets_wait_is_refused() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    loop = Loop(sgd)
    loop.network, loop.optimizer = accelerator.prepare(loop.network, loop.optimizer)
    with pytest.raises(ValueError, match=r"^state\[1\]: .* of 2 passes a step, .*_steps=1$"):
        loop.captured()


def test_an_optimizer_that_is_not_stepped_at_the_capture_is_refused(loops: list[Loop]) -> None:
    """Every second call is an optimizer step: not that of the capture, the third."""
    loop = Loop(sgd)
    loops.append(loop)
    calls: list[Tensor] = []

    def step(batch: dict[str, Tensor]) -> Tensor:
        loss = loop.network(batch["input"]).square().mean()
        loss.backward()
        calls.append(loss)
        if len(calls) % 2 == 0:
            loop.optimizer.step()
            loop.optimizer.zero_grad(set_to_none=False)
        return loss

    captured_step = CapturedStep(step, state=(loop.network, loop.optimizer), warmup=WARMUP)
    for seed in range(WARMUP):
        captured_step(draw_batch(seed))
    with pytest.raises(ValueError, match=r"^SGD: took no step in the call that was captured"):
        captured_step(draw_batch(9))


def test_an_optimizer_that_the_step_does_not_know_is_refused_beside_one(
    loops: list[Loop],
) -> None:
    loop, other = Loop(sgd), Loop(sgd)
    step = run_before_capture(loops, loop, state=(loop.network, loop.optimizer, other.optimizer))
    with pytest.raises(ValueError, match=r"^SGD_1: took no step .*leave it out of `state`"):
        step(draw_batch(9))


def test_a_step_without_warmup_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup: got 0, want at least 1"):
        Loop(sgd).captured(warmup=0)


def test_modules_of_one_kind_are_told_apart(loops: list[Loop]) -> None:
    loop, other = Loop(sgd), nn.Sequential(nn.Linear(1, 1))
    step = run_before_capture(loops, loop, state=(loop.network, loop.optimizer, other))
    step(draw_batch(7))
    other.eval()
    with pytest.raises(ValueError, match=r"^Sequential_1\.training was True"):
        step(draw_batch(8))


def test_a_network_of_many_processes_is_refused() -> None:
    # As it is made where there are processes to talk to.
    network = object.__new__(nn.parallel.DistributedDataParallel)
    with pytest.raises(ValueError, match=r"state\[0\]: is a DistributedDataParallel network"):
        CapturedStep(lambda: None, state=(network,))
