"""One step: its loss and update are those of the equations, its chance its own, no host reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from fastppt.config import ModelConfig, RunConfig
from fastppt.data.photos import find_photos
from fastppt.families.base import Family
from fastppt.families.loading import load_family
from fastppt.trainables.lora import LoraAdapters
from fastppt.training.batch import draw
from fastppt.training.build import build_trainables
from fastppt.training.encoding import encode
from fastppt.training.loop import resolve
from fastppt.training.metric_names import METRICS
from fastppt.training.ring import MetricRing
from fastppt.training.run import new_generator
from fastppt.training.schedule import learning_rate_factor
from fastppt.training.stage import build_steps
from fastppt.training.step import Step, run_step
from fastppt_kernels.testing import ForbidHostReads

MakeConfig = Callable[..., RunConfig]


def prepared(config: RunConfig, family: Family) -> tuple[Step, LoraAdapters]:
    """A step of the first stage, and the adapters it trains, in float64 if the family is."""
    config = resolve(config, family)
    dtype = torch.promote_types(family.dtype, torch.float32)
    trainables = build_trainables(config, family, dtype=dtype)
    adapters = trainables.lora
    photos = find_photos(config.photos.folder)
    buckets, _ = encode(config, family, photos, Console(quiet=True))
    ring = MetricRing(METRICS, 64, family.device)
    generator = new_generator(config, family)
    (step,) = build_steps(config, config.stage[0], family, trainables, buckets, ring, generator)
    step.learning_rate.fill_(config.stage[0].trainables.lora.learning_rate)
    return step, adapters


def metrics_of(step: Step, num_steps: int) -> list[dict[str, float]]:
    step.ring.start_read(0, num_steps)
    return step.ring.finish_read()


@pytest.mark.parametrize("recipe", ["lora", "ppt-lora"])
@pytest.mark.parametrize("form", ["raw", "effective", "decoupled"])
def test_ten_steps_make_no_host_read(
    family: Family, make_config: MakeConfig, recipe: str, form: str
) -> None:
    settings = {} if recipe == "lora" else {"stage.0.objectives.anchor.form": form}
    step, _ = prepared(make_config(recipe, **settings), family)
    with ForbidHostReads():
        for _ in range(10):
            run_step(step)


@pytest.mark.parametrize(
    "read",
    [
        *(torch.Tensor.item, bool, float, torch.Tensor.nonzero, torch.Tensor.unique),
        lambda tensor: torch.equal(tensor, tensor),
        lambda tensor: tensor[None][tensor[None] > 0],
        lambda tensor: tensor + torch.tensor(2.0),
    ],
)
def test_a_host_read_does_not_pass_unseen(read: Callable[[Tensor], object]) -> None:
    with pytest.raises(AssertionError), ForbidHostReads():
        read(torch.ones(()))


def test_a_step_moves_no_memory(family: Family, make_config: MakeConfig) -> None:
    step, adapters = prepared(make_config(), family)
    state = step.optimizer.state[adapters.arena.flat]
    fixed = [adapters.arena.flat, adapters.arena.grad, step.ring.rows, step.learning_rate]
    fixed += [value for value in state.values() if isinstance(value, Tensor)]
    before = [tensor.data_ptr() for tensor in fixed]
    for _ in range(3):
        run_step(step)
    assert [tensor.data_ptr() for tensor in fixed] == before
    assert all(tensor.grad is not None for tensor in adapters.arena.tensors)


@contextmanager
def replayed_draws(step: Step) -> Iterator[None]:
    """Let the step's generator start again from where it is when the block ends."""
    state = step.generator.get_state()
    yield
    step.generator.set_state(state)


Leaves = dict[str, tuple[Tensor, Tensor]]


def oracle_loss(step: Step, adapters: LoraAdapters, network: nn.Module, leaves: Leaves) -> Tensor:
    """The loss from its equations, with the weights W + s B A formed whole in a stock network."""
    stage = step.stage
    formed = dict(network.named_parameters())
    penalty = torch.zeros((), dtype=torch.float64)
    for pair in adapters.pairs:
        down, up = leaves[pair.name]
        delta = pair.scale * (up @ down)
        formed[f"{pair.name}.weight"] = formed[f"{pair.name}.weight"] + delta
        penalty = penalty + delta.square().sum()
    alphas = torch.cumprod(
        1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2, 0
    ).double()
    total = torch.zeros((), dtype=torch.float64)
    for _ in range(stage.gradient_accumulation):
        draws = draw(step)
        for row in range(stage.batch_size):
            photo, timestep = draws.photos[row], draws.timesteps[row]
            mean, std = step.latents.posteriors[photo, 0]
            latent = mean + std * draws.posterior_normals[row]
            signal = alphas[timestep]
            noisy = signal.sqrt() * latent + (1 - signal).sqrt() * draws.noise[row]
            prompt = step.prompts.subject(photo[None])
            prediction = torch.func.functional_call(
                network,
                formed,
                (noisy[None], timestep[None], prompt.tokens),
                {
                    "added_cond_kwargs": {
                        "text_embeds": prompt.pooled,
                        "time_ids": step.prompts.sizes[photo][None],
                    }
                },
            ).sample[0]
            velocity = signal.sqrt() * draws.noise[row] - (1 - signal).sqrt() * latent
            total = total + (prediction - velocity).square().mean()
    denoising = total / (stage.batch_size * stage.gradient_accumulation)
    anchor = stage.objectives.anchor
    return 1.7 * denoising + (anchor.weight * penalty if anchor is not None else 0)


@pytest.mark.parametrize("recipe", ["lora", "ppt-lora"])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (2, 3)])
def test_five_steps_follow_the_equations(
    family_float64: Family,
    make_config: MakeConfig,
    recipe: str,
    batch_size: int,
    accumulation: int,
) -> None:
    settings = {
        "stage.0.batch_size": batch_size,
        "stage.0.gradient_accumulation": accumulation,
        "stage.0.optimizer.max_grad_norm": 0.05,
        "stage.0.optimizer.beta1": 0.7,
        "stage.0.optimizer.beta2": 0.9,
        "stage.0.optimizer.epsilon": 1e-6,
        "stage.0.optimizer.weight_decay": 0.5,
        "stage.0.objectives.denoising.weight": 1.7,
    }
    if recipe == "ppt-lora":
        settings["stage.0.objectives.anchor.weight"] = 30.0
    step, adapters = prepared(make_config(recipe, **settings), family_float64)
    start = {pair.name: (pair.down.clone(), pair.up.clone()) for pair in adapters.pairs}
    leaves = {
        name: (down.clone().requires_grad_(), up.clone().requires_grad_())
        for name, (down, up) in start.items()
    }
    stock = load_family(ModelConfig(path="mini-sdxl", device="cpu"), dtype=torch.float64)
    tensors = [leaf for pair in leaves.values() for leaf in pair]
    rate = step.stage.trainables.lora.learning_rate
    reference = torch.optim.AdamW(tensors, lr=rate, betas=(0.7, 0.9), eps=1e-6, weight_decay=0.5)
    losses = []
    for _ in range(5):
        with replayed_draws(step):
            reference.zero_grad()
            loss = oracle_loss(step, adapters, stock.network, leaves)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(tensors, 0.05)
            reference.step()
            losses.append(loss.item())
        run_step(step)
    assert [row["loss"] for row in metrics_of(step, 5)] == pytest.approx(losses, rel=1e-6)
    for pair in adapters.pairs:
        for ours, theirs, begin in zip(
            (pair.down, pair.up), leaves[pair.name], start[pair.name], strict=True
        ):
            drift = (theirs.detach() - begin).abs().max()
            assert drift > 0, pair.name
            # Adam divides by the root of the squared gradient plus epsilon, which enlarges the
            # rounding of gradients near zero.
            assert ((ours - begin) - (theirs.detach() - begin)).abs().max() <= 1e-7 * drift


def test_the_same_seed_draws_the_same_for_every_recipe(make_config: MakeConfig) -> None:
    drawn = []
    for recipe in ("lora", "ppt-lora"):
        family = load_family(ModelConfig(path="mini-sdxl", device="cpu"))
        step, _ = prepared(make_config(recipe), family)
        run_step(step)
        drawn.append(draw(step))
    for name in vars(drawn[0]):
        assert torch.equal(getattr(drawn[0], name), getattr(drawn[1], name)), name


def test_draws_do_not_touch_nor_follow_the_global_generator(
    family: Family, make_config: MakeConfig
) -> None:
    step, _ = prepared(make_config(), family)
    with replayed_draws(step):
        first = draw(step)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    second = draw(step)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.noise, second.noise)


def test_all_photos_are_drawn_evenly(family: Family, make_config: MakeConfig) -> None:
    step, _ = prepared(make_config(**{"stage.0.batch_size": 5000}), family)
    counts = draw(step).photos.bincount(minlength=5)
    assert (counts - 1000).abs().max() < 4 * 30


def test_other_seeds_draw_and_begin_differently(make_config: MakeConfig, family: Family) -> None:
    step, adapters = prepared(make_config(seed=0), family)
    other, others = prepared(
        make_config(seed=1), load_family(ModelConfig(path="mini-sdxl", device="cpu"))
    )
    assert not torch.equal(adapters.arena.flat, others.arena.flat)
    assert not torch.equal(draw(step).noise, draw(other).noise)
    assert learning_rate_factor(step.stage, 0) == 1.0


@pytest.mark.gpu
def test_ten_steps_on_a_gpu_do_not_synchronise(make_config: MakeConfig) -> None:
    family = load_family(ModelConfig(path="mini-sdxl", device="cuda"))
    step, _ = prepared(make_config(**{"model.device": "cuda"}), family)
    run_step(step)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            run_step(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(row["grad_norm"] > 0 for row in metrics_of(step, 11))
