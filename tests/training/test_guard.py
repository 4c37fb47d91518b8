"""Steps whose loss or gradient is not finite change nothing, are counted and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from fastppt.config import RunConfig
from fastppt.config_types import Engine
from fastppt.training.batch import draw
from fastppt.training.guard import NonFiniteGuard
from fastppt.training.runners import EagerRunner, GraphRunner, StageRunner, make_runner
from fastppt.training.snapshot import named_tensors
from fastppt.training.step import Step, accumulate_gradients, run_step, update_parameters
from fastppt_kernels.testing import ForbidHostReads
from tests.training.replay import ReplayRecorder
from tests.training.stages import WITH_BASE, are_equal, build_stage

MakeConfig = Callable[..., RunConfig]

BAD_PHOTO = 2
# What a step that is left out writes all the same.
NOTES = ("losses", "layer_losses", "samples", "ring/rows", "ring/samples", "ring/count")
SCALE = ("loss_scale/scale", "loss_scale/good_steps")
EMAS = ("indicator/base_ema", "indicator/tuned_ema")


def runner_of(kind: str, steps: list[Step]) -> StageRunner:
    if kind == "eager":
        return EagerRunner(steps)
    return GraphRunner(steps, ReplayRecorder([steps[0].generator]))


def prepared(
    make_config: MakeConfig, kind: str, **settings: object
) -> tuple[list[Step], StageRunner]:
    steps, _ = build_stage(make_config, **settings)
    steps[0].learning_rate.fill_(1e-3)
    if steps[0].loss_scale is not None:
        # Where such a run's scale settles: from 2^16 it would back off first.
        steps[0].loss_scale.scale.fill_(2.0**8)
    return steps, runner_of(kind, steps)


def lasting(step: Step, but: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Copies of what a step that is left out must leave as it is."""
    left_out = (*NOTES, *but)
    return {
        name: tensor.detach().clone()
        for name, tensor in named_tensors(step).items()
        if name not in left_out and not name.endswith("/gradient")
    }


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return are_equal([*first.values()], [*second.values()])


def row_of(step: Step) -> dict[str, float]:
    last = int(step.ring.count)
    step.ring.start_read(last - 1, last)
    (row,) = step.ring.finish_read()
    return row


PLAIN: dict[str, object] = {}
KINDS = [
    ("eager", "fp32", PLAIN),
    ("eager", "bf16", WITH_BASE),
    ("eager", "fp16", WITH_BASE | {"stage.0.gradient_accumulation": 2}),
    ("replayed", "fp32", WITH_BASE | {"stage.0.gradient_accumulation": 2, "stage.0.base_every": 2}),
    ("replayed", "bf16", PLAIN),
    ("replayed", "fp16", WITH_BASE),
]


@pytest.mark.parametrize(("kind", "precision", "settings"), KINDS)
def test_only_steps_that_draw_a_photo_of_nan_are_left_out(
    make_config: MakeConfig, kind: str, precision: str, settings: dict[str, object]
) -> None:
    steps, runner = prepared(make_config, kind, **settings, **{"model.precision": precision})
    (step,) = steps
    step.latents.posteriors[BAD_PHOTO] = torch.nan
    num_passes = step.stage.gradient_accumulation
    # The other pass of an accumulation may have taught the indicator something true.
    but = EMAS if num_passes > 1 else ()
    outcomes = set()
    for number in range(8):
        before = lasting(step, but)
        known = [ema.isfinite() for ema in emas_of(step)]
        runner.run(0, number)
        drawn = {photo for photo, _ in step.samples.tolist()}
        row, after = row_of(step), lasting(step, but)
        bad = BAD_PHOTO in drawn
        outcomes.add(bad)
        assert (row["skipped"], row["bad"]) == (bad, bad)
        assert same(before, after) == bad
        assert all(ema[was].isfinite().all() for ema, was in zip(emas_of(step), known, strict=True))
        assert not named_tensors(step)["lora/gradient"].any()
    assert outcomes == {False, True}
    assert all(tensor.isfinite().all() for tensor in lasting(step, EMAS).values())


def emas_of(step: Step) -> list[Tensor]:
    indicator = step.indicator
    return [] if indicator is None else [indicator.base_ema, indicator.tuned_ema]


def spoil_gradients(step: Step) -> Tensor:
    """Multiply what goes back through the network by a number, 1 until it is written to."""
    factor = torch.ones((), dtype=step.family.dtype)

    def hook(module: object, inputs: object, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * factor)

    step.family.network.conv_norm_out.register_forward_hook(hook)
    return factor


@pytest.mark.parametrize(("kind", "precision", "settings"), KINDS)
def test_a_gradient_that_is_not_finite_changes_nothing(
    make_config: MakeConfig, kind: str, precision: str, settings: dict[str, object]
) -> None:
    steps, runner = prepared(make_config, kind, **settings, **{"model.precision": precision})
    (step,) = steps
    factor = spoil_gradients(step)
    # The loss is finite: the indicator learns, and the loss scale backs off.
    but = (*EMAS, *SCALE)
    for number in range(5):
        factor.fill_({1: torch.nan, 2: torch.inf}.get(number, 1.0))
        before = lasting(step, but)
        runner.run(0, number)
        row = row_of(step)
        bad = number in (1, 2)
        assert row["skipped"] == bad and torch.tensor(row["loss"]).isfinite()
        assert row["bad"] == (bad and precision != "fp16")
        assert same(before, lasting(step, but)) == bad
    if step.loss_scale is not None:
        assert step.loss_scale.scale == 2.0**6


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_loss_that_is_not_finite_is_enough(make_config: MakeConfig, value: float) -> None:
    (step,), _ = prepared(make_config, "eager")
    accumulate_gradients(step)
    step.losses[0] = value
    before = lasting(step)
    update_parameters(step)
    row = row_of(step)
    assert (row["skipped"], row["bad"]) == (1, 1) and row["grad_norm"] > 0
    assert same(before, lasting(step))


def test_a_float16_step_is_bad_once_its_scale_is_no_excuse(make_config: MakeConfig) -> None:
    steps, _ = prepared(make_config, "eager", **{"model.precision": "fp16"})
    (step,) = steps
    spoil_gradients(step).fill_(torch.nan)
    step.loss_scale.scale.fill_(4.0)
    rows = []
    for _ in range(4):
        run_step(step)
        rows.append(row_of(step))
    assert [row["skipped"] for row in rows] == [1, 1, 1, 1]
    assert [row["bad"] for row in rows] == [0, 0, 1, 1]


def test_a_loss_that_is_not_finite_says_nothing_of_the_loss_scale(make_config: MakeConfig) -> None:
    steps, _ = prepared(make_config, "eager", **{"model.precision": "fp16"})
    (step,) = steps
    run_step(step)
    step.latents.posteriors[:] = torch.nan
    for _ in range(6):
        run_step(step)
        assert row_of(step)["bad"] == 1
    assert (step.loss_scale.scale, step.loss_scale.good_steps) == (2.0**8, 1)


def test_guarded_steps_make_no_host_read(make_config: MakeConfig) -> None:
    steps, _ = prepared(make_config, "eager", **WITH_BASE)
    steps[0].latents.posteriors[BAD_PHOTO] = torch.nan
    with ForbidHostReads():
        for number in range(4):
            run_step(steps[0], number)


@pytest.mark.parametrize("kind", ["eager", "replayed"])
def test_a_step_notes_every_sample_by_its_number_in_the_run(
    make_config: MakeConfig, photos: Path, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number, path in enumerate(sorted(photos.glob("*"))):
        size = (96, 64) if number in (1, 4) else (72, 72)
        Image.open(path).convert("RGB").resize(size).save(folder / f"{number}.png")
    settings = {"photos.folder": str(folder), "photos.resolution": 64, "photos.buckets": True}
    settings |= {"stage.0.gradient_accumulation": 2, "stage.0.batch_size": 3}
    steps, runner = prepared(make_config, kind, **settings)
    numbers = [[0, 2, 3], [1, 4]]
    for number in range(4):
        bucket = number % 2
        step = steps[bucket]
        runner.prepare(bucket, number)
        state = step.generator.get_state()
        passes = [draw(step) for _ in range(2)]
        step.generator.set_state(state)
        runner.run(bucket, number)
        step.ring.start_read(number, number + 1)
        step.ring.finish_read()
        assert step.ring.samples_of(number + 1) == [
            (numbers[bucket][photo], timestep)
            for one in passes
            for photo, timestep in zip(one.photos.tolist(), one.timesteps.tolist(), strict=True)
        ]


# The host's part.

PHOTOS = {0: "a.jpg", 1: "b.jpg", 2: "c.jpg"}


def described(guard: NonFiniteGuard, bad: dict[int, tuple[int, int]], last: int) -> list[dict]:
    rows = [
        {"step": step, "skipped": float(step in bad), "bad": float(step in bad), "loss": 0.5}
        for step in range(1, last + 1)
    ]
    return [guard.describe(row, lambda step: [bad[step]]) for row in rows]


def test_a_bad_row_names_photos_and_timesteps() -> None:
    guard = NonFiniteGuard(3, PHOTOS)
    good, bad = described(guard, {2: (1, 812)}, 2)
    assert good == {"step": 1, "skipped": 0, "loss": 0.5}
    assert bad == {
        **{"step": 2, "skipped": 1, "loss": 0.5},
        **{"photos": ["b.jpg"], "timesteps": [812]},
    }
    backed_off = guard.describe({"step": 3, "skipped": 1.0, "bad": 0.0}, lambda step: [])
    assert backed_off == {"step": 3, "skipped": 1}


def test_only_bad_steps_in_a_row_stop_a_run() -> None:
    guard = NonFiniteGuard(3, PHOTOS)
    rows = described(guard, dict.fromkeys((1, 2, 4, 5, 7, 8, 9, 10), (0, 5)), 10)
    guard.count(rows[:8])
    assert guard.num_bad == 6 and not guard.wants_stop
    guard.count(rows[8:])
    assert guard.wants_stop and [bad.step for bad in guard.in_a_row] == [7, 8, 9]


def test_a_resumed_run_goes_on_with_the_row_of_bad_steps() -> None:
    guard = NonFiniteGuard(3, PHOTOS)
    rows = described(guard, dict.fromkeys((1, 3, 4, 5), (0, 5)), 5)
    guard.take_up(rows[:4])
    assert guard.num_bad == 3 and not guard.wants_stop
    guard.count(rows[4:])
    assert guard.wants_stop and [bad.step for bad in guard.in_a_row] == [3, 4, 5]
    stopped = NonFiniteGuard(3, PHOTOS)
    stopped.take_up(rows)
    assert stopped.num_bad == 4 and stopped.in_a_row == []


def test_notes_come_where_the_count_has_doubled() -> None:
    guard = NonFiniteGuard(1000, PHOTOS)
    rows = described(guard, {step: (step % 3, step) for step in range(1, 101)}, 100)
    notes = [guard.note(guard.count(rows[first : first + 1])) for first in range(100)]
    told = [number for number, note in enumerate(notes, 1) if note is not None]
    assert told == [1, 2, 4, 8, 16, 32, 64]
    assert notes[0] == (
        "step 1: loss or gradient is not finite; left out (photo b.jpg at timestep 1); 1 so far"
    )


def test_a_note_of_many_steps_stays_one_line() -> None:
    guard = NonFiniteGuard(1000, PHOTOS)
    rows = described(guard, {step: (0, 10 * step) for step in range(37, 60)}, 60)
    note = guard.note(guard.count(rows))
    assert note is not None and note.startswith("steps 37, 38, 39, 40 and 19 more: ")
    assert note.endswith("; 23 so far") and len(note) < 300
    assert guard.note([]) is None


def test_the_end_names_steps_photos_timesteps_and_what_to_do(tmp_path: Path) -> None:
    guard = NonFiniteGuard(3, PHOTOS)
    guard.count(described(guard, {8: (1, 40), 9: (1, 7), 10: (1, 900)}, 10))
    message = guard.stop_message(tmp_path / "step-000012")
    assert "in 3 steps in a row, 8 to 10 (photos b.jpg; timesteps 7 to 900)" in message
    assert str(tmp_path / "step-000012") in message and "--init-lora" in message
    assert "Look at that photo, or leave it out" in message
    guard.in_a_row.clear()
    guard.count(described(guard, {8: (0, 40), 9: (1, 7), 10: (2, 900)}, 10))
    assert "with every photo: check the model's weights" in guard.stop_message(tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["eager", "graph"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_leaves_out_what_draws_a_photo_of_nan(
    make_config: MakeConfig, engine: Engine, precision: str
) -> None:
    settings = {"model.device": "cuda", "model.precision": precision}
    steps, _ = build_stage(make_config, **WITH_BASE, **settings)
    (step,) = steps
    step.learning_rate.fill_(1e-3)
    if step.loss_scale is not None:
        step.loss_scale.scale.fill_(2.0**8)
    step.latents.posteriors[BAD_PHOTO] = torch.nan
    runner = make_runner(engine, steps)
    outcomes = set()
    for number in range(12):
        before = lasting(step)
        runner.run(0, number)
        bad = bool((step.samples[:, 0] == BAD_PHOTO).any())
        outcomes.add(bad)
        row = row_of(step)
        assert (row["skipped"], row["bad"]) == (bad, bad)
        assert same(before, lasting(step)) == bad
    assert outcomes == {False, True}


@pytest.mark.gpu
def test_guarded_steps_do_not_synchronise_a_gpu(make_config: MakeConfig) -> None:
    settings = {"model.device": "cuda", "model.precision": "fp16"}
    (step,), _ = build_stage(make_config, **WITH_BASE, **settings)
    step.latents.posteriors[BAD_PHOTO] = torch.nan
    run_step(step)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(6):
            run_step(step, number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(tensor.isfinite().all() for tensor in lasting(step, EMAS).values())
