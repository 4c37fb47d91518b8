"""A captured step is the plain one bit for bit, whatever it is made of."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from fastppt.foreign import captured
from fastppt.foreign.captured import CapturedStep
from fastppt.foreign.indicator import OverfittingIndicator
from fastppt_kernels import AnchoredAdamW
from tests.backend.captured_loops import (
    WARMUP,
    Loop,
    adamw,
    anchored,
    are_equal,
    capturing,
    draw_batch,
    sgd,
)

__all__ = ["capturing"]

TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 8),
    "norm_num_groups": 2,
    "layers_per_block": 1,
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
KINDS = [
    *((anchored, "in place"), (sgd, "in place"), (sgd, "before"), (sgd, "after")),
    *((adamw, "in place"), (adamw, "before"), (adamw, "after")),
]


def check_equals_plain(
    make_optimizer: Callable[..., Any],
    zero: str,
    loops: list[Loop] | None = None,
    device: str = "cpu",
) -> None:
    """Run nine steps plainly and as captured, and compare all that comes of them."""
    plain, other = Loop(make_optimizer, zero, device), Loop(make_optimizer, zero, device)
    captures = loops is not None or device != "cpu"
    if loops is not None:
        loops.append(other)
    step, start, losses = other.captured(), plain.state(), []
    for seed in range(9):
        batch = draw_batch(seed, device)
        wanted, got = plain.step(batch, weight=2.0), step(batch, weight=2.0)
        assert not got["loss"].requires_grad and not got["prediction"].requires_grad
        assert are_equal([*wanted.values()], [*got.values()])
        assert are_equal(plain.state(), other.state()), f"step {seed}"
        assert step.is_captured == (captures and seed >= WARMUP)
        losses.append(got["loss"])
    # Outputs of earlier calls keep their values, and steps move.
    assert len({float(loss) for loss in losses}) == len(losses)
    assert not torch.equal(start[0], plain.state()[0])
    # What watches the call that is captured has gone.
    assert not other.optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize(("make_optimizer", "zero"), KINDS)
def test_replayed_steps_equal_plain_ones(
    capturing: list[Loop], make_optimizer: Callable[..., Any], zero: str
) -> None:
    check_equals_plain(make_optimizer, zero, capturing)


@pytest.mark.parametrize(("make_optimizer", "zero"), [(anchored, "in place"), (sgd, "after")])
def test_on_the_cpu_every_call_is_the_plain_step(
    make_optimizer: Callable[..., Any], zero: str
) -> None:
    check_equals_plain(make_optimizer, zero)


def test_steps_before_the_capture_count_and_the_capture_is_one_step(capturing: list[Loop]) -> None:
    loop, runs = Loop(anchored), []
    capturing.append(loop)

    def step(batch: dict[str, Tensor]) -> Tensor:
        runs.append(batch)
        return loop.step(batch)["loss"]

    captured_step = CapturedStep(
        step, state=(loop.network, loop.optimizer), generators=(loop.generator,), warmup=4
    )
    counts = []
    for seed in range(8):
        captured_step(draw_batch(seed))
        counts.append(int(loop.optimizer.state[loop.network[0].weight]["step"]))
    assert counts == list(range(1, 9)) and len(runs) == 5


def test_a_unet_with_the_indicator_is_replayed_as_it_runs(capturing: list[Loop]) -> None:
    def train(*, captures: bool) -> list[Tensor]:
        loop = Loop(anchored)
        unet, indicator = UNet2DConditionModel(**TINY_UNET), OverfittingIndicator(temperature=50.0)
        base = copy.deepcopy(unet).requires_grad_(False)
        # The range is looked at on the host, on the CPU alone.
        indicator._check_range = lambda timesteps: None
        optimizer = anchored(unet.parameters())
        loop.network, loop.optimizer = nn.ModuleList([unet, indicator]), optimizer
        capturing[:] = [loop]

        def step(noisy: Tensor, *, timesteps: Tensor, texts: tuple[Tensor, Tensor]) -> Tensor:
            with torch.no_grad():
                known = base(noisy, timesteps, texts[0]).sample
            prediction = unet(noisy, timesteps, texts[1]).sample
            loss = indicator.loss(prediction, known, 0.5 * noisy, timesteps)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            return loss

        run: Any = step
        if captures:
            run = CapturedStep(step, state=(unet, indicator, optimizer), warmup=1)
        losses = []
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            noisy = torch.randn(2, 4, 8, 8, generator=generator)
            timesteps = torch.randint(0, 1000, (2,), generator=generator)
            texts = torch.randn(2, 2, 3, 8, generator=generator)
            losses.append(run(noisy, timesteps=timesteps, texts=(texts[0], texts[1])).detach())
        return [torch.stack(losses), indicator.tuned_ema.nan_to_num(), *unet.parameters()]

    plain, replayed = train(captures=False), train(captures=True)
    assert are_equal(plain, replayed)
    assert plain[0][0] != plain[0][4] and plain[1].any()


def test_outputs_that_are_not_cloned_are_overwritten(capturing: list[Loop]) -> None:
    loop = Loop(anchored)
    capturing.append(loop)
    step = loop.captured(clone_outputs=False)
    outputs = [step(draw_batch(seed))["loss"] for seed in range(WARMUP + 3)]
    assert outputs[-1] is outputs[-2] and outputs[WARMUP - 1] is not outputs[WARMUP]


def test_two_captured_steps_share_a_memory(capturing: list[Loop]) -> None:
    plain, other = Loop(anchored), Loop(anchored)
    capturing.append(other)
    first = other.captured()
    second = other.captured(share_memory_with=first)
    for number in range(10):
        batch, weight = draw_batch(number), 1.0 + number % 2
        plain.step(batch, weight)
        (first, second)[number % 2](batch, weight)
    assert first.is_captured and second.is_captured and first._recorder is second._recorder
    assert are_equal(plain.state(), other.state())
    with pytest.raises(ValueError, match="generators: are others than those of share_memory_with"):
        other.captured(share_memory_with=first, generators=())


def test_a_learning_rate_in_a_tensor_is_seen_by_replays(capturing: list[Loop]) -> None:
    def make(params: Any) -> AnchoredAdamW:
        return AnchoredAdamW(params, lr=torch.tensor(1e-2))

    plain, other = Loop(make), Loop(make)
    capturing.append(other)
    step = other.captured()
    for loop, run in ((plain, plain.step), (other, step)):
        schedule = torch.optim.lr_scheduler.ExponentialLR(loop.optimizer, 0.5)
        for seed in range(7):
            run(draw_batch(seed))
            schedule.step()
    assert step.is_captured and are_equal(plain.state(), other.state())


def test_what_accelerate_wraps_is_captured_as_it_is(capturing: list[Loop]) -> None:
    accelerator = Accelerator(cpu=True)
    plain, other = Loop(anchored), Loop(anchored)
    capturing.append(other)
    other.network, other.optimizer = accelerator.prepare(other.network, other.optimizer)
    step = other.captured()
    for seed in range(6):
        plain.step(draw_batch(seed))
        step(draw_batch(seed))
    assert step.is_captured and are_equal(plain.state(), other.state())
    other.optimizer.param_groups[0]["lr"] = 1.0
    with pytest.raises(ValueError, match=r"AnchoredAdamW\.param_groups\.0\.lr was 0\.01"):
        step(draw_batch(9))


def test_code_that_is_compiled_late_is_waited_for(
    capturing: list[Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop(anchored)
    capturing.append(loop)
    step, calls = loop.captured(), []
    # The fifth call compiles the last piece.
    monkeypatch.setattr(captured, "_count_compiled", lambda: min(len(calls), 6))
    for seed in range(9):
        calls.append(step.is_captured)
        step(draw_batch(seed))
    # Six that compile, one that shows that nothing more does.
    assert calls.index(True) == 7
    monkeypatch.setattr(captured, "_count_compiled", lambda: len(calls))
    step = loop.captured()
    for seed in range(18):
        calls.append(False)
        step(draw_batch(seed))
    calls.append(False)
    with pytest.raises(ValueError, match="still compiled anew in step 18"):
        step(draw_batch(18))


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize(("make_optimizer", "zero"), KINDS)
def test_replayed_steps_equal_plain_ones_on_a_gpu(
    make_optimizer: Callable[..., Any], zero: str
) -> None:
    check_equals_plain(make_optimizer, zero, device="cuda")


@pytest.mark.gpu
def test_memory_does_not_grow_from_replay_to_replay() -> None:
    loop = Loop(adamw, "before", "cuda")
    step = loop.captured(clone_outputs=False)
    batch = draw_batch(0, "cuda")
    for _ in range(WARMUP + 2):
        step(batch)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(30):
        step(batch)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


@pytest.mark.gpu
def test_a_tensor_of_another_device_is_refused() -> None:
    loop = Loop(anchored, device="cuda")
    with pytest.raises(ValueError, match=r"batch\['input'\]: is on cpu, want cuda:0.*\.to\('cuda"):
        loop.captured()(draw_batch(0))
    step = loop.captured(state=(loop.network, torch.zeros(1, device="meta")))
    with pytest.raises(ValueError, match="state: is on cuda:0 and meta, want one device"):
        step(draw_batch(0, "cuda"))


CAPTURE = """
import torch
from fastppt.foreign.captured import CapturedStep

total, amount = torch.ones((), device="cuda"), torch.ones((), device="cuda")
other = torch.Generator("cuda")

def step(amount):
    WHAT
    return total.add_(amount)

captured = CapturedStep(step, state=(total,), warmup=1)
captured(amount)
try:
    captured(amount)
except ValueError as error:
    print(error)
assert total.item() == 2.0
assert torch.cuda.current_stream() == torch.cuda.default_stream()
"""


@pytest.mark.gpu
@pytest.mark.parametrize(
    "what",
    [
        "total.item()",
        "total.cpu()",
        "bool(total > 0)",
        "torch.randn(1, device='cuda', generator=other)",
    ],
)
def test_what_cannot_be_captured_is_refused_and_changes_nothing(what: str) -> None:
    """In a process of its own: a capture that fails may end captures for good."""
    code = [sys.executable, "-c", CAPTURE.replace("WHAT", what)]
    run = subprocess.run(code, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("CapturedStep: the step cannot be captured (")
