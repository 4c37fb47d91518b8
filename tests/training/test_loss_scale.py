"""float16 runs: gradients survive, a step that overflows is skipped, the host reads nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from fastppt.config import ModelConfig, RunConfig
from fastppt.data.photos import find_photos
from fastppt.families.loading import load_family
from fastppt.trainables.lora import LoraAdapters
from fastppt.training.build import build_trainables
from fastppt.training.encoding import encode
from fastppt.training.loop import resolve
from fastppt.training.loss_scale import GROWTH_INTERVAL, START, LossScale
from fastppt.training.metric_names import METRICS
from fastppt.training.ring import MetricRing
from fastppt.training.run import new_generator
from fastppt.training.stage import build_steps
from fastppt.training.step import Step, run_step
from fastppt_kernels.testing import ForbidHostReads

MakeConfig = Callable[..., RunConfig]
CPU = torch.device("cpu")
# A latent of SDXL has 64 times the elements of a mini one, so its mean's gradients are so small.
FULL_SIZE_WEIGHT = 1 / 64


def prepared(
    make_config: MakeConfig, precision: str, device: str = "cpu", **settings: object
) -> tuple[Step, LoraAdapters]:
    model = ModelConfig(path="mini-sdxl", device=device, precision=precision)
    family = load_family(model)
    given = {"model.precision": precision, "model.device": device, **settings}
    config = resolve(make_config(**given), family)
    trainables = build_trainables(config, family)
    adapters = trainables.lora
    photos = find_photos(config.photos.folder)
    buckets, _ = encode(config, family, photos, Console(quiet=True))
    ring = MetricRing(METRICS, 64, family.device)
    generator = new_generator(config, family)
    (step,) = build_steps(config, config.stage[0], family, trainables, buckets, ring, generator)
    step.learning_rate.fill_(1e-3)
    return step, adapters


def first_gradients(step: Step, adapters: LoraAdapters) -> Tensor:
    """What the optimizer is given in the first step; nothing moves."""
    for pair in adapters.pairs:
        # At the start the up-projections are zero and hide half of the gradients.
        pair.up.fill_(0.01)
    adapters.refresh()
    gradients = []
    step.optimizer.step = lambda **_: gradients.append(adapters.arena.grad.clone())
    run_step(step)
    return gradients[0]


def drift(step: Step, adapters: LoraAdapters, num_steps: int) -> Tensor:
    start = adapters.arena.flat.detach().clone()
    for _ in range(num_steps):
        run_step(step)
    return adapters.arena.flat.detach() - start


def error(given: Tensor, wanted: Tensor) -> float:
    return float((given - wanted).norm() / wanted.norm())


def test_a_float16_run_learns_what_a_float32_run_does(make_config: MakeConfig) -> None:
    wanted = drift(*prepared(make_config, "fp32"), 12)
    step, adapters = prepared(make_config, "fp16")
    assert step.family.network.conv_in.weight.dtype == torch.float16
    assert adapters.arena.flat.dtype == torch.float32
    given = drift(step, adapters, 12)
    assert F.cosine_similarity(given, wanted, dim=0) > 0.999
    assert error(given, wanted) < 0.05


def test_scaled_gradients_are_nearer_to_those_of_float32(make_config: MakeConfig) -> None:
    weight = {"stage.0.objectives.denoising.weight": FULL_SIZE_WEIGHT}
    wanted = first_gradients(*prepared(make_config, "fp32", **weight))
    scaled = first_gradients(*prepared(make_config, "fp16", **weight))
    step, adapters = prepared(make_config, "fp16", **weight)
    plain = first_gradients(replace(step, loss_scale=None), adapters)
    # float16 rounds by 2^-11 an operation.
    assert error(scaled, wanted) < 0.01
    assert error(plain, wanted) > 3 * error(scaled, wanted)
    lost_plain, lost_scaled = (((g == 0) & (wanted != 0)).sum() for g in (plain, scaled))
    assert lost_plain > 100 * lost_scaled


def test_the_reported_loss_is_that_of_float32(make_config: MakeConfig) -> None:
    rows = []
    for precision in ("fp32", "fp16"):
        step, _ = prepared(make_config, precision, **{"stage.0.gradient_accumulation": 2})
        run_step(step)
        step.ring.start_read(0, 1)
        rows += step.ring.finish_read()
    for name in ("loss", "denoising", "grad_norm"):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=0.01), name


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_skips_the_step_and_halves_the_scale(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    step, adapters = prepared(make_config, "fp16")
    run_step(step)
    state = step.optimizer.state[adapters.arena.flat]
    fixed = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    before = {name: value.clone() for name, value in fixed.items()}
    parameters = adapters.arena.flat.detach().clone()
    # What a pass finds there it adds to.
    adapters.arena.grad[5] = bad
    run_step(step)
    assert step.loss_scale.scale == START / 2 and step.loss_scale.good_steps == 0
    assert torch.equal(adapters.arena.flat.detach(), parameters)
    assert all(torch.equal(fixed[name], before[name]) for name in fixed)
    assert not adapters.arena.grad.any()
    run_step(step)
    assert step.loss_scale.scale == START / 2 and step.loss_scale.good_steps == 1
    assert not torch.equal(adapters.arena.flat.detach(), parameters)
    assert adapters.arena.flat.isfinite().all()


def test_a_scale_that_overflows_comes_down_until_steps_are_taken(make_config: MakeConfig) -> None:
    step, adapters = prepared(make_config, "fp16")
    step.loss_scale.scale.fill_(2.0**30)
    moved = drift(step, adapters, 20)
    assert step.loss_scale.scale < 2.0**30 and moved.any() and moved.isfinite().all()


def test_the_scale_follows_the_rule_of_torchs_scaler() -> None:
    ours = LossScale(CPU)
    theirs = torch.amp.GradScaler("cpu")
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs.scale(torch.zeros(()))  # makes its state
    assert ours.scale.item() == START == theirs.get_scale()
    assert theirs.get_growth_interval() == GROWTH_INTERVAL
    bad_steps = {3, 5, GROWTH_INTERVAL + 6, GROWTH_INTERVAL + 100}
    for number in range(2 * GROWTH_INTERVAL + 200):
        value = float("inf") if number in bad_steps else 3.0
        gradient = torch.full((3,), value * float(ours.scale))
        parameter.grad = gradient.clone()
        skip = ours.unscale_([gradient], torch.zeros(()))
        assert bool(skip) == (number in bad_steps)
        assert skip or gradient.tolist() == [3.0] * 3
        theirs.step(optimizer)
        theirs.update()
        assert ours.scale.item() == theirs.get_scale(), number


def test_float16_steps_make_no_host_read(make_config: MakeConfig) -> None:
    step, _ = prepared(make_config, "fp16")
    with ForbidHostReads():
        for _ in range(3):
            run_step(step)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_precisions_have_no_loss_scale(make_config: MakeConfig, precision: str) -> None:
    step, _ = prepared(make_config, precision)
    assert step.loss_scale is None


@pytest.mark.gpu
def test_float16_steps_on_a_gpu_learn_and_do_not_synchronise(make_config: MakeConfig) -> None:
    wanted = drift(*prepared(make_config, "fp32", "cuda"), 12)
    step, adapters = prepared(make_config, "fp16", "cuda")
    run_step(step)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            run_step(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    given = drift(*prepared(make_config, "fp16", "cuda"), 12)
    assert F.cosine_similarity(given, wanted, dim=0) > 0.99
    assert adapters.arena.flat.isfinite().all()
