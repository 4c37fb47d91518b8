"""The recipes of Adaptive Personalized Training, step by step: each part does what it says."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastppt.config import RunConfig
from fastppt.config_io import build_config
from fastppt.trainables.trainables import Trainables
from fastppt.training.batch import choose_views, draw, make_batch
from fastppt.training.metric_names import loss_names
from fastppt.training.step import accumulate_gradients, run_step
from tests.training.objective_steps import (
    OBJECTIVES,
    ONE_FAST,
    load,
    metrics_of,
    prepared_trainables,
    stir,
)

MakeConfig = Callable[..., RunConfig]

ADAPTIVE = {f"{OBJECTIVES}.denoising.weighting": "adaptive"}
FEATURES = {f"{OBJECTIVES}.feature_alignment.weight": 30.0}
ATTENTION = {f"{OBJECTIVES}.attention_alignment.weight": 3e-4}
# The cumulative ablation of the paper, and what each line adds to the one before.
ABLATION = {"apt-base": {}, "apt-ata": ADAPTIVE, "apt-ata-rs": FEATURES, "apt": ATTENTION}
# A small run's adapters; the rates stay those of the recipe.
SMALL = {"photos.views": 3, "stage.0.trainables.text_encoder_lora.rank": 2}


def values_of(trainables: Trainables) -> dict[str, Tensor]:
    return {name: arena.flat.detach().clone() for name, arena in trainables.arenas.items()}


def test_the_recipes_have_the_paper_s_settings() -> None:
    config = build_config("apt")
    (stage,) = config.stage
    lora, text = stage.trainables.lora, stage.trainables.text_encoder_lora
    assert lora is not None and text is not None
    assert (lora.rank, lora.learning_rate, lora.targets) == (32, 5e-5, None)
    assert (text.rank, text.learning_rate) == (32, 5e-6)
    assert stage.batch_size == 1 and stage.base_every == 1
    tokens, prompts = stage.trainables.tokens, config.prompts
    assert tokens is not None and (tokens.vectors, tokens.init) == (1, None)
    assert (prompts.subject, prompts.template) == ("{token}", "a photo of {subject}")
    assert prompts.class_prompt == "a photo of {class_noun}"
    denoising = stage.objectives.denoising
    assert denoising is not None
    assert (denoising.bins, denoising.smoothing, denoising.max_augmentation) == (10, 0.1, 0.8)
    # That of the family: 1000, and 100 for sd.
    assert denoising.temperature is None
    assert (config.photos.max_zoom_out, config.photos.max_rotation) == (3.0, 15.0)
    features, attention = stage.objectives.feature_alignment, stage.objectives.attention_alignment
    assert features is not None and (features.weight, features.layers) == (30.0, None)
    assert attention is not None and (attention.weight, attention.layers) == (3e-4, None)
    assert stage.objectives.anchor is None


def test_each_line_of_the_ablation_adds_one_part_to_the_line_before() -> None:
    so_far: dict[str, object] = {}
    for recipe, part in ABLATION.items():
        so_far |= part
        built = build_config("apt-base", settings=list(so_far.items()))
        recipe_config = build_config(recipe)
        assert built.model_copy(update={"recipe": recipe}) == recipe_config


@pytest.mark.parametrize("model", ONE_FAST)
def test_every_recipe_of_the_ablation_moves_all_that_it_trains(
    make_config: MakeConfig, model: str
) -> None:
    terms: list[tuple[str, ...]] = []
    for recipe in ABLATION:
        step, trainables = prepared_trainables(
            make_config(recipe, **{"model.path": model}, **SMALL), load(model)
        )
        before = values_of(trainables)
        assert before.keys() == {"lora", "text_encoder_lora", "tokens"}
        for number in range(2):
            run_step(step, number)
        for name, values in values_of(trainables).items():
            assert not torch.equal(values, before[name]), name
        terms.append(loss_names(step.stage.objectives))
        assert all(row["skipped"] == 0 for row in metrics_of(step, 2))
    added = [set(after) - set(before) for before, after in pairwise(terms)]
    assert added == [
        {"gamma", "prediction_difference"},
        {"feature_mean", "feature_std"},
        {"attention_alignment"},
    ]


@pytest.mark.parametrize(
    ("part", "names"),
    [
        (ADAPTIVE, {"gamma"}),
        (FEATURES, {"feature_mean", "feature_std"}),
        (ATTENTION, {"attention_alignment"}),
    ],
    ids=["adaptive training adjustment", "representation stabilization", "attention alignment"],
)
def test_each_part_can_be_switched_on_alone(
    make_config: MakeConfig, part: dict[str, object], names: set[str]
) -> None:
    """Its terms alone are in the loss, with its weight, and they have a gradient."""
    step, trainables = prepared_trainables(
        make_config("apt-base", **SMALL, **part), load("mini-sdxl")
    )
    stir(trainables.lora)
    if step.indicator is not None:
        step.indicator.base_ema.fill_(1.0)
        step.indicator.tuned_ema.fill_(0.9)
    plain, plain_trainables = prepared_trainables(
        make_config("apt-base", **SMALL), load("mini-sdxl")
    )
    stir(plain_trainables.lora)
    accumulate_gradients(step)
    accumulate_gradients(plain)
    found = dict(zip(loss_names(step.stage.objectives), step.losses.tolist(), strict=True))
    assert found.keys() == {"loss", "denoising", "prediction_difference", *names}
    weights = {"denoising": 1.0, "feature_mean": 30.0, "feature_std": 30.0}
    weights["attention_alignment"] = 3e-4
    wanted = sum(weights.get(name, 0.0) * found[name] for name in found)
    assert found["loss"] == pytest.approx(wanted, rel=1e-5)
    assert all(found[name] > 0 for name in names)
    for name, arena in trainables.arenas.items():
        assert not torch.equal(arena.grad, plain_trainables.arenas[name].grad), name


@pytest.mark.parametrize("model", ONE_FAST)
def test_adaptive_training_is_plain_training_bit_for_bit_where_gamma_is_zero(
    make_config: MakeConfig, model: str
) -> None:
    ends = []
    # So small a temperature makes every gamma zero.
    never = {f"{OBJECTIVES}.denoising.temperature": 1e-30}
    for recipe, settings in (("apt-base", {}), ("apt-ata", never)):
        config = make_config(recipe, **{"model.path": model}, **SMALL, **settings)
        step, trainables = prepared_trainables(config, load(model))
        for number in range(3):
            run_step(step, number)
        ends.append(values_of(trainables))
    for name, values in ends[0].items():
        assert torch.equal(values, ends[1][name]), name


def test_samples_of_a_bin_that_is_overfitted_through_and_through_have_no_gradient(
    make_config: MakeConfig,
) -> None:
    config = make_config("apt-ata", **SMALL, **{"stage.0.batch_size": 6})
    step, trainables = prepared_trainables(config, load("mini-sdxl"))
    state = step.generator.get_state()
    bins = draw(step).timesteps // 100
    step.generator.set_state(state)
    assert len(bins.unique()) > 2
    forced = bins == bins[0]
    # gamma = 1 where the tuned network is far ahead, 0 where it is far behind.
    step.indicator.base_ema.fill_(1.0)
    step.indicator.tuned_ema.fill_(9.0)
    step.indicator.base_ema[bins[0]], step.indicator.tuned_ema[bins[0]] = 9.0, 1.0
    gradients: list[Tensor] = []
    predict = step.family.predict

    def watched(*inputs: object) -> Tensor:
        prediction = predict(*inputs)
        if prediction.requires_grad:
            prediction.register_hook(gradients.append)
        return prediction

    step.family.predict = watched
    accumulate_gradients(step)
    (gradient,) = gradients
    for row, is_forced in enumerate(forced.tolist()):
        assert bool(gradient[row].any()) is not is_forced
    assert all(arena.grad.any() for arena in trainables.arenas.values())

    # And where all bins are forced, nothing that is trained has one.
    step.optimizer.zero_grad(set_to_none=False)
    step.indicator.base_ema.fill_(9.0)
    step.indicator.tuned_ema.fill_(1.0)
    accumulate_gradients(step)
    for name, arena in trainables.arenas.items():
        assert not arena.grad.any(), name


def test_augmented_views_are_drawn_as_often_as_gamma_says_in_each_bin(
    make_config: MakeConfig,
) -> None:
    """Over 2,000 draws: a chi-square test of the counts by bin."""
    settings = {"stage.0.batch_size": 2000, f"{OBJECTIVES}.denoising.temperature": 1000.0}
    config = make_config("apt", **SMALL, **settings)
    step, _ = prepared_trainables(config, load("mini-sdxl"))
    gammas = [0.0, 0.1, 0.25, 0.5, 0.7, 0.79, 0.9, 1.0, 0.3, torch.nan]
    shares = [0.0, 0.1, 0.25, 0.5, 0.7, 0.79, 0.8, 0.8, 0.3, 0.0]
    # gamma = 1 - exp(-1000 (base - tuned)); a bin that was not seen is NaN.
    tuned = torch.zeros(10, dtype=torch.float64)
    base = tuned - torch.log1p(-torch.tensor(gammas, dtype=torch.float64)) / 1000
    step.indicator.tuned_ema.copy_(tuned)
    step.indicator.base_ema.copy_(base.clamp(max=1.0))
    draws = draw(step)
    views = choose_views(step, draws)
    statistic, freedom = 0.0, 0
    for index, share in enumerate(shares):
        inside = draws.timesteps // 100 == index
        number, augmented = int(inside.sum()), int((views[inside] > 0).sum())
        assert number > 100
        if share == 0:
            assert augmented == 0
            continue
        variance = number * share * (1 - share)
        statistic, freedom = statistic + (augmented - number * share) ** 2 / variance, freedom + 1
    assert chi_square_tail(statistic, freedom) > 1e-4
    # The views themselves are drawn alike.
    counts = views[views > 0].bincount(minlength=4)[1:].double()
    even = counts.sum() / 3
    assert chi_square_tail(float(((counts - even) ** 2 / even).sum()), 2) > 1e-4
    # The latents are those of the views.
    latents = step.latents.posteriors[draws.photos, views]
    mean, std = latents.unbind(1)
    seen = make_batch_latents(step, draws)
    torch.testing.assert_close(seen, mean + std * draws.posterior_normals)


def make_batch_latents(step: object, draws: object) -> Tensor:
    """The latents that a batch of these draws hides in its noise."""
    seen: list[Tensor] = []
    add_noise = step.family.add_noise

    def watched(latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        seen.append(latents)
        return add_noise(latents, noise, timesteps)

    step.family.add_noise = watched
    make_batch(step, draws)
    return seen[0]


def chi_square_tail(statistic: float, freedom: int) -> float:
    """P(X >= statistic) of a chi-square distribution."""
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
