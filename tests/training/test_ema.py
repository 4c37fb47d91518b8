"""The moving average of what a stage trains: in steps, on disk, in pictures, in the next stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from fastppt.config import RunConfig
from fastppt.config_io import build_config
from fastppt.outputs.lora_files import DIFFUSERS_FILE
from fastppt.training import average as average_module
from fastppt.training import loop, run
from fastppt.training.interrupt import Interrupted
from fastppt.training.runners import EagerRunner, GraphRunner
from fastppt.training.step import Step, run_step
from tests.training.replay import ReplayRecorder
from tests.training.runs import contents, resume, resume_copy
from tests.training.stages import are_equal, build_stage, run_stage, state_of

MakeConfig = Callable[..., RunConfig]
EMA = {"stage.0.ema_decay": 0.4, "model.path": "mini-sd"}
# A word, adapters of two parts of the model: several averages.
TEXT = {
    "stage.0.trainables.tokens.vectors": 1,
    "stage.0.trainables.tokens.keep_norm": True,
    "prompts.token": "<v>",
}


def averages(step: Step) -> dict[str, Tensor]:
    assert step.average is not None
    return step.average.averages


def take_step(step: Step) -> None:
    for rate in step.learning_rates.values():
        rate.fill_(1e-2)
    run_step(step)


def test_the_average_is_that_of_the_equation(make_config: MakeConfig) -> None:
    """decay_n = min(decay, (1 + n) / (10 + n)), from where the stage begins; in float64."""
    (step,), _ = build_stage(make_config, "mini-sd", torch.float64, **EMA | TEXT)
    arenas = {name: step.trainables.arenas[name] for name in ("lora", "tokens")}
    assert averages(step).keys() == arenas.keys()
    start = {name: arena.flat.detach().clone() for name, arena in arenas.items()}
    expected = {name: value.clone() for name, value in start.items()}
    for n in range(9):
        take_step(step)
        decay = min(0.4, (1 + n) / (10 + n))
        for name, arena in arenas.items():
            expected[name] = decay * expected[name] + (1 - decay) * arena.flat.detach()
    # The warm-up ends at n = 5.
    assert (1 + 8) / (10 + 8) > 0.4 > (1 + 4) / (10 + 4)
    for name, average in averages(step).items():
        drift = (expected[name] - start[name]).norm()
        assert (average - expected[name]).norm() < 1e-9 * drift
        assert (arenas[name].flat - expected[name]).norm() > 1e-3 * drift
    assert step.average is not None and step.average.num_updates == 9


def test_a_skipped_step_leaves_the_average_as_it_is(make_config: MakeConfig) -> None:
    (step,), _ = build_stage(make_config, "mini-sd", **EMA)
    take_step(step)
    assert step.average is not None
    before = {name: value.clone() for name, value in averages(step).items()}
    posteriors = step.latents.posteriors.clone()
    step.latents.posteriors.fill_(torch.inf)
    take_step(step)
    assert step.optimizer.skipped and step.average.num_updates == 1
    assert all(torch.equal(before[name], value) for name, value in averages(step).items())
    step.latents.posteriors.copy_(posteriors)
    take_step(step)
    assert step.average.num_updates == 2
    assert not torch.equal(before["lora"], averages(step)["lora"])


def test_values_in_16_bits_are_averaged_in_32(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunk by chunk; an average in bfloat16 would stand still."""
    monkeypatch.setattr(average_module, "CHUNK", 1000)
    (step,), _ = build_stage(make_config, "mini-sd", **EMA)
    arena = step.trainables.arenas["lora"]
    arena.flat = torch.nn.Parameter(arena.flat.detach().bfloat16())
    average = average_module.MovingAverage(step.trainables, ["lora"], 0.999)
    assert average.averages["lora"].dtype == torch.float32
    average.num_updates.fill_(1e6)
    before = average.averages["lora"].clone()
    arena.flat.detach().add_(1)
    average.update_(torch.tensor(False))
    expected = before + (1 - 0.999) * (arena.flat.float() - before)
    torch.testing.assert_close(average.averages["lora"], expected, rtol=0, atol=1e-6)


def test_the_network_computes_with_what_is_shown_and_handed_on(make_config: MakeConfig) -> None:
    """In bfloat16 that is a copy of the values."""
    (step,), _ = build_stage(make_config, "mini-sd", **EMA, **{"model.precision": "bf16"})
    for _ in range(2):
        take_step(step)
    arena, average = step.trainables.arenas["lora"], averages(step)["lora"]
    values = arena.flat.detach().clone()
    assert step.average is not None and arena.working_copy is not None
    assert not torch.equal(values.bfloat16(), average.bfloat16())
    with step.average.shown():
        assert torch.equal(arena.flat, average)
        assert torch.equal(arena.working_copy, average.bfloat16())
    assert torch.equal(arena.flat, values)
    assert torch.equal(arena.working_copy, values.bfloat16())
    step.average.hand_on()
    assert torch.equal(arena.flat, average)
    assert torch.equal(arena.working_copy, average.bfloat16())


def test_replayed_steps_average_as_eager_ones_do(make_config: MakeConfig) -> None:
    eager, _ = build_stage(make_config, "mini-sd", **EMA)
    run_stage(EagerRunner(eager), eager, 4)
    replayed, _ = build_stage(make_config, "mini-sd", **EMA)
    recorder = ReplayRecorder([replayed[0].generator])
    run_stage(GraphRunner(replayed, recorder), replayed, 4)
    assert are_equal(state_of(eager[0]), state_of(replayed[0]))
    assert any(
        average is tensor for average in averages(eager[0]).values() for tensor in written(eager[0])
    )


def written(step: Step) -> list[Tensor]:
    from fastppt.training.snapshot import written_tensors

    return written_tensors(step)


def train(config: RunConfig) -> Path:
    return loop.train(config, Console(quiet=True)).folder.root


def lora_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / DIFFUSERS_FILE)


def state(root: Path, step: int) -> dict[str, Tensor]:
    return load_file(root / "checkpoints" / f"step-{step:06d}" / "state.safetensors")


STAGE = """
[[stage]]
steps = {steps}
ema_decay = {decay}
[stage.trainables.lora]
rank = 4
learning_rate = 1e-3
[stage.objectives.denoising]
[stage.objectives.anchor]
form = "raw"
"""


KEYS: dict[str, object] = {
    "model.path": "mini-sd",
    "model.device": "cpu",
    "prompts.class_noun": "robot",
    "samples.enabled": False,
    "checkpoint_every": 1,
    "log_every": 2,
    "name": "x",
}


def two_stages(make_config: MakeConfig, tmp_path: Path, **settings: object) -> RunConfig:
    file = tmp_path / "run.toml"
    file.write_text(STAGE.format(steps=2, decay=0.5) + STAGE.format(steps=3, decay=0.9))
    photos = str(make_config().photos.folder)
    given = KEYS | {"photos.folder": photos, "output": str(tmp_path / "out")} | settings
    return build_config(file=file, settings=list(given.items()))


def test_the_average_is_saved_and_handed_on_and_resumed_bit_for_bit(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    root = train(two_stages(make_config, tmp_path))
    first_end, second, last = state(root, 2), state(root, 3), state(root, 5)
    assert not torch.equal(first_end["lora/values"], first_end["lora/average"])
    # The next stage starts from the average, and is held to it.
    assert torch.equal(second["lora/anchor"], first_end["lora/average"])
    # The files hold the average, within a stage and after it.
    assert holds(lora_of(root), last["lora/average"])
    assert holds(lora_of(root / "checkpoints" / "step-000003"), second["lora/average"])
    assert not holds(lora_of(root), last["lora/values"])
    # From the end of the first stage, whose values are not those that it hands on.
    assert contents(resume_copy(root, 2, tmp_path / "copy")) == contents(root)


def holds(lora: dict[str, Tensor], values: Tensor) -> bool:
    """Whether every tensor of a LoRA file lies somewhere in flat values; alpha is the rank."""
    known = {value.item() for value in values}
    return all(value.item() in known for tensor in lora.values() for value in tensor.flatten())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("full", {"model.precision": "bf16"}),
        ("full", {"model.precision": "bf16", "stage.0.trainables.full.master_weights": False}),
        ("custom_diffusion", {}),
        ("svdiff", {}),
        ("oft", {"stage.0.trainables.oft.block_size": 8}),
        ("dora", {"model.precision": "fp16"}),
    ],
    ids=["full_bf16", "full_without_masters", "custom_diffusion", "svdiff", "oft", "dora_fp16"],
)
def test_whatever_is_trained_is_averaged_saved_and_resumed(
    make_config: MakeConfig, tmp_path: Path, name: str, settings: dict[str, object]
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        f"[[stage]]\nsteps = 4\nema_decay = 0.5\n[stage.trainables.{name}]\n"
        "learning_rate = 1e-3\n[stage.objectives.denoising]\n"
    )
    given = KEYS | settings
    given |= {"photos.folder": str(make_config().photos.folder), "output": str(tmp_path / "out")}
    root = train(build_config(file=file, settings=list(given.items())))
    last = state(root, 4)
    for key in (key for key in last if key.endswith("/values")):
        average = last[key.replace("/values", "/average")]
        assert average.dtype == torch.float32 and not torch.equal(average, last[key].float())
    assert contents(resume_copy(root, 2, tmp_path / "copy")) == contents(root)


@pytest.mark.slow
def test_a_finished_run_that_gets_more_steps_goes_on_with_its_values(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """Not with the average that it has saved."""
    root = train(two_stages(make_config, tmp_path))
    longer = {"stage.1.steps": 5, "output": str(tmp_path / "longer")}
    whole = train(two_stages(make_config, tmp_path, **longer))
    assert resume(root, stage__1__steps=5) is not None
    assert contents(root) == contents(whole)


@pytest.mark.slow
def test_pictures_show_the_average_and_an_interrupted_grid_saves_the_values(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"samples.enabled": True, "samples.steps": 1, "sample_every": 3}
    settings["prompts.contexts"] = ["{subject} in the rain"]
    whole = train(two_stages(make_config, tmp_path, **settings))
    seen: list[Tensor] = []
    draw = run.draw_samples

    def draw_and_stop(*args, **kwargs):
        seen.append(runs[0].trainables.arenas["lora"].flat.detach().clone())
        if runs[0].done == 3:
            runs[0].interruption.wanted = 15
        return draw(*args, **kwargs)

    runs: list[run.TrainingRun] = []
    begin = run.TrainingRun.begin
    monkeypatch.setattr(run.TrainingRun, "begin", lambda self: (runs.append(self), begin(self))[1])
    monkeypatch.setattr(run, "draw_samples", draw_and_stop)
    cut = two_stages(make_config, tmp_path, **settings, output=str(tmp_path / "cut"))
    cut = cut.model_copy(update={"checkpoint_every": 0})
    with pytest.raises(Interrupted, match="ended after step 3"):
        train(cut)
    assert torch.equal(seen[-1], state(whole, 3)["lora/average"])
    ours, theirs = state(tmp_path / "cut", 3), state(whole, 3)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    monkeypatch.undo()
    assert resume(tmp_path / "cut", checkpoint_every=1) is not None
    finished, expected = contents(tmp_path / "cut"), contents(whole)
    assert all(expected[name] == content for name, content in finished.items())
