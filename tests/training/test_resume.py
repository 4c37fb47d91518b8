"""A resumed run is the uninterrupted one, bit for bit; and what a resume refuses."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from functools import partialmethod
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from fastppt.config import RunConfig
from fastppt.config_io import build_config
from fastppt.errors import UserError
from fastppt.objectives.denoising import Indicator
from fastppt.outputs import plots
from fastppt.outputs.folder import RunFolder
from fastppt.outputs.lora_files import run_name
from fastppt.training import engine, loop, run, runners
from fastppt.training import resume as resuming
from fastppt.training.interrupt import Interrupted
from fastppt.training.loop import train as train_run
from fastppt.training.resume import plan_resume
from fastppt.training.runners import EagerRunner
from fastppt.training.snapshot import named_tensors
from fastppt.training.state import FOLLOWS, restore_state, run_state
from tests.training.replay import ReplayRecorder
from tests.training.runs import contents, resume, resume_copy
from tests.training.stages import WITH_BASE, build_stage, run_stage

MakeConfig = Callable[..., RunConfig]
ADAPTIVE = {"stage.0.objectives.denoising.weighting": "adaptive", "photos.views": 4}

# Text encoders and a new word move too.
TEXT = {
    "stage.0.trainables.text_encoder_lora.rank": 2,
    "stage.0.trainables.tokens.vectors": 2,
    "stage.0.trainables.tokens.keep_norm": True,
    "prompts.token": "<v>",
}


def train(config: RunConfig) -> Path:
    return train_run(config, Console(quiet=True)).folder.root


@pytest.fixture
def mixed_photos(photos: Path, tmp_path: Path) -> Path:
    """Three square photos and two that lie."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number, path in enumerate(sorted(photos.glob("*"))):
        size = (96, 64) if number in (1, 4) else (72, 72)
        Image.open(path).convert("RGB").resize(size).save(folder / f"{number}.png")
    return folder


def test_a_resumed_run_equals_the_uninterrupted_one_from_any_checkpoint_twice_in_a_row(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """Metrics are read every 4 steps, so at none of the checkpoints; grids are drawn every 3."""
    samples = {"samples.enabled": True, "samples.steps": 1, "sample_every": 3}
    samples["prompts.contexts"] = ["{subject} in the rain"]
    whole = train(make_config(checkpoint_every=2, name="x", **samples))
    expected = contents(whole)
    assert {f"checkpoints/step-00000{n}/state.safetensors" for n in (2, 4, 6)} < expected.keys()
    once = resume_copy(whole, 2, tmp_path / "once")
    assert contents(once) == expected
    twice = resume_copy(once, 4, tmp_path / "twice")
    assert contents(twice) == expected
    shutil.rmtree(whole)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("mini-sdxl", {"stage.0.gradient_accumulation": 2, "stage.0.schedule": "cosine"}),
        ("mini-sd", {"model.precision": "bf16", "stage.0.objectives.anchor.form": "raw"}),
        ("mini-sd3", {"model.precision": "fp16", "stage.0.objectives.anchor.form": "decoupled"}),
        ("mini-sdxl", {"photos.buckets": True}),
        ("mini-sdxl", WITH_BASE | {"stage.0.base_every": 2}),
        # A photo's views change before steps 3 and 6; at step 4 the next ones are half encoded.
        ("mini-sd", ADAPTIVE | {"photos.refresh_every": 3, "stage.0.steps": 9}),
        pytest.param("mini-sdxl", TEXT | {"model.precision": "bf16"}, marks=pytest.mark.slow),
        ("mini-sdxl", {"deterministic": True, "stage.0.objectives.anchor.to": "zero"}),
    ],
    ids=[
        "accumulated",
        "bf16",
        "fp16",
        "buckets",
        "with_base",
        "refreshed",
        "text",
        "deterministic",
    ],
)
def test_every_kind_of_run_is_resumed_bit_for_bit(
    make_config: MakeConfig,
    tmp_path: Path,
    mixed_photos: Path,
    model: str,
    settings: dict[str, object],
) -> None:
    if "photos.buckets" in settings:
        settings = settings | {"photos.folder": str(mixed_photos)}
    whole = train(make_config(checkpoint_every=4, name="x", **{"model.path": model, **settings}))
    assert contents(resume_copy(whole, 4, tmp_path / "copy")) == contents(whole)


@pytest.mark.slow
def test_a_refreshed_run_whose_views_are_not_fast_forwarded_is_another(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the test above tests it."""
    settings = {**ADAPTIVE, "photos.refresh_every": 1, "stage.0.steps": 7, "model.path": "mini-sd"}
    # Every bin asks for augmented views with probability 0.8.
    monkeypatch.setattr(Indicator, "gamma", lambda self, t: torch.ones_like(t, dtype=torch.float32))
    whole = train(make_config(checkpoint_every=5, name="x", **settings))
    assert contents(resume_copy(whole, 5, tmp_path / "right")) == contents(whole)
    monkeypatch.setattr(run.ViewRefresh, "start_at", lambda self, num_steps: None)
    assert contents(resume_copy(whole, 5, tmp_path / "wrong")) != contents(whole)


STAGE = """
[[stage]]
steps = {steps}
[stage.trainables.lora]
rank = 4
learning_rate = 1e-3
[stage.objectives.denoising]
[stage.objectives.anchor]
form = "{form}"
weight = 0.1
"""


def two_stages(make_config: MakeConfig, tmp_path: Path, **settings: object) -> RunConfig:
    """A run whose second stage is held to where the first one ended."""
    file = tmp_path / "run.toml"
    file.write_text(STAGE.format(steps=3, form="raw") + STAGE.format(steps=4, form="effective"))
    base = make_config()
    given: dict[str, Any] = {
        "model.path": "mini-sdxl",
        "model.device": "cpu",
        "photos.folder": str(base.photos.folder),
        "prompts.class_noun": "robot",
        "samples.enabled": False,
        "log_every": 2,
        "name": "x",
        "output": str(tmp_path / "out"),
    }
    return build_config(file=file, settings=list((given | settings).items()))


@pytest.mark.slow
def test_a_run_of_two_stages_is_resumed_within_each_and_between_them(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    whole = train(two_stages(make_config, tmp_path, checkpoint_every=1))
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == [0, 0, 0, 1, 1, 1, 1]
    assert rows[3]["anchor"] == 0 and rows[-1]["anchor"] > 0
    for step in (2, 3, 5):
        assert contents(resume_copy(whole, step, tmp_path / str(step))) == contents(whole)


def test_a_run_that_began_from_a_lora_file_is_resumed_without_the_file(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """The anchor is what the file held, and lies in the state."""
    first = train(make_config(output=str(tmp_path / "first"), name="x", **TEXT))
    init = {"stage.0.trainables.lora.init": str(first), "output": str(tmp_path / "second")}
    whole = train(make_config(checkpoint_every=3, name="x", **TEXT, **init))
    shutil.rmtree(first)
    copy = shutil.copytree(whole, tmp_path / "copy")
    assert "note" not in said(copy / "checkpoints" / "step-000003")
    assert contents(copy) == contents(whole)


def test_a_replayed_run_is_resumed_bit_for_bit(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "why_not_capture", lambda device: None)
    monkeypatch.setattr(runners, "CudaRecorder", lambda device, given: ReplayRecorder(given))
    config = make_config(engine="graph", checkpoint_every=4, name="x", **WITH_BASE)
    whole = train(config)
    replayed = resume_copy(whole, 4, tmp_path / "copy")
    assert contents(replayed) == contents(whole)
    # Another engine may take over.
    assert contents(resume_copy(whole, 4, tmp_path / "eager", engine="eager")) == contents(whole)


@pytest.mark.slow
def test_a_compiled_run_is_resumed_bit_for_bit(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a backend that takes fewer minutes: what it makes is run operator by operator."""
    monkeypatch.setattr(engine, "why_not_compile", lambda device: None)
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", partialmethod(compile_module, backend="aot_eager")
    )
    settings = {"stage.0.steps": 4, "model.path": "mini-sd"}
    whole = train(make_config(engine="compile", checkpoint_every=2, name="x", **settings))
    assert contents(resume_copy(whole, 2, tmp_path / "copy")) == contents(whole)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["eager", "graph"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_deterministic_run_on_a_gpu_is_resumed_bit_for_bit(
    make_config: MakeConfig, tmp_path: Path, name: str, precision: str
) -> None:
    settings = {"model.device": "cuda", "model.precision": precision, **WITH_BASE}
    config = make_config(engine=name, deterministic=True, checkpoint_every=4, name="x", **settings)
    whole = train(config)
    assert contents(resume_copy(whole, 4, tmp_path / "copy")) == contents(whole)
    assert not torch.are_deterministic_algorithms_enabled()


# The state.

EVERYTHING = WITH_BASE | {"model.precision": "fp16", "stage.0.objectives.anchor.form": "raw"}


@torch.no_grad()
def put(step: Any, values: dict[str, torch.Tensor]) -> None:
    """Write values by name, the generator's among them."""
    for name, tensor in run_state(step).items():
        if name == "generator":
            step.generator.set_state(values[name])
        else:
            tensor.copy_(values[name])


def copy_of(step: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in run_state(step).items()}


def test_no_item_of_the_state_can_be_left_out(make_config: MakeConfig) -> None:
    """A step after a state that lacks one item is not that after the whole state."""
    (step,), adapters = build_stage(make_config, "mini-sd", **EVERYTHING)
    runner = EagerRunner([step])
    start = copy_of(step)
    # So that the loss scale has something to remember, too.
    step.loss_scale.scale.fill_(2.0**10)
    run_stage(runner, [step], 3)
    saved = copy_of(step)
    assert {"generator", "indicator/base_ema", "loss_scale/scale", "lora/values"} < saved.keys()

    def after(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        put(step, values)
        adapters.refresh()
        run_stage(runner, [step], 1)
        return copy_of(step)

    expected = after(saved)
    assert equal(after(saved), expected)
    assert saved.keys() == start.keys() >= {"lora/anchor", "lora/step", "lora/exp_avg_sq"}
    for name in saved.keys() - {"lora/anchor"}:
        assert not equal(after(saved | {name: start[name]}), expected), name
    resumed_from = saved["lora/values"]
    assert not equal(after(saved | {"lora/anchor": resumed_from}), expected)


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether states are equal but for the anchors, bit for bit (NaN among them)."""
    return all(
        torch.equal(first[name].view(-1).view(torch.uint8), second[name].view(-1).view(torch.uint8))
        for name in first.keys() - {"lora/anchor"}
    )


def test_what_a_step_writes_is_in_the_state_or_follows_from_it(make_config: MakeConfig) -> None:
    (step,), _ = build_stage(make_config, "mini-sd", **EVERYTHING)
    run_stage(EagerRunner([step]), [step], 2)
    written, saved = named_tensors(step), run_state(step)
    left_out = {n for n in written if n.startswith("ring/") or n.endswith(FOLLOWS)}
    assert written.keys() | {"lora/anchor", "generator"} == saved.keys() | left_out
    for name in left_out:
        if name.endswith(("losses", "/gradient")):
            assert not written[name].any(), name
    rounded = written["lora/values"].to(torch.float16)
    assert torch.equal(written["lora/working_copy"], rounded)
    assert step.ring.count == 2


def test_a_state_of_other_trainables_is_refused(make_config: MakeConfig) -> None:
    (step,), adapters = build_stage(make_config)
    trainables = type("T", (), {"arenas": {"lora": adapters.arena}})
    state = copy_of(step)
    lacking = {name: tensor for name, tensor in state.items() if name != "lora/exp_avg"}
    with pytest.raises(UserError, match=r"not of this run: lora/exp_avg\."):
        restore_state(step, trainables, lacking, 0)
    with pytest.raises(UserError, match=r"checkpoint's lora/values is torch.float32 \(7,\)"):
        restore_state(step, trainables, state | {"lora/values": torch.zeros(7)}, 0)


# What is asked for, and what is refused.


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints of steps 2, 4 and 6. Read only: copy it."""
    settings = {
        "model.path": "mini-sdxl",
        "model.device": "cpu",
        "photos.folder": str(shutil.copytree(photos, tmp_path_factory.mktemp("own") / "photos")),
        "photos.resolution": 32,
        "prompts.class_noun": "robot",
        "output": str(tmp_path_factory.mktemp("finished") / "out"),
        "samples.enabled": False,
        "stage.0.steps": 6,
        "stage.0.trainables.lora.rank": 4,
        "checkpoint_every": 2,
        "name": "x",
    }
    return train(build_config("ppt-lora", settings=list(settings.items())))


@pytest.fixture
def stopped(finished: Path, tmp_path: Path) -> Path:
    """The same run, killed after step 5: moved, and without what it leaves at its end."""
    root = shutil.copytree(finished, tmp_path / "moved")
    shutil.rmtree(root / "checkpoints" / "step-000006")
    for path in (*root.glob("*.safetensors"), root / "README.md"):
        path.unlink()
    return root


def said(path: Path, **settings: object) -> str:
    console = Console(file=StringIO(), width=400)
    loop.resume(path, [(k.replace("__", "."), v) for k, v in settings.items()], console)
    return console.file.getvalue()


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_a_killed_run_goes_on_from_its_newest_checkpoint_where_it_lies_now(
    stopped: Path, finished: Path
) -> None:
    leftovers = [stopped / "checkpoints" / ".step-000006.tmp", stopped / ".metrics.jsonl.7.tmp"]
    leftovers[0].mkdir()
    leftovers[1].write_text("half")
    text = said(stopped)
    assert f"resume: going on after step 4 ({stopped}/checkpoints/step-000004)" in text
    assert contents(stopped) == contents(finished)
    assert f'output = "{stopped}"' in (stopped / "config.toml").read_text()
    assert not any(path.exists() for path in leftovers)


def test_a_run_without_a_name_keeps_that_of_its_files_where_it_is_moved_to(stopped: Path) -> None:
    config = stopped / "config.toml"
    config.write_text(config.read_text().replace('name = "x"', '# name = ""'))
    manifest = stopped / "checkpoints" / "step-000004" / "manifest.json"
    table = json.loads(manifest.read_text())
    table["config"]["name"] = None
    manifest.write_text(json.dumps(table))
    plan = plan_resume(RunFolder(stopped), None, [])
    assert plan is not None and plan.changes == []
    assert run_name(plan.config) == "out" and stopped.name != "out"


def test_a_finished_run_says_so_and_is_left_alone(finished: Path) -> None:
    before = snapshot(finished)
    assert "the run is finished" in said(finished)
    with pytest.raises(UserError, match=r"only more steps of its last stage.*save_dtype was fp32"):
        resume(finished, save_dtype="bf16")
    assert snapshot(finished) == before


def test_more_steps_go_on_with_a_finished_run(
    finished: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    copy = shutil.copytree(finished, tmp_path / "longer")
    text = said(copy, stage__0__steps=8)
    assert "changed: stage.0.steps was 6 and is 8" in text
    settings = {"photos.folder": str(build_config(file=finished / "config.toml").photos.folder)}
    settings |= {"stage.0.steps": 8, "stage.0.trainables.lora.learning_rate": None}
    whole = train(make_config(checkpoint_every=2, name="x", log_every=10, **settings))
    assert contents(copy) == contents(whole)


def test_a_finished_run_that_has_been_given_more_steps_is_never_taken_for_finished(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where it is killed as it is given them: the sign goes first."""
    copy = shutil.copytree(finished, tmp_path / "copy")

    def die(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(resuming, "write_file", die)
    with pytest.raises(RuntimeError):
        resume(copy, stage__0__steps=8)
    assert plan_resume(RunFolder(copy), None, []) is not None


def test_a_run_that_was_ended_as_its_plots_were_drawn_is_not_finished(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(plots=True, checkpoint_every=2, **{"stage.0.steps": 2})

    def die(*_: object) -> None:
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(plots, "draw_plots", die)
        with pytest.raises(RuntimeError):
            train(config)
    assert config.output is not None
    assert resume(config.output) is not None
    assert list((config.output / "plots").glob("*.png"))


def test_a_signal_before_a_run_goes_on_leaves_it_as_it_was(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the command that was given, which may have changed settings or named a checkpoint."""
    before = snapshot(stopped)
    monkeypatch.setattr(loop, "load_family", lambda model: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted, match="the same command goes on with the run") as ended:
        resume(stopped / "checkpoints" / "step-000002")
    assert (ended.value.exit_code, ended.value.folder) == (143, None)
    assert snapshot(stopped) == before


def test_a_run_killed_between_its_last_checkpoint_and_the_deletion_of_others_keeps_as_many_as_asked(
    finished: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(finished, tmp_path / "copy")
    (root / "README.md").unlink()
    resume(root, keep_checkpoints=2)
    kept = sorted(path.name for path in (root / "checkpoints").iterdir())
    assert kept == ["step-000004", "step-000006"]


def test_a_finished_run_without_checkpoints_says_what_to_do_instead(
    finished: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match=f"no checkpoint to go on from; --init-lora {copy}"):
        resume(copy, stage__0__steps=8)


def test_a_run_killed_before_its_first_checkpoint_starts_over(
    stopped: Path, finished: Path
) -> None:
    shutil.rmtree(stopped / "checkpoints")
    assert "there is no checkpoint yet: starting at step 0" in said(stopped)
    assert contents(stopped) == contents(finished)


def test_a_run_killed_right_after_its_folder_was_made_is_resumed(
    stopped: Path, finished: Path
) -> None:
    for path in stopped.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "config.toml":
            path.unlink()
    resume(stopped)
    assert contents(stopped) == contents(finished)


def test_keys_that_may_change_are_named_and_kept(stopped: Path) -> None:
    changes = {"log_every": 1, "keep_checkpoints": 1, "stage__0__checkpoint_every": 5}
    text = said(stopped, save_dtype="bf16", **changes)
    assert [line for line in text.splitlines() if line.startswith("changed: ")] == [
        "changed: log_every was 10 and is 1",
        "changed: keep_checkpoints was 0 and is 1",
        "changed: save_dtype was fp32 and is bf16",
        "changed: stage.0.checkpoint_every was 0 and is 5",
    ]
    config = build_config(file=stopped / "config.toml")
    assert (config.save_dtype, config.log_every) == ("bf16", 1)
    tensors = load_file(stopped / "pytorch_lora_weights.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["step-000006"]


@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        ({"seed": 1}, ["seed was 0 and is 1"]),
        # Files of the old name would stay beside those of the new one.
        ({"name": "y"}, ["name was x and is y"]),
        (
            {"model.path": "mini-sd", "stage.0.batch_size": 2},
            ["model.path was mini-sdxl and is mini-sd", "stage.0.batch_size was 1 and is 2"],
        ),
        ({"model.device": "cuda"}, ["model.device was cpu and is cuda"]),
        ({"stage.0.steps": 5}, ["stage.0.steps was 6 and is 5"]),
        ({"stage.0.objectives.anchor.weight": 0.5}, ["anchor.weight was 0.003 and is 0.5"]),
        (
            {"stage.0.objectives.feature_alignment.weight": 30.0},
            ["feature_alignment.weight was unset and is 30.0"],
        ),
        ({"prompts.template": "{subject}"}, ["prompts.template was a photo of {subject}"]),
        ({"output": "/elsewhere"}, ["--output: a resumed run goes on in its own folder"]),
    ],
)
def test_keys_that_would_make_another_run_of_it_are_refused_by_name(
    stopped: Path, settings: dict[str, object], messages: list[str]
) -> None:
    before = snapshot(stopped)
    with pytest.raises(UserError) as error:
        loop.resume(stopped, list(settings.items()), Console(quiet=True))
    assert all(message in str(error.value) for message in messages)
    assert snapshot(stopped) == before


def test_more_steps_are_refused_where_the_learning_rate_depends_on_their_number(
    make_config: MakeConfig,
) -> None:
    root = train(make_config(checkpoint_every=2, **{"stage.0.schedule": "linear"}))
    with pytest.raises(UserError, match=r"stage\.0\.steps was 6 and is 8"):
        resume(root, stage__0__steps=8)


def test_a_configuration_edited_by_hand_is_compared_with_what_was_trained(stopped: Path) -> None:
    file = stopped / "config.toml"
    file.write_text(file.read_text().replace("seed = 0", "seed = 5", 1))
    with pytest.raises(UserError, match="seed was 0 and is 5"):
        resume(stopped)


def test_places_given_in_other_words_are_no_change(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build_config(file=stopped / "config.toml").photos.folder
    monkeypatch.chdir(folder.parent)
    assert "changed" not in said(stopped, photos__folder="photos", model__path="mini-sdxl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "robot-2.png").unlink(), "robot-2.png is gone"),
        (lambda folder: shutil.copy(folder / "robot-1.png", folder / "z.png"), "z.png is new"),
        (lambda folder: shutil.copy(folder / "robot-1.png", folder / "robot-2.png"), "has changed"),
        (lambda folder: (folder / "robot-3.txt").write_text("{subject}"), "caption of robot-3.png"),
    ],
)
def test_other_photos_are_refused_by_name(
    stopped: Path, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    folder = build_config(file=stopped / "config.toml").photos.folder
    moved = shutil.copytree(folder, tmp_path / "photos")
    change(moved)
    before = snapshot(stopped)
    with pytest.raises(UserError, match=f"photos: .*{message}.* since the run began"):
        resume(stopped, photos__folder=str(moved))
    assert snapshot(stopped) == before


def test_other_weights_of_the_network_are_refused(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_load = loop.load_family

    def load(model: Any) -> Any:
        family = real_load(model)
        with torch.no_grad():
            family.network.conv_out.bias[0] += 1e-6
        return family

    monkeypatch.setattr(loop, "load_family", load)
    before = snapshot(stopped)
    with pytest.raises(UserError, match=r"model\.path: the model's weights are not those"):
        resume(stopped)
    assert snapshot(stopped) == before


def test_another_machine_and_other_encodings_are_noted(stopped: Path) -> None:
    file = stopped / "checkpoints" / "step-000004" / "manifest.json"
    table = json.loads(file.read_text())
    table["machine"]["torch"] = "1.0"
    table["identity"]["encodings"] = "0"
    file.write_text(json.dumps(table))
    text = said(stopped)
    assert f"note: torch was 1.0 and is {version('torch')}; photos, class images or" in text


def test_rows_of_metrics_that_are_gone_are_noted(stopped: Path) -> None:
    (stopped / "metrics.jsonl").unlink()
    assert "lacks rows of the first 4 steps" in said(stopped)
    rows = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 6]


def test_the_model_card_counts_the_time_before_the_interruption(stopped: Path) -> None:
    file = stopped / "checkpoints" / "step-000004" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"seconds": 5000.0}))
    resume(stopped)
    assert "| steps | 6 in 500" in (stopped / "README.md").read_text()


def test_curves_go_on_without_a_step_twice(make_config: MakeConfig, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    whole = train(make_config(checkpoint_every=4, tensorboard=True, log_every=1))
    copy = resume_copy(whole, 4, tmp_path / "copy")
    points = []
    for root in (whole, copy):
        events = EventAccumulator(str(root / "tensorboard"))
        events.Reload()
        points.append([(event.step, event.value) for event in events.Scalars("loss")])
    assert points[0] == points[1] and [step for step, _ in points[0]] == [1, 2, 3, 4, 5, 6]


def test_no_run_to_resume_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match=f"--resume {path}: (holds no run|is not a folder)"):
            resume(path)


def test_what_lies_beyond_an_earlier_checkpoint_goes_with_the_resume(
    finished: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    (copy / "samples").mkdir()
    for step in (1, 5):
        (copy / "samples" / f"step-{step:06d}.png").write_bytes(b"")
    resume(copy / "checkpoints" / "step-000002", checkpoint_every=0)
    assert [path.name for path in (copy / "checkpoints").iterdir()] == ["step-000002"]
    assert [path.name for path in (copy / "samples").iterdir()] == ["step-000001.png"]
    rows = [json.loads(line)["step"] for line in (copy / "metrics.jsonl").read_text().splitlines()]
    assert rows == [1, 2, 3, 4, 5, 6]


def test_what_lies_beyond_is_kept_until_the_run_goes_on(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    before = snapshot(copy)

    def fail(*_: object) -> None:
        raise UserError("no")

    monkeypatch.setattr(run, "restore_state", fail)
    with pytest.raises(UserError, match="no"):
        resume(copy / "checkpoints" / "step-000002")
    assert snapshot(copy) == before
