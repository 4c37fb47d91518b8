"""The step with all objectives: every gradient is that of the equations, on every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastppt.config import RunConfig
from fastppt.families.names import MINI_MODELS
from fastppt.trainables.lora import LoraAdapters
from fastppt.training.batch import choose_views, draw, make_batch
from fastppt.training.metric_names import METRICS, loss_names
from fastppt.training.step import accumulate_gradients, base_pass, needs_base_pass, run_step
from fastppt_kernels.testing import ForbidHostReads
from tests.training.objective_steps import (
    APT,
    OBJECTIVES,
    load,
    metrics_of,
    prepared,
    stir,
)
from tests.training.plain_step import PlainNetwork, plain_terms

MakeConfig = Callable[..., RunConfig]


def captioned(photos: Path, tmp_path: Path) -> Path:
    """The demo photos; one has a caption, so that prompts of different columns meet in a batch."""
    folder = tmp_path / "captioned"
    folder.mkdir()
    paths = sorted(photos.glob("*"))[:3]
    for path in paths:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / paths[1].name).with_suffix(".txt").write_text("in the snow a red {subject} at night")
    return folder


@pytest.mark.parametrize("model", MINI_MODELS)
def test_gradients_of_all_objectives_follow_the_equations(
    make_config: MakeConfig, photos: Path, tmp_path: Path, model: str
) -> None:
    settings = APT | {
        "model.path": model,
        "photos.folder": str(captioned(photos, tmp_path)),
        # At 32 the middle of mini-sd is a single pixel, whose attention is no choice.
        "photos.resolution": 64,
        "stage.0.batch_size": 3,
        "stage.0.gradient_accumulation": 2,
        f"{OBJECTIVES}.denoising.weight": 1.7,
        f"{OBJECTIVES}.feature_alignment.weight": 0.3,
        f"{OBJECTIVES}.attention_alignment.weight": 0.02,
    }
    step, adapters = prepared(make_config("lora", **settings), load(model, torch.float64))
    stir(adapters)
    # Some bins lean one way, some the other, some are not seen yet.
    base = [0.5, 0.5003, torch.nan, 1.1, 0.9, 1.0, 1.0, 1.004, 1.0, 1.0]
    tuned = [0.5, 0.5, torch.nan, 1.1, 0.9, 1.002, 0.999, 1.0, 1.0, 0.99]
    for ema, values in ((step.indicator.base_ema, base), (step.indicator.tuned_ema, tuned)):
        ema.copy_(torch.tensor(values))
    emas = [step.indicator.base_ema.tolist(), step.indicator.tuned_ema.tolist()]

    network = PlainNetwork(load(model, torch.float64), model)
    leaves = {
        pair.name: (pair.down.clone().requires_grad_(), pair.up.clone().requires_grad_())
        for pair in adapters.pairs
    }
    state = step.generator.get_state()
    expected: list[dict[str, Tensor]] = []
    for _ in range(2):
        terms = plain_terms(step, network, draw(step), emas, leaves)
        features = terms["feature_mean"] + terms["feature_std"]
        loss = 1.7 * terms["denoising"] + 0.3 * features + 0.02 * terms["attention_alignment"]
        (loss / 2).backward()
        expected.append({name: term.detach() for name, term in (terms | {"loss": loss}).items()})
    step.generator.set_state(state)
    for _ in range(2):
        accumulate_gradients(step)

    for name, value in zip(loss_names(step.stage.objectives), step.losses.tolist(), strict=True):
        mean = sum(float(terms[name]) for terms in expected) / 2
        assert value == pytest.approx(mean, rel=1e-9), name
        assert abs(mean) > 1e-4, name
    for ema, values in ((step.indicator.base_ema, emas[0]), (step.indicator.tuned_ema, emas[1])):
        wanted = torch.tensor(values, dtype=torch.float64)
        torch.testing.assert_close(ema, wanted, rtol=1e-12, atol=0, equal_nan=True)
    found = gradients(adapters)
    for pair in adapters.pairs:
        for ours, theirs in zip(found[pair.name], leaves[pair.name], strict=True):
            assert theirs.grad is not None, pair.name
            size = theirs.grad.abs().max()
            assert size > 0, pair.name
            assert (ours - theirs.grad).abs().max() <= 1e-9 * size, pair.name


def gradients(adapters: LoraAdapters) -> dict[str, tuple[Tensor, Tensor]]:
    """The gradients of each pair, cut out of the flat one where the pair's values lie."""
    flat = adapters.arena.flat.detach()

    def cut(values: Tensor) -> Tensor:
        offset = values.storage_offset() - flat.storage_offset()
        return adapters.arena.grad[offset : offset + values.numel()].view(values.shape)

    return {pair.name: (cut(pair.down), cut(pair.up)) for pair in adapters.pairs}


def test_each_objective_stands_alone(make_config: MakeConfig) -> None:
    """Its own term in the loss, its own metric, and no other."""
    alone = {
        "gamma": {f"{OBJECTIVES}.denoising.weighting": "adaptive"},
        "feature_std": {f"{OBJECTIVES}.feature_alignment.weight": 30.0},
        "attention_alignment": {f"{OBJECTIVES}.attention_alignment.weight": 3e-4},
    }
    for name, settings in alone.items():
        step, adapters = prepared(make_config("lora", **settings), load("mini-sdxl"))
        stir(adapters)
        run_step(step)
        (row,) = metrics_of(step, 1)
        wanted = {"step", *METRICS, "prediction_difference", name}
        assert {key for key in row if "/" not in key} - {"feature_mean"} == wanted
        own = "gamma" if name == "gamma" else name
        assert {key.partition("/")[0] for key in row if "/" in key} - {"feature_mean"} == {own}
        weight = {"gamma": 0.0, "feature_std": 30.0, "attention_alignment": 3e-4}[name]
        total = row["denoising"] + weight * (row[name] + row.get("feature_mean", 0.0))
        assert row["loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("model", MINI_MODELS)
def test_a_new_adapter_on_the_class_prompt_differs_in_nothing_from_the_base(
    make_config: MakeConfig, model: str
) -> None:
    settings = APT | {"model.path": model, "prompts.token": "a"}
    step, adapters = prepared(make_config("lora", **settings), load(model))
    assert torch.equal(step.prompts.subject_rows, step.prompts.class_rows)
    accumulate_gradients(step)
    losses = dict(zip(loss_names(step.stage.objectives), step.losses.tolist(), strict=True))
    alignments = ("feature_mean", "feature_std", "attention_alignment")
    assert [losses[name] for name in alignments] == [0.0, 0.0, 0.0]
    assert losses["loss"] == losses["denoising"] > 0
    step.losses.zero_()
    stir(adapters)
    accumulate_gradients(step)
    losses = dict(zip(loss_names(step.stage.objectives), step.losses.tolist(), strict=True))
    assert min(losses[name] for name in alignments) > 0


def test_where_nothing_is_overfitted_adaptive_training_is_plain_training_bit_for_bit(
    make_config: MakeConfig,
) -> None:
    ends = []
    # So small a temperature makes every gamma zero.
    for settings in (
        {},
        {
            f"{OBJECTIVES}.denoising.weighting": "adaptive",
            f"{OBJECTIVES}.denoising.temperature": 1e-30,
        },
    ):
        config = make_config("lora", **settings, **{"photos.views": 2})
        step, adapters = prepared(config, load("mini-sdxl"))
        for _ in range(4):
            run_step(step)
        ends.append(adapters.arena.flat.detach().clone())
    assert torch.equal(*ends)


def test_a_sample_of_a_bin_that_is_overfitted_through_and_through_has_no_gradient(
    make_config: MakeConfig,
) -> None:
    settings = {f"{OBJECTIVES}.denoising.weighting": "adaptive", "photos.views": 2}
    step, adapters = prepared(make_config("lora", **settings), load("mini-sdxl"))
    step.indicator.base_ema.fill_(9.0)
    step.indicator.tuned_ema.fill_(1.0)
    for with_base in (True, False):
        accumulate_gradients(step, with_base=with_base)
        assert not adapters.arena.grad.any()
    _, denoising, gamma, _ = step.losses.tolist()
    assert (denoising, gamma) == (0.0, 2.0)


def test_augmented_views_are_drawn_as_often_as_gamma_says(make_config: MakeConfig) -> None:
    settings = {
        f"{OBJECTIVES}.denoising.weighting": "adaptive",
        "photos.views": 3,
        "stage.0.batch_size": 20000,
    }
    step, _ = prepared(make_config("lora", **settings), load("mini-sdxl"))
    gammas = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.75, 0.8, 0.9, 1.0, -1.0, torch.nan]).double()
    # gamma = 1 - exp(-1000 (base - tuned)); below zero where the tuned network is worse.
    step.indicator.base_ema.copy_(2.0 - torch.log1p(-gammas) / 1000)
    step.indicator.base_ema[7] = 3.0
    step.indicator.tuned_ema.fill_(2.0)
    draws = draw(step)
    views = choose_views(step, draws)
    shares = [0.0, 0.1, 0.25, 0.5, 0.75, 0.8, 0.8, 0.8, 0.0, 0.0]
    for index, share in enumerate(shares):
        inside = draws.timesteps // 100 == index
        count, number = (views[inside] > 0).sum().item(), inside.sum().item()
        assert number > 1500
        # float32 leaves some 3e-4 of a gamma.
        room = 4 * (number * share * (1 - share)) ** 0.5 + 3e-4 * number * (share > 0)
        assert abs(count - number * share) <= room, index
    counts = views.bincount(minlength=4)[1:]
    assert counts.shape == (3,)
    assert (counts - counts.float().mean()).abs().max() < 4 * counts.float().mean().sqrt()


@pytest.mark.parametrize(
    "switched_off",
    [
        {f"{OBJECTIVES}.denoising.max_augmentation": 0.0},
        {f"{OBJECTIVES}.denoising.weighting": "uniform"},
    ],
)
def test_without_augmentation_the_plain_view_is_shown(
    make_config: MakeConfig, switched_off: dict[str, object]
) -> None:
    step, _ = prepared(make_config("lora", **(APT | switched_off)), load("mini-sdxl"))
    assert step.latents.num_views == 0
    if step.indicator is not None:
        step.indicator.base_ema.fill_(9.0)
        step.indicator.tuned_ema.fill_(1.0)
    assert not choose_views(step, draw(step)).any()


def test_the_indicator_goes_on_from_bin_to_bin(make_config: MakeConfig) -> None:
    settings = {f"{OBJECTIVES}.denoising.weighting": "adaptive", "photos.views": 2}
    step, adapters = prepared(make_config("lora", **settings), load("mini-sdxl", torch.float64))
    stir(adapters)
    emas = torch.full((2, 10), torch.nan, dtype=torch.float64)
    for _ in range(8):
        state = step.generator.get_state()
        batch = make_batch(step, draw(step))
        step.generator.set_state(state)
        index = int(batch.timesteps) // 100
        text = step.prompts.subject(batch.photos)
        with torch.no_grad():
            tuned = step.family.predict(batch.noisy, batch.timesteps, text, batch.sizes)
        for row, prediction in enumerate((base_pass(step, batch), tuned)):
            loss = (prediction - batch.target).square().mean()
            old = emas[row, index]
            emas[row, index] = loss if old.isnan() else 0.9 * old + 0.1 * loss
        accumulate_gradients(step)
        for ours, theirs in zip(
            (step.indicator.base_ema, step.indicator.tuned_ema), emas, strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0, equal_nan=True)
    assert emas.isnan().any() and not emas.isnan().all()


def test_a_loss_that_is_not_finite_leaves_the_indicator_as_it_was(make_config: MakeConfig) -> None:
    settings = {f"{OBJECTIVES}.denoising.weighting": "adaptive", "photos.views": 2}
    step, _ = prepared(make_config("lora", **settings), load("mini-sdxl"))
    run_step(step)
    before = [ema.clone() for ema in (step.indicator.base_ema, step.indicator.tuned_ema)]
    shape, timesteps = (1, 8, 16, 16), torch.arange(0, 1000, 100)
    for index, bad in enumerate((torch.inf, torch.nan)):
        for predictions in ((bad, 1.0), (1.0, bad)):
            tuned, base = (torch.full(shape, value) for value in predictions)
            step.indicator.observe(tuned, base, torch.zeros(shape), timesteps[index][None])
    for ema, old in zip((step.indicator.base_ema, step.indicator.tuned_ema), before, strict=True):
        torch.testing.assert_close(ema, old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("model", MINI_MODELS)
def test_ten_steps_with_all_objectives_make_no_host_read(
    make_config: MakeConfig, model: str
) -> None:
    settings = APT | {
        "model.path": model,
        "stage.0.batch_size": 2,
        "stage.0.gradient_accumulation": 2,
        "stage.0.base_every": 2,
    }
    step, _ = prepared(make_config("ppt-lora", **settings), load(model))
    with ForbidHostReads():
        for number in range(10):
            run_step(step, number)
    rows = metrics_of(step, 10)
    for number, row in enumerate(rows):
        for name in ("feature_mean", "feature_std", "attention_alignment"):
            assert (row[name] >= 0) if number % 2 == 0 else row[name] != row[name]
        assert row["loss"] > 0 and 0 <= row["gamma"] <= 1 and row["grad_norm"] > 0


def test_the_base_is_asked_in_every_nth_step_alone(make_config: MakeConfig) -> None:
    settings = APT | {"stage.0.base_every": 3, "stage.0.gradient_accumulation": 2}
    step, adapters = prepared(make_config("lora", **settings), load("mini-sdxl"))
    stage = step.stage
    assert [needs_base_pass(stage, number) for number in range(5)] == [True, 0, 0, True, 0]
    calls: list[bool] = []
    step.family.network.register_forward_pre_hook(
        lambda *_: calls.append((adapters.switch.enabled, torch.is_grad_enabled()))
    )
    base, tuned = (False, False), (True, True)
    for number in range(4):
        before = step.indicator.base_ema.clone()
        run_step(step, number)
        moved = not torch.equal(before.nan_to_num(-1), step.indicator.base_ema.nan_to_num(-1))
        assert moved == (number % 3 == 0)
    assert calls == [base, tuned] * 2 + [tuned] * 4 + [base, tuned] * 2


def test_all_recipes_draw_the_same(make_config: MakeConfig) -> None:
    drawn = []
    for settings in ({}, APT, APT | {"stage.0.base_every": 2}):
        step, _ = prepared(make_config("lora", **settings), load("mini-sdxl"))
        for number in range(2):
            run_step(step, number)
        drawn.append(draw(step))
    for name in vars(drawn[0]):
        first, *others = (getattr(draws, name) for draws in drawn)
        assert all(torch.equal(first, other) for other in others), name
