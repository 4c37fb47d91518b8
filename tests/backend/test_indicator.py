"""The indicator of foreign loops follows the equations, and is the trainer's own."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from accelerate import Accelerator
from torch import Tensor

from fastppt.config import RunConfig
from fastppt.foreign.indicator import OverfittingIndicator
from fastppt.training.batch import Batch
from fastppt.training.step import loss_terms
from tests.training.replay import ReplayRecorder
from tests.training.stages import build_stage

# Losses of these predictions are near 0.1 and differ by some 0.01, as those of a network do.
SETTINGS = {"temperature": 30.0, "smoothing": 0.25, "dtype": torch.float64}
SHAPE = (3, 4, 2, 2)


def draw_samples(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """One step's arguments; the tuned network is ahead, more so in late timesteps."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((3, *SHAPE), generator=generator, dtype=torch.float64)
    timesteps = torch.randint(0, 1000, SHAPE[:1], generator=generator)
    share = 0.3 - timesteps.view(-1, 1, 1, 1) / 8000
    prediction, base, target = noise[0] * share, noise[1] * 0.35, 0.01 * noise[2]
    return {
        "prediction": prediction.to(dtype).requires_grad_(),
        "base_prediction": base.to(dtype),
        "target": target.to(dtype),
        "timesteps": timesteps,
    }


class PlainIndicator:
    """The equations in Python's own numbers."""

    def __init__(self) -> None:
        self.emas: dict[int, list[float]] = {}

    def kept(self, index: int) -> float:
        """1 - gamma of a bin."""
        base, tuned = self.emas.get(index, (0.0, 0.0))
        return min(1.0, max(0.0, math.exp(-SETTINGS["temperature"] * (base - tuned))))

    def loss(self, samples: dict[str, Tensor], sample_weight: Tensor | None) -> float:
        losses: list[list[float]] = []
        for name in ("base_prediction", "prediction"):
            pairs = zip(samples[name].tolist(), samples["target"].tolist(), strict=True)
            losses.append([mean_square(one, wanted) for one, wanted in pairs])
        indices = [timestep * 10 // 1000 for timestep in samples["timesteps"].tolist()]
        for index in set(indices):
            places = [place for place, one in enumerate(indices) if one == index]
            means = [sum(each[place] for place in places) / len(places) for each in losses]
            old = self.emas.get(index, means)
            step = SETTINGS["smoothing"]
            self.emas[index] = [(1 - step) * a + step * b for a, b in zip(old, means, strict=True)]
        weights = [1.0] * len(indices) if sample_weight is None else sample_weight.tolist()
        parts = zip(weights, indices, losses[1], strict=True)
        return sum(weight * self.kept(index) * one for weight, index, one in parts) / len(indices)


def mean_square(values: list, wanted: list) -> float:
    numbers = [
        (a - b) ** 2
        for rows, wanted_rows in zip(values, wanted, strict=True)
        for row, wanted_row in zip(rows, wanted_rows, strict=True)
        for a, b in zip(row, wanted_row, strict=True)
    ]
    return sum(numbers) / len(numbers)


@pytest.mark.parametrize("weighted", [False, True])
def test_losses_gammas_and_averages_follow_the_equations(weighted: bool) -> None:
    indicator, plain = OverfittingIndicator(**SETTINGS), PlainIndicator()
    for seed in range(30):
        samples = draw_samples(seed)
        weight = torch.tensor([0.5, 2.0, 1.0]).double() if weighted else None
        loss = indicator.loss(**samples, sample_weight=weight)
        assert loss.dtype == torch.float64
        assert loss.item() == pytest.approx(plain.loss(samples, weight), rel=1e-12)
        gamma = indicator.gamma(samples["timesteps"])
        indices = [timestep // 100 for timestep in samples["timesteps"].tolist()]
        wanted = [1 - plain.kept(index) for index in indices]
        assert gamma.tolist() == pytest.approx(wanted, rel=1e-10)
        error = 2 * (samples["prediction"] - samples["target"]).detach() / samples["target"].numel()
        share = (1 - gamma) * (1 if weight is None else weight)
        (gradient,) = torch.autograd.grad(loss, samples["prediction"])
        assert torch.allclose(gradient, share.view(-1, 1, 1, 1) * error, rtol=1e-10, atol=0)
    emas = torch.stack([indicator.base_ema, indicator.tuned_ema], dim=1)
    assert sorted(plain.emas) == list(range(10))
    for index, pair in plain.emas.items():
        assert emas[index].tolist() == pytest.approx(pair, rel=1e-12)
    # Neither bound of the clamp hides the rest.
    gamma = indicator.gamma_by_bin()
    assert gamma.min() > 0 and gamma.max() < 1


def test_averages_are_those_of_a_run(make_config: Callable[..., RunConfig]) -> None:
    settings = {"temperature": 30.0, "smoothing": 0.25, "bins": 5, "weighting": "adaptive"}
    given = {f"stage.0.objectives.denoising.{name}": value for name, value in settings.items()}
    (step,), _ = build_stage(make_config, "mini-sd", **given)
    indicator = OverfittingIndicator(num_bins=5, temperature=30.0, smoothing=0.25)
    for seed in range(8):
        samples = draw_samples(seed, torch.float32)
        prediction, base, target, timesteps = samples.values()
        known = indicator.gamma(timesteps)
        assert torch.equal(known, step.indicator.gamma(timesteps))
        batch = Batch(timesteps, timesteps, target, target, timesteps)
        terms = loss_terms(step, batch, prediction, base)
        assert torch.equal(indicator.loss(**samples), terms["denoising"])
    assert torch.equal(indicator.base_ema, step.indicator.base_ema)
    assert torch.equal(indicator.tuned_ema, step.indicator.tuned_ema)
    assert not indicator.base_ema.isnan().any()


def test_probability_of_augmentation_is_gamma_up_to_its_bound() -> None:
    indicator = OverfittingIndicator(num_bins=4, temperature=1.0, dtype=torch.float64)
    indicator.base_ema.copy_(torch.tensor([2.5, 1.2, 1.0, torch.nan]))
    indicator.tuned_ema.copy_(torch.tensor([0.5, 1.0, 1.3, torch.nan]))
    timesteps = torch.tensor([0, 300, 600, 900])
    gamma = [1 - math.exp(-2), 1 - math.exp(-0.2), 0, 0]
    assert indicator.gamma(timesteps).tolist() == pytest.approx(gamma)
    probabilities = indicator.augmentation_probability(timesteps).tolist()
    assert probabilities == pytest.approx([0.8, *gamma[1:]])


def test_bins_are_equal_parts_of_steps_of_times_and_of_sigmas() -> None:
    steps = torch.arange(1000)
    wanted = (steps // 100).tolist()
    assert OverfittingIndicator().bins(steps).tolist() == wanted
    assert OverfittingIndicator(1000.0).bins(steps.int()).tolist() == wanted
    assert OverfittingIndicator().bins(steps.float()).tolist() == wanted
    sigmas = torch.tensor([0.0, 0.0999, 0.1001, 0.5, 0.9999, 1.0])
    assert OverfittingIndicator(1).bins(sigmas).tolist() == [0, 0, 1, 5, 9, 9]
    times = OverfittingIndicator(1000)
    assert times.bins(1000 * sigmas).tolist() == [0, 0, 1, 5, 9, 9]
    assert OverfittingIndicator(num_bins=7).bins(torch.tensor([142, 143, 999])).tolist() == [
        0,
        1,
        6,
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timesteps": torch.tensor([1, 1000, 2])}, "got 1000, want 0 to 999; num_timesteps"),
        ({"timesteps": torch.tensor([1, -1, 2])}, "got -1, want 0 to 999"),
        ({"timesteps": torch.tensor([1.0, 1000.5, 2.0])}, "got 1000.5, want 0 to 1000"),
        ({"timesteps": torch.tensor([1.0, torch.nan, 2.0])}, "got nan, want 0 to 1000"),
        ({"timesteps": torch.tensor([1, 2])}, r"timesteps: got shape \(2,\), want \(3,\)"),
        ({"timesteps": torch.tensor(3)}, r"timesteps: got torch.int64 of shape \(\)"),
        ({"timesteps": torch.tensor([True] * 3)}, "got torch.bool of shape"),
        ({"timesteps": torch.zeros(3, device="meta")}, r"are on meta.*move one of them"),
        ({"target": torch.zeros(3, 4, 2, 1)}, r"target: got shape \(3, 4, 2, 1\), want"),
        ({"base_prediction": torch.zeros(3, 4)}, "base_prediction: got shape"),
        ({"sample_weight": torch.ones(2)}, r"sample_weight: got shape \(2,\), want \(3,\)"),
        ({"prediction": torch.zeros(SHAPE, device="meta")}, "prediction: is on meta, and the"),
    ],
)
def test_wrong_use_is_refused_and_nothing_is_noted(change: dict[str, Tensor], message: str) -> None:
    indicator = OverfittingIndicator(dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        indicator.loss(**(draw_samples(0) | change))
    assert indicator.base_ema.isnan().all() and indicator.tuned_ema.isnan().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_timesteps": 0}, "num_timesteps: got 0"),
        ({"num_bins": 0}, "num_bins: got 0"),
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"smoothing": 1.5}, "smoothing: got 1.5"),
        ({"dtype": torch.bfloat16}, "dtype: got torch.bfloat16"),
    ],
)
def test_settings_outside_their_range_are_refused(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        OverfittingIndicator(**settings)


def test_a_timestep_that_nothing_was_read_of_makes_gamma_and_loss_nan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a GPU does, where the range is not looked at."""
    monkeypatch.setattr(OverfittingIndicator, "_check_range", lambda self, timesteps: None)
    indicator = OverfittingIndicator(**SETTINGS)
    timesteps = torch.tensor([5, 1000, -1])
    assert indicator.gamma(timesteps).isnan().tolist() == [False, True, True]
    assert indicator.loss(**(draw_samples(0) | {"timesteps": timesteps})).isnan()


def test_a_loss_that_is_not_finite_leaves_the_averages() -> None:
    indicator = OverfittingIndicator(**SETTINGS)
    for seed in range(30):
        indicator.loss(**draw_samples(seed))
    before = copy.deepcopy(indicator.state_dict())
    broken = draw_samples(9)
    with torch.no_grad():
        broken["prediction"].fill_(torch.inf)
    indicator.loss(**broken)
    assert torch.equal(indicator.tuned_ema, before["tuned_ema"])
    later = {"prediction": draw_samples(9)["prediction"]}
    assert indicator.loss(**(broken | later)).isfinite()
    assert not torch.equal(indicator.tuned_ema, before["tuned_ema"])


def test_averages_stay_where_they_are_and_nothing_is_read_on_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A recording of one call, replayed on other values, is the call on them."""
    monkeypatch.setattr(OverfittingIndicator, "_check_range", lambda self, timesteps: None)
    calls = [draw_samples(seed) for seed in range(4)]
    eager, replayed = OverfittingIndicator(**SETTINGS), OverfittingIndicator(**SETTINGS)
    static = {name: tensor.detach().clone() for name, tensor in calls[0].items()}
    known, losses = torch.zeros(3).double(), torch.zeros(()).double()

    def step() -> None:
        known.copy_(replayed.augmentation_probability(static["timesteps"]))
        losses.copy_(replayed.loss(**static))

    replay = ReplayRecorder([]).record(step)
    for ema in (replayed.base_ema, replayed.tuned_ema):
        ema.fill_(torch.nan)
    for samples in calls:
        with torch.no_grad():
            for name, tensor in samples.items():
                static[name].copy_(tensor)
        replay()
        assert torch.equal(known, eager.augmentation_probability(samples["timesteps"]))
        assert torch.equal(losses, eager.loss(**samples))
    assert torch.equal(eager.base_ema.nan_to_num(), replayed.base_ema.nan_to_num())


def test_a_checkpoint_of_accelerate_keeps_the_averages(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    indicator = OverfittingIndicator(**SETTINGS)
    accelerator.register_for_checkpointing(indicator)
    for seed in range(3):
        indicator.loss(**draw_samples(seed))
    saved = copy.deepcopy(indicator.state_dict())
    place = indicator.base_ema.data_ptr()
    accelerator.save_state(tmp_path)
    going_on = [indicator.loss(**draw_samples(seed)) for seed in range(3, 6)]
    accelerator.load_state(tmp_path)
    assert indicator.base_ema.data_ptr() == place
    for name, value in indicator.state_dict().items():
        assert torch.equal(value.nan_to_num(), saved[name].nan_to_num())
    resumed = [indicator.loss(**draw_samples(seed)) for seed in range(3, 6)]
    assert torch.equal(torch.stack(going_on), torch.stack(resumed))


def test_a_state_of_other_bins_is_refused() -> None:
    state = OverfittingIndicator(num_bins=5).state_dict()
    with pytest.raises(ValueError, match=r"base_ema has shape \(5,\), want .* num_bins=5"):
        OverfittingIndicator().load_state_dict(state)
    with pytest.raises(ValueError, match="assign: got True"):
        OverfittingIndicator(num_bins=5).load_state_dict(state, assign=True)


def share_averages(rank: int, folder: Path) -> None:
    """One of two processes, each with half of every batch; rank 0 writes down what came of it."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    together = OverfittingIndicator(**SETTINGS)
    alone = OverfittingIndicator(**SETTINGS, synchronized=False)
    own = slice(3 * rank, 3 * rank + 3)
    losses, gradients = [], []
    for seed in range(10):
        samples = {name: tensor[own] for name, tensor in double_batch(seed).items()}
        weight = samples.pop("sample_weight")
        prediction = samples["prediction"] = samples["prediction"].detach().requires_grad_()
        loss = together.loss(**samples, sample_weight=weight if seed % 2 else None)
        losses.append(loss.detach())
        gradients += torch.autograd.grad(loss, prediction)
        alone.loss(**samples)
    state = {"losses": torch.stack(losses), "gradients": torch.stack(gradients)}
    state |= {"together": together.state_dict(), "alone": alone.state_dict()}
    torch.save(state, folder / f"{rank}.pt")
    with pytest.raises(ValueError, match=r"target: got shape \(3, 1\), want \(3, 4, 2, 2\)"):
        together.loss(**(samples | {"target": torch.zeros(3, 1)}))
    dist.destroy_process_group()


def double_batch(seed: int) -> dict[str, Tensor]:
    both = [draw_samples(seed), draw_samples(seed + 100)]
    samples = {name: torch.cat([one[name] for one in both]) for name in both[0]}
    return samples | {"sample_weight": torch.linspace(0.5, 2, 6).double()}


@pytest.mark.slow
def test_two_processes_have_the_averages_of_one_with_all_samples(tmp_path: Path) -> None:
    multiprocessing.start_processes(share_averages, (tmp_path,), nprocs=2, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    indicator = OverfittingIndicator(**SETTINGS)
    for number in range(10):
        samples = double_batch(number)
        weight = samples.pop("sample_weight")
        samples["prediction"] = samples["prediction"].detach().requires_grad_()
        loss = indicator.loss(**samples, sample_weight=weight if number % 2 else None)
        mean = (ranks[0]["losses"][number] + ranks[1]["losses"][number]) / 2
        assert torch.allclose(mean, loss.detach(), rtol=1e-12, atol=0)
        (gradient,) = torch.autograd.grad(loss, samples["prediction"])
        # The gradients of the processes are averaged afterwards.
        halves = torch.cat([rank["gradients"][number] for rank in ranks]) / 2
        assert torch.allclose(halves, gradient, rtol=1e-12, atol=0)
    for rank in ranks:
        for name, value in indicator.state_dict().items():
            assert torch.equal(rank["together"][name].nan_to_num(), value.nan_to_num())
            assert not torch.equal(rank["alone"][name].nan_to_num(), value.nan_to_num())
