"""Steps that train the network's own weights: their equations, their anchor, their rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastppt.errors import UserError
from fastppt.training.batch import draw
from fastppt.training.step import accumulate_gradients, run_step, update_parameters
from tests.training.objective_steps import load, prepared_trainables
from tests.training.plain_step import PlainNetwork, plain_terms
from tests.training.stages import are_equal, build_stages, state_of
from tests.training.weight_steps import (
    APT,
    DENOISING,
    FULL,
    WORD,
    Table,
    anchored,
    cut,
    prepare,
    small_config,
    stage,
    stir,
    values_of,
    weights_config,
)

SLOW = pytest.mark.slow
EVERY_MODEL = (
    "mini-sd3",
    pytest.param("mini-sd", marks=SLOW),
    pytest.param("mini-sdxl", marks=SLOW),
)


# Equations.


@pytest.mark.parametrize("model", EVERY_MODEL)
def test_two_steps_of_all_objectives_follow_the_equations(photos: Path, model: str) -> None:
    weight, rate, most = 0.3, 1e-3, 0.5
    objectives = {name: dict(table) for name, table in APT.items()}
    objectives["feature_alignment"]["weight"] = 0.3
    objectives["attention_alignment"]["weight"] = 0.02
    step, trainables = prepare(
        photos,
        FULL,
        objectives | {"anchor": {"weight": weight}},
        model,
        torch.float64,
        stage__batch_size=2,
        stage__optimizer={"max_grad_norm": most, "weight_decay": 0.01},
    )
    stir(trainables)
    network = PlainNetwork(load(model, torch.float64), model)
    theta = {name: values.clone() for name, values in trainables.network.tensors.items()}
    first, second = (dict.fromkeys(theta, 0.0) for _ in range(2))
    nothing = [float("nan")] * 10
    emas = [[*nothing], [*nothing]]
    for number in (1, 2):
        leaves = {name: values.clone().requires_grad_() for name, values in theta.items()}
        state = step.generator.get_state()
        terms = plain_terms(step, network, draw(step), emas, {}, moved=leaves)
        step.generator.set_state(state)
        loss = terms["denoising"] + 0.3 * (terms["feature_mean"] + terms["feature_std"])
        (loss + 0.02 * terms["attention_alignment"]).backward()
        accumulate_gradients(step)
        found = cut(trainables, trainables.network.arenas[""].grad)
        for name, leaf in leaves.items():
            size = leaf.grad.abs().max()
            assert (found[name] - leaf.grad).abs().max() <= 1e-9 * size, name

        pulled = {
            name: leaf.grad + 2 * weight * (theta[name] - network.weights[name].detach())
            for name, leaf in leaves.items()
        }
        norm = sum(gradient.square().sum() for gradient in pulled.values()).sqrt()
        assert norm > most
        distance = sum(
            (values - network.weights[name]).square().sum() for name, values in theta.items()
        )
        update_parameters(step)
        assert float(step.optimizer.penalty) == pytest.approx(weight * float(distance), rel=1e-9)
        new = trainables.network.tensors
        for name, gradient in pulled.items():
            gradient = gradient * most / (norm + 1e-6)
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient.square()
            root = (second[name] / (1 - 0.999**number)).sqrt() + 1e-8
            change = -rate * (0.01 * theta[name] + first[name] / (1 - 0.9**number) / root)
            found_change = new[name] - theta[name]
            assert (found_change - change).abs().max() <= 1e-9 * change.abs().max(), name
            theta[name] = theta[name] + change


@pytest.mark.parametrize("trainables", [FULL, pytest.param(WORD, marks=SLOW)])
def test_passes_of_a_step_are_averaged(photos: Path, trainables: Table) -> None:
    sums = []
    for num_passes in (1, 3):
        step, moving = prepare(
            photos,
            trainables,
            model="mini-sd3",
            dtype=torch.float64,
            stage__gradient_accumulation=num_passes,
        )
        for _ in range(3):
            accumulate_gradients(step)
        sums.append(moving.network.arenas[""].grad.clone())
    assert sums[0].norm() > 0
    torch.testing.assert_close(sums[1], sums[0] / 3, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("model", EVERY_MODEL)
def test_the_base_pass_is_that_of_a_copy_of_the_network(photos: Path, model: str) -> None:
    """The indicator sees the losses of the base, bit for bit, once the weights have moved."""
    seen = []
    for moved in (False, True):
        step, trainables = prepare(photos, FULL, APT, model)
        if moved:
            stir(trainables)
        accumulate_gradients(step)
        seen.append(step.indicator.base_ema.clone())
        difference = step.indicator.tuned_ema.nan_to_num() - seen[-1].nan_to_num()
        assert bool(difference.any())
    assert torch.equal(*(ema.nan_to_num() for ema in seen)) and not seen[0].isnan().all()


def test_key_and_value_weights_and_the_word_move_and_nothing_else(photos: Path) -> None:
    step, trainables = prepare(photos, WORD, model="mini-sd3")
    network = step.family.network
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    word = trainables.tokens.arena.flat.detach().clone()
    for _ in range(2):
        run_step(step)
    after = network.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == trainables.network.tensors.keys()
    assert not torch.equal(word, trainables.tokens.arena.flat)


# The anchor.


@pytest.mark.parametrize("model", ["mini-sd3", pytest.param("mini-sd", marks=SLOW)])
def test_ppt_dreambooth_without_its_weight_is_dreambooth_bit_for_bit(
    photos: Path, model: str
) -> None:
    ends = []
    settings = {"stage.0.gradient_accumulation": 1, "stage.0.trainables.full.learning_rate": 1e-4}
    for recipe, more in (
        ("dreambooth", {}),
        ("ppt-dreambooth", {"stage.0.objectives.anchor.weight": 0.0}),
        ("ppt-dreambooth", {}),
    ):
        config = small_config(photos, model, recipe, **settings, **more)
        step, _ = prepared_trainables(config, load(model))
        for _ in range(3):
            run_step(step)
        ends.append(state_of(step))
    assert are_equal(ends[0], ends[1]) and not are_equal(ends[0], ends[2])


def test_an_anchor_of_weight_zero_is_not_even_kept(photos: Path) -> None:
    for objectives, kept in ((anchored(0.0), False), (anchored(1e-9), True)):
        _, trainables = prepare(photos, FULL, objectives, "mini-sd3")
        assert (trainables.network.pretrained is not None) == kept


def test_a_later_stage_is_held_to_the_pretrained_weights_too(photos: Path) -> None:
    config = weights_config(photos, [stage(FULL), stage(FULL, anchored(0.5))], "mini-sd3")
    stages = build_stages(config)
    (first,), trainables = next(stages)
    pretrained = values_of(trainables)
    first.learning_rate.fill_(1e-3)
    run_step(first)
    (second,), _ = next(stages)
    moved = (values_of(trainables) - pretrained).square().sum()
    run_step(second)
    assert moved > 0
    assert float(second.optimizer.penalty) == pytest.approx(0.5 * float(moved), rel=1e-4)


RATE = 1e-5


def largest_move(photos: Path, num_steps: int, **anchor: object) -> float:
    """How far from its start any weight is, in learning rates."""
    step, trainables = prepare(
        photos,
        {"full": {"learning_rate": RATE}},
        DENOISING | ({"anchor": anchor} if anchor else {}),
        "mini-sd3",
        stage__optimizer={"weight_decay": 0.0},
    )
    start = values_of(trainables)
    for _ in range(num_steps):
        run_step(step)
    return float((values_of(trainables) - start).abs().max() / RATE)


def test_a_huge_anchor_keeps_every_weight_within_a_few_learning_rates(photos: Path) -> None:
    """AdamW takes steps of about a learning rate however large the gradient: that much moves.

    Without an anchor the weights go on, a learning rate a step.
    """
    assert largest_move(photos, 12) > 11.0
    assert largest_move(photos, 12, weight=1e8) < 4.0
    # Back at the start before each step: lr * weight = 1.
    assert largest_move(photos, 12, weight=1 / RATE, form="decoupled") < 2.0


@pytest.mark.slow
def test_a_huge_anchor_holds_however_long_the_run_is(photos: Path) -> None:
    assert largest_move(photos, 60) > 40.0
    assert largest_move(photos, 60, weight=1e8) < 4.0
    assert largest_move(photos, 60, weight=1 / RATE, form="decoupled") < 2.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=SLOW)])
def test_an_anchor_in_host_memory_gives_the_same_bit_for_bit(
    photos: Path, dtype: torch.dtype
) -> None:
    ends = []
    for storage in ("device", "host"):
        step, _ = prepare(photos, FULL, anchored(storage=storage), "mini-sd3", dtype)
        for _ in range(3):
            run_step(step)
        assert step.optimizer.penalty > 0
        ends.append(state_of(step))
    assert are_equal(*ends)


# The configuration.


@pytest.mark.parametrize(
    ("stages", "where"),
    [
        ([stage(FULL)], None),
        ([stage(FULL, anchored(0.0))], None),
        ([stage(FULL, anchored())], "device"),
        ([stage(FULL, anchored(storage="host"))], "host"),
        ([stage(FULL, APT)], "device"),
        ([stage({"lora": {}}, APT | anchored())], None),
        # Nothing has moved yet when the base is asked; then it has.
        ([stage({"tokens": {}}, APT), stage(FULL)], None),
        ([stage(FULL), stage({"tokens": {}}, APT)], "device"),
    ],
)
def test_pretrained_weights_are_kept_where_a_stage_reads_them(
    photos: Path, stages: list[dict[str, object]], where: str | None
) -> None:
    assert weights_config(photos, stages).kept_weights == where


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            [stage(FULL, anchored(storage="host")), stage(FULL, APT)],
            r"stage\.0\.objectives\.anchor\.storage must be device, got host: ",
        ),
        (
            [stage(FULL, anchored()), stage(FULL, anchored(storage="host"))],
            r"stage\.1\.objectives\.anchor\.storage must be device, got host: ",
        ),
        (
            [stage(FULL, anchored(1001.0, form="decoupled"))],
            r"anchor\.weight: .* 0\.001 \* 1001 is past it; set weight to 1000 at most",
        ),
    ],
)
def test_what_cannot_be_held_is_refused(
    photos: Path, stages: list[dict[str, object]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        weights_config(photos, stages)


# Networks in 16 bits.


def test_steps_too_small_for_bf16_add_up_in_the_master_weights(photos: Path) -> None:
    rate = 1e-6
    moving = {"full": {"learning_rate": rate}}
    settings = {"dtype": torch.bfloat16, "stage__optimizer": {"weight_decay": 0.0}}
    step, trainables = prepare(photos, moving, DENOISING, "mini-sd3", **settings)
    start = values_of(trainables)
    for _ in range(3):
        run_step(step)
    moved = (values_of(trainables) - start).abs().max()
    assert 2.5 * rate < moved < 3.5 * rate
    arena = trainables.network.arenas[""]
    assert torch.equal(arena.working_copy, arena.flat.detach().bfloat16())
    network = dict(step.family.network.named_parameters())
    for name, values in trainables.network.tensors.items():
        assert torch.equal(network[name], values.bfloat16())


def test_without_master_weights_small_steps_are_kept_on_average(photos: Path) -> None:
    """Rounded to the nearest, none of them would be left; rounded at random, their mean is."""
    rate = 1e-6
    moving = {"full": {"learning_rate": rate, "master_weights": False}}
    settings = {"dtype": torch.bfloat16, "stage__optimizer": {"weight_decay": 0.0}}
    step, trainables = prepare(photos, moving, DENOISING, "mini-sd3", **settings)
    start = values_of(trainables).double()
    accumulate_gradients(step)
    direction = trainables.network.arenas[""].grad.double().sign()
    update_parameters(step)
    large = (start.abs() > 1e-2) & (direction != 0)
    moved = (values_of(trainables).double() - start)[large]
    assert ((moved == 0).double().mean() > 0.9) and (moved != 0).any()
    spread = float(moved.std()) / len(moved) ** 0.5
    assert abs(float((moved * -direction[large]).mean()) - rate) < 4 * spread


def test_float16_gradients_are_divided_by_the_loss_scale_in_float32(photos: Path) -> None:
    step, trainables = prepare(photos, FULL, DENOISING, "mini-sd", torch.float16)
    other, others = prepare(photos, FULL, DENOISING, "mini-sd")
    step.loss_scale.scale.fill_(2.0**10)
    for each in (step, other):
        accumulate_gradients(each)
    scaled, plain = (t.network.arenas[""].grad for t in (trainables, others))
    assert scaled.dtype == torch.float32
    assert (scaled / 2.0**10 - plain).norm() < 0.02 * plain.norm()
    # Most of them are nothing that float16 could hold.
    tiny = (plain != 0) & (plain.abs() < 6e-8)
    assert tiny.any() and (scaled[tiny] != 0).double().mean() > 0.5
