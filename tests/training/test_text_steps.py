"""Runs in which text is trained: what moves, what stays, and that every engine agrees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from fastppt.config import RunConfig
from fastppt.data.photos import CroppedPhoto, Photo, find_photos
from fastppt.data.prompts import encode_prompt_bank
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.families.loading import load_family, outline_family
from fastppt.mini import build_mini
from fastppt.trainables.trainables import LORA, TEXT_ENCODER_LORA, TOKENS, Trainables
from fastppt.training import loop, run
from fastppt.training.build import build_trainables
from fastppt.training.compiling import check_gradients
from fastppt.training.constants import MODULES_EVERY, constants_of
from fastppt.training.encoding import encode
from fastppt.training.live_bytes import LiveBytes
from fastppt.training.loop import resolve
from fastppt.training.memory import plan_memory
from fastppt.training.metric_names import metric_names
from fastppt.training.ring import MetricRing
from fastppt.training.run import new_generator
from fastppt.training.runners import EagerRunner, GraphRunner, make_runner
from fastppt.training.snapshot import written_tensors
from fastppt.training.stage import build_steps, learning_rates
from fastppt.training.step import Step, accumulate_gradients
from tests.training.objective_steps import ONE_FAST
from tests.training.replay import ReplayRecorder, storage_of
from tests.training.stages import WITH_BASE, are_equal, state_of

MODELS = ["mini-sd", "mini-sdxl", "mini-sd3"]
MakeConfig = Callable[..., RunConfig]
TRAINABLES = "stage.0.trainables"
TEXT: dict[str, object] = {
    "prompts.token": "<v>",
    "prompts.subject": "{token}",
    "prompts.class_prompt": "a photo of {class_noun}",
    f"{TRAINABLES}.text_encoder_lora.rank": 2,
    f"{TRAINABLES}.text_encoder_lora.learning_rate": 1e-3,
    f"{TRAINABLES}.tokens.vectors": 2,
    f"{TRAINABLES}.tokens.learning_rate": 1e-2,
    f"{TRAINABLES}.tokens.keep_norm": True,
}


def build(
    make_config: MakeConfig, model: str, **settings: object
) -> tuple[list[Step], Trainables, Family]:
    config = make_config(**{"model.path": model, **TEXT, **settings})
    family = load_family(config.model)
    config = resolve(config, family)
    trainables = build_trainables(config, family)
    photos = find_photos(config.photos.folder)
    buckets, _ = encode(config, family, photos, Console(quiet=True))
    ring = MetricRing(metric_names(config.stage), 64, family.device)
    generator = new_generator(config, family)
    steps = build_steps(config, config.stage[0], family, trainables, buckets, ring, generator)
    for name, rate in learning_rates(config.stage[0]).items():
        steps[0].learning_rates[name].fill_(rate)
    return steps, trainables, family


def take(runner: Any, num_steps: int) -> None:
    for number in range(num_steps):
        runner.run(0, number)


def frozen(family: Family) -> dict[str, Tensor]:
    """Copies of all weights of network and text encoders."""
    modules = {"network": family.network, **family.text.clips}
    return {
        f"{owner}.{name}": weight.detach().clone()
        for owner, module in modules.items()
        for name, weight in module.named_parameters()
    }


@pytest.mark.parametrize(
    ("model", "precision"),
    [
        ("mini-sd", "fp32"),
        pytest.param("mini-sd", "bf16", marks=pytest.mark.slow),
        pytest.param("mini-sdxl", "fp32", marks=pytest.mark.slow),
        ("mini-sdxl", "bf16"),
        ("mini-sd3", "fp32"),
        pytest.param("mini-sd3", "bf16", marks=pytest.mark.slow),
    ],
)
def test_only_what_is_trained_moves(make_config: MakeConfig, model: str, precision: str) -> None:
    steps, trainables, family = build(
        make_config, model, **WITH_BASE, **{"model.precision": precision}
    )
    weights = frozen(family)
    before = {name: arena.flat.detach().clone() for name, arena in trainables.arenas.items()}
    take(EagerRunner(steps), 3)
    after = frozen(family)
    assert weights.keys() == after.keys()
    assert all(torch.equal(weights[name], after[name]) for name in weights)
    for name, arena in trainables.arenas.items():
        assert not torch.equal(arena.flat, before[name]), name
    # As loaded, too, and not only since the run began.
    pipeline: Any = build_mini(model)
    for component, clip in family.text.clips.items():
        loaded = getattr(pipeline, component).to(family.dtype).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in clip.state_dict().items())
    for component, rows in trainables.tokens.rows.items():
        start = family.text.embeddings_of("robot")[component].float().norm()
        lengths = rows.norm(dim=1)
        torch.testing.assert_close(lengths, start.expand_as(lengths), rtol=1e-5, atol=0)


def eager_and_replayed(
    make_config: MakeConfig, model: str, num_steps: int, **settings: object
) -> tuple[list[Tensor], list[Tensor], ReplayRecorder]:
    steps, _, _ = build(make_config, model, **settings)
    take(EagerRunner(steps), num_steps)
    eager = state_of(steps[0])
    steps, _, _ = build(make_config, model, **settings)
    recorder = ReplayRecorder([steps[0].generator])
    take(GraphRunner(steps, recorder), num_steps)
    written = {storage_of(t) for recording in recorder.recordings for t in recording.written}
    assert written == {storage_of(tensor) for tensor in written_tensors(steps[0])}
    return eager, state_of(steps[0]), recorder


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        pytest.param("mini-sd", {"model.precision": "fp16"}, marks=pytest.mark.slow),
        pytest.param("mini-sdxl", {}, marks=pytest.mark.slow),
        ("mini-sd3", {"model.precision": "bf16", "stage.0.gradient_accumulation": 2}),
    ],
)
def test_replayed_steps_with_everything_on_equal_eager_ones(
    make_config: MakeConfig, model: str, settings: dict[str, object]
) -> None:
    eager, replayed, _ = eager_and_replayed(make_config, model, 3, **WITH_BASE, **settings)
    assert are_equal(eager, replayed)


@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_captured_steps_on_a_gpu_equal_eager_ones(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, model: str, precision: str
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    device = {"model.device": "cuda", "model.precision": precision, **WITH_BASE}
    states = []
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            for engine in ("eager", "graph"):
                steps, _, _ = build(make_config, model, **device)
                torch.cuda.set_sync_debug_mode("default")
                take(make_runner(engine, steps), 5)
                states.append(state_of(steps[0]))
    finally:
        torch.use_deterministic_algorithms(False)
    assert are_equal(*states)


@pytest.mark.gpu
def test_a_step_with_text_does_not_wait_for_the_gpu(make_config: MakeConfig) -> None:
    steps, _, _ = build(make_config, "mini-sdxl", **WITH_BASE, **{"model.device": "cuda"})
    runner = EagerRunner(steps)
    take(runner, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        take(runner, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("still", [LORA, TEXT_ENCODER_LORA, TOKENS])
def test_each_trainable_has_a_learning_rate_of_its_own(make_config: MakeConfig, still: str) -> None:
    # No decay and no anchor: what has no learning rate does not move by a bit.
    settings = {f"{TRAINABLES}.{still}.learning_rate": 0.0, f"{TRAINABLES}.tokens.keep_norm": False}
    steps, trainables, _ = build(make_config, "mini-sd", **settings)
    before = {name: arena.flat.detach().clone() for name, arena in trainables.arenas.items()}
    take(EagerRunner(steps), 2)
    for name, arena in trainables.arenas.items():
        assert torch.equal(arena.flat, before[name]) == (name == still)


def test_adam_moves_each_by_its_own_rate(make_config: MakeConfig) -> None:
    """The first AdamW update of an element is its learning rate, whatever the gradient."""
    settings = {f"{TRAINABLES}.tokens.keep_norm": False, "stage.0.optimizer.weight_decay": 0.0}
    steps, trainables, _ = build(make_config, "mini-sd3", **settings)
    before = {name: arena.flat.detach().clone() for name, arena in trainables.arenas.items()}
    take(EagerRunner(steps), 1)
    for name, rate in ((LORA, 1e-3), (TEXT_ENCODER_LORA, 1e-3), (TOKENS, 1e-2)):
        largest = (trainables.arenas[name].flat.detach() - before[name]).abs().max().item()
        assert largest == pytest.approx(rate, rel=0.01), name


def test_a_skipped_step_moves_no_row_by_a_bit(make_config: MakeConfig) -> None:
    steps, trainables, _ = build(make_config, "mini-sdxl")
    runner = EagerRunner(steps)
    take(runner, 2)
    before = [arena.flat.detach().clone() for arena in trainables.arenas.values()]
    steps[0].latents.posteriors.fill_(torch.nan)
    take(runner, 2)
    assert steps[0].optimizer.skipped
    after = [arena.flat.detach() for arena in trainables.arenas.values()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("model", MODELS)
def test_subject_prompts_are_encoded_anew_and_class_prompts_are_not(
    make_config: MakeConfig, model: str
) -> None:
    steps, _, family = build(make_config, model)
    bank, rows = steps[0].prompts, torch.tensor([0])
    subject, plain = bank.subject(rows), bank.plain_class(rows)
    assert subject.tokens.requires_grad and not plain.tokens.requires_grad
    take(EagerRunner(steps), 1)
    assert not torch.equal(bank.subject(rows).tokens, subject.tokens)
    assert torch.equal(bank.plain_class(rows).tokens, plain.tokens)
    num_clip = family.text.num_tokens
    assert torch.equal(bank.subject(rows).tokens[:, num_clip:], subject.tokens[:, num_clip:])
    assert bank.select([2, 0]).live is bank.live


def test_the_base_is_asked_with_encoders_as_they_were(
    make_config: MakeConfig, family: Family, photos: Path
) -> None:
    """Whatever adapters there are when prompts are encoded."""
    config = make_config(**TEXT)
    trainables = build_trainables(config, family)
    found = find_photos(photos)[:1]
    crops = [CroppedPhoto(torch.zeros(3, 64, 64), (0, 0))]

    def bank() -> Tensor:
        return encode_prompt_bank(family, config.prompts, found, crops).embeddings.tokens

    before = bank()
    for pair in trainables.text_encoder_lora.pairs:
        pair.up.fill_(0.2)
    assert torch.equal(bank(), before)
    assert not torch.equal(family.encode_prompts(["a photo of robot"]).tokens, before[1:])


def test_a_class_prompt_that_says_the_new_word_is_refused(
    make_config: MakeConfig, family: Family, photos: Path
) -> None:
    config = make_config(**TEXT | {"prompts.token": "obo"})
    build_trainables(config, family)
    crops = [CroppedPhoto(torch.zeros(3, 64, 64), (0, 0))]
    with pytest.raises(UserError, match=r"'obo' is read in the class prompt 'a photo of robot'"):
        encode_prompt_bank(family, config.prompts, find_photos(photos)[:1], crops)


@pytest.mark.slow
@pytest.mark.parametrize("model", ONE_FAST)
def test_what_text_takes_is_what_is_predicted(make_config: MakeConfig, model: str) -> None:
    settings = {**WITH_BASE, "model.path": model, "stage.0.batch_size": 2, "engine": "eager"}
    config = make_config(**TEXT, **settings)
    plan = plan_memory(config, outline_family(config.model, torch.float32))
    (step,), trainables, family = build(make_config, model, **settings)
    with LiveBytes(torch.device("cpu")) as counter, counter.kept_for_backward():
        accumulate_gradients(step)
    assert plan.kept == pytest.approx(counter.kept, rel=0.01)
    in_step = plan.peaks["train"] - sum(plan.lasting.values())
    assert in_step == pytest.approx(counter.peak, rel=0.02)
    assert plan.lasting["text encoders"] == family.weight_bytes()["text encoders"] > 0
    arenas = trainables.arenas.values()
    assert plan.lasting["trained values"] == sum(arena.flat.nbytes for arena in arenas)
    moments = [(s["exp_avg"], s["exp_avg_sq"]) for s in step.optimizer.state.values()]
    assert plan.lasting["moments"] == sum(a.nbytes + b.nbytes for a, b in moments)
    assert len(moments) == 3
    assert plan.lasting["tables and metrics"] < 8192
    plain = make_config(**settings)
    without = plan_memory(plain, outline_family(plain.model, torch.float32))
    assert plan.remembered == without.remembered > 0
    assert plan.kept > without.kept and "text encoders" not in without.lasting


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2"])
def test_a_captured_step_sees_a_text_encoder_that_moved(
    make_config: MakeConfig, component: str
) -> None:
    (step,), _, family = build(make_config, "mini-sd3")
    constants = constants_of(step)
    for _ in range(MODULES_EVERY):
        constants.check()
    weight = family.text.table(component).weight
    weight.data = weight.data.clone()
    for _ in range(MODULES_EVERY - 1):
        constants.check()
    with pytest.raises(UserError, match=f"the address of {component}.*token_embedding.weight was"):
        constants.check()


@pytest.mark.parametrize("what", ["prompts.live.ids.clips.text_encoder", "prompts.live"])
def test_a_captured_step_sees_other_prompts(make_config: MakeConfig, what: str) -> None:
    (step,), _, _ = build(make_config, "mini-sd")
    constants = constants_of(step)
    constants.check()
    ids = step.prompts.live.ids.clips
    ids["text_encoder"] = ids["text_encoder"].clone()
    with pytest.raises(UserError, match=f"the address of {what}.* was"):
        constants.check()


@pytest.mark.parametrize("name", ["text_encoder_2.<v>", "q_proj.lora_down", None])
def test_the_check_of_a_compiled_network_looks_at_text_too(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    steps, trainables, _ = build(make_config, "mini-sdxl")
    before = state_of(steps[0])
    monkeypatch.setattr(
        "fastppt.training.compiling.accumulate_gradients", spoiled(trainables, name)
    )
    if name is None:
        check_gradients(steps, trainables)
    else:
        with pytest.raises(UserError, match=r"1 of \d+ trained tensors differ.*") as raised:
            check_gradients(steps, trainables)
        assert name in str(raised.value)
    assert are_equal(before, state_of(steps[0]))


def spoiled(trainables: Trainables, name: str | None) -> Callable[..., None]:
    """Passes of which every second gives a text tensor of that name a wrong gradient."""
    calls: list[int] = []

    def accumulate(step: Step, **keys: bool) -> None:
        accumulate_gradients(step, **keys)
        calls.append(0)
        if name is None or len(calls) % 2:
            return
        for trainable in (TEXT_ENCODER_LORA, TOKENS):
            gradient = trainables.arenas[trainable].grad
            for place, tensor in trainables.tensors[trainable].items():
                if name in place:
                    where = (tensor.shape, tensor.stride(), tensor.storage_offset())
                    gradient.as_strided(*where).mul_(3.0)
                    return

    return accumulate


@pytest.mark.parametrize("model", ONE_FAST)
def test_grids_show_the_text_encoders_as_they_are(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    drawn: list[tuple[Tensor, Tensor]] = []

    def draw(family: Family, prompts: Any, negative: Any, *rest: Any) -> Sequence[Any]:
        drawn.append((prompts.tokens.clone(), negative.tokens.clone()))
        assert not prompts.tokens.requires_grad
        return []

    monkeypatch.setattr(run, "draw_samples", draw)
    monkeypatch.setattr(run, "write_grid", lambda *_: None)
    out = StringIO()
    config = make_config(
        **TEXT, **{"model.path": model, "samples.enabled": True, "stage.0.steps": 2}
    )
    loop.train(config, Console(file=out, width=200))
    (first, negative), (last, last_negative) = drawn
    assert not torch.equal(first, last)
    # Guidance pushes away from what the trained encoders make of the empty prompt, as in diffusers.
    assert torch.equal(negative, last_negative) == (model == "mini-sdxl")
    num_parameters = trained_parameters(config)
    assert f"{num_parameters:,} parameters" in out.getvalue()


def trained_parameters(config: RunConfig) -> int:
    family = load_family(config.model)
    trainables = build_trainables(resolve(config, family), family)
    pairs = [*trainables.lora.pairs, *trainables.text_encoder_lora.pairs]
    return sum(pair.down.numel() + pair.up.numel() for pair in pairs) + (
        trainables.tokens.num_parameters
    )


@pytest.mark.parametrize(
    ("key", "value"), [("text_encoder_lora.rank", 3), ("tokens.vectors", 1), ("tokens.init", "dog")]
)
def test_later_stages_go_on_with_the_same_text(
    make_config: MakeConfig, key: str, value: object
) -> None:
    kind, name = key.split(".")
    stage = make_config(**TEXT).stage[0].model_dump(mode="json")
    stage["trainables"][kind][name] = value
    config = make_config(**TEXT).model_dump(mode="json")
    config["stage"].append(stage)
    with pytest.raises(ValueError, match=f"stage.1.trainables.{key} must be that of stage 0"):
        RunConfig.model_validate(config)


def test_a_photo_whose_caption_names_no_subject_is_text_like_any(
    make_config: MakeConfig, photos: Path
) -> None:
    """With adapters alone, such a caption is encoded by the trained encoders, and by the base's."""
    config = make_config(**TEXT)
    family = load_family(config.model)
    build_trainables(config, family)
    found = [Photo(find_photos(photos)[0].path, "a toy", None, (64, 64))]
    crops = [CroppedPhoto(torch.zeros(3, 64, 64), (0, 0))]
    bank = encode_prompt_bank(family, config.prompts, found, crops, move_text=True)
    assert len(bank.embeddings.tokens) == 1
    assert bank.subject(torch.tensor([0])).tokens.requires_grad
