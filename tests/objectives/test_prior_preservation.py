"""The loss of photos and class images is that of the equation, and so is every gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastppt.config import RunConfig
from fastppt.families.loading import load_family
from fastppt.objectives.prior_preservation import join_halves, mean_of_halves
from fastppt.training.batch import Draws, draw
from fastppt.training.metric_names import loss_names
from fastppt.training.step import accumulate_gradients, run_step
from tests.training.class_steps import PRIOR, class_stage, write_class_pictures
from tests.training.plain_step import PlainNetwork

MakeConfig = Callable[..., RunConfig]
DENOISING = "stage.0.objectives.denoising"
CASES = [
    ("mini-sdxl", False),
    *(pytest.param(name, False, marks=pytest.mark.slow) for name in ("mini-sd", "mini-sd3")),
    *(pytest.param(name, True, marks=pytest.mark.slow) for name in ("mini-sd", "mini-sdxl")),
]


def class_draws(step: object) -> Draws:
    """What the class generator draws next: of a batch, in the order of the photos' draws."""
    generator, shape = step.class_generator, step.class_latents.latent_shape
    count, dtype = step.stage.batch_size, step.class_latents.posteriors.dtype
    return Draws(
        photos=torch.randint(step.class_latents.num_photos, (count,), generator=generator),
        timesteps=step.family.draw_timesteps(count, generator),
        augmentations=torch.rand(count, generator=generator),
        view_fractions=torch.rand(count, generator=generator),
        posterior_normals=torch.randn(count, *shape, generator=generator, dtype=dtype),
        noise=torch.randn(count, *shape, generator=generator, dtype=dtype),
    )


def class_sizes(model: str) -> Tensor:
    """What the network is told of a picture of 80x72 pixels, cut to 64x64 out of 71x64."""
    if model != "mini-sdxl":
        return torch.empty(0, dtype=torch.float64)
    return torch.tensor([72, 80, 0, 3, 64, 64], dtype=torch.float64)


@pytest.mark.parametrize(("model", "min_snr"), CASES)
def test_loss_and_every_gradient_follow_the_equation(
    make_config: MakeConfig, tmp_path: Path, model: str, min_snr: bool
) -> None:
    """weight * mean_B L(photo) + prior weight * mean_B L(class image), two passes averaged."""
    weighting = {f"{DENOISING}.weighting": "min_snr", f"{DENOISING}.snr_gamma": 3.0}
    stage = class_stage(
        make_config,
        write_class_pictures(tmp_path / "class"),
        model,
        torch.float64,
        **{f"{PRIOR}.weight": 0.6, f"{DENOISING}.weight": 1.7, "stage.0.batch_size": 3},
        **{"stage.0.gradient_accumulation": 2, "stage.0.trainables.lora.alpha": 4.0},
        **{"photos.resolution": 64},
        **(weighting if min_snr else {}),
    )
    step, adapters = stage.step, stage.trainables.lora
    with torch.no_grad():
        adapters.arena.flat.add_(0.02 * torch.randn_like(adapters.arena.flat))
    states = {name: generator.get_state() for name, generator in step.generators.items()}
    step.optimizer.zero_grad(set_to_none=False)
    for _ in range(2):
        accumulate_gradients(step)
    noted = dict(zip(loss_names(step.stage.objectives), step.losses.tolist(), strict=True))
    for name, generator in step.generators.items():
        generator.set_state(states[name])

    fresh = load_family(stage.config.model, dtype=torch.float64)
    network = PlainNetwork(fresh, model)
    leaves = {
        pair.name: tuple(t.detach().clone().requires_grad_() for t in (pair.down, pair.up))
        for pair in adapters.pairs
    }
    weights = dict(network.weights)
    for name, (down, up) in leaves.items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + up @ down
    texts = {"latents": "a photo of sks robot", "class_latents": "a photo of a robot"}
    prompts = {half: fresh.encode_prompts([text]) for half, text in texts.items()}
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
    alphas = torch.cumprod(1 - betas, 0).double()
    totals: dict[str, Tensor] = {"latents": torch.zeros(()), "class_latents": torch.zeros(())}
    for _ in range(2):
        for half in totals:
            draws = draw(step) if half == "latents" else class_draws(step)
            sizes = step.prompts.sizes[draws.photos]
            if half == "class_latents":
                sizes = class_sizes(model).expand(3, -1)
            mean, std = getattr(step, half).posteriors[draws.photos, 0].unbind(1)
            latents = mean + std * draws.posterior_normals
            noisy, target = network.noised(latents, draws.noise, draws.timesteps)
            text = prompts[half][torch.zeros(3, dtype=torch.int64)]
            prediction = network(weights, noisy, draws.timesteps, text, sizes)[0]
            losses = ((prediction - target) ** 2).mean((1, 2, 3))
            if min_snr:
                ratio = alphas[draws.timesteps] / (1 - alphas[draws.timesteps])
                share = torch.minimum(ratio, torch.tensor(3.0)) / (ratio + network.velocity)
                losses = share * losses
            totals[half] = totals[half] + losses.sum() / 3 / 2
    loss = 1.7 * totals["latents"] + 0.6 * totals["class_latents"]
    loss.backward()
    assert noted["denoising"] == pytest.approx(totals["latents"].item(), rel=1e-12)
    assert noted["prior_preservation"] == pytest.approx(totals["class_latents"].item(), rel=1e-12)
    assert noted["loss"] == pytest.approx(loss.item(), rel=1e-12)
    flat, gradient = adapters.arena.flat.detach(), adapters.arena.grad
    for pair in adapters.pairs:
        for values, leaf in zip((pair.down, pair.up), leaves[pair.name], strict=True):
            start = values.storage_offset() - flat.storage_offset()
            ours = gradient[start : start + values.numel()].view(values.shape)
            assert leaf.grad.norm() > 0
            assert (ours - leaf.grad).norm() <= 1e-9 * leaf.grad.norm()


def test_the_photos_half_is_drawn_as_without_class_images(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """And weight 0 takes the very steps that the recipe takes without them."""
    folder = write_class_pictures(tmp_path / "class")
    with_prior = class_stage(
        make_config, folder, "mini-sd3", torch.float64, **{f"{PRIOR}.weight": 0.0}
    )
    step = with_prior.step
    plain = class_stage(make_config, folder, "mini-sd3", torch.float64)
    for name in ("class_latents", "class_prompts", "class_generator"):
        object.__setattr__(plain.step, name, None)
    objectives = plain.step.stage.objectives.model_copy(update={"prior_preservation": None})
    stage = plain.step.stage.model_copy(update={"objectives": objectives})
    object.__setattr__(plain.step, "stage", stage)
    object.__setattr__(plain.step, "losses", plain.step.losses[:2].clone())
    for each in (with_prior, plain):
        each.step.learning_rate.fill_(1e-3)
        for _ in range(3):
            run_step(each.step)
    assert torch.equal(step.samples, plain.step.samples)
    assert torch.equal(step.generator.get_state(), plain.step.generator.get_state())
    ours, theirs = (each.trainables.lora.arena.flat.detach() for each in (with_prior, plain))
    assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()


def test_halves_are_means_of_their_own() -> None:
    joined = join_halves(torch.tensor([1.0, 3.0]), torch.tensor([10.0, 30.0]))
    assert [float(half) for half in mean_of_halves(joined)] == [2.0, 20.0]
