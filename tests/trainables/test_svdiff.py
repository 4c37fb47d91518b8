"""Spectral shifts are U diag(relu(s + d)) V^T, and go from a run to a network without them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from rich.console import Console
from torch import Tensor, nn

from fastppt.config import ModelConfig
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.families.loading import load_family
from fastppt.trainables.svdiff import (
    BASE_DTYPE,
    SHIFT,
    SINGULAR_VALUES,
    SpectralShifts,
    decompose,
    merge_shifts_,
)
from fastppt.trainables_config import SvdiffConfig
from fastppt.training import loop
from fastppt.training.runners import EagerRunner, GraphRunner
from tests.training.objective_steps import ONE_FAST, compile_blocks_by, load, prepared_trainables
from tests.training.replay import ReplayRecorder
from tests.training.runs import contents, resume_copy
from tests.training.stages import are_equal, run_stage, state_of
from tests.training.weight_steps import APT, stage, weights_config

Change = Callable[[dict[str, Tensor], dict[str, str]], object]


def shifts_for(family: Family, config: SvdiffConfig | None = None) -> SpectralShifts:
    family.make_adaptable()
    return SpectralShifts(
        family.network,
        config or SvdiffConfig(),
        unread=family.unread_projections,
        device=family.device,
        dtype=torch.promote_types(family.dtype, torch.float32),
    )


@torch.no_grad()
def stir(shifts: SpectralShifts, size: float = 0.3) -> None:
    """Give the shifts values; of some matrices the lowest so that relu cuts them off."""
    chance = torch.Generator().manual_seed(3)
    for number, shift in enumerate(shifts.tensors.values()):
        shift.copy_(size * torch.randn(shift.shape, generator=chance, dtype=shift.dtype))
        if number % 3 == 0:
            shift[0] = -100.0


def prediction(family: Family) -> Tensor:
    chance = torch.Generator().manual_seed(1)
    shape = (2, family.network.config.in_channels, 8, 8)
    prompts = family.encode_prompts(["a photo of a robot", "a toy"])
    sizes = family.size_conditions((64, 64), (0, 0), (64, 64)).expand(2, -1)
    noisy = torch.randn(shape, generator=chance, dtype=torch.float64).to(family.dtype)
    return family.predict(noisy, torch.tensor([5, 900]), prompts, sizes)


def plain_prediction(model: str, shifts: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The prediction with every weight formed anew by the equation, and its leaves."""
    family = load(model, torch.float64)
    leaves = {name: shift.clone().requires_grad_() for name, shift in shifts.items()}
    for name, leaf in leaves.items():
        module = family.network.get_submodule(name.removesuffix(".weight"))
        weight = module.weight.detach()
        if weight.dim() == 1:
            changed = weight + leaf
        else:
            left, values, right = torch.linalg.svd(weight.flatten(1), full_matrices=False)
            changed = (left @ torch.diag(torch.relu(values + leaf)) @ right).view(weight.shape)
        del module.weight
        module.weight = changed
    return prediction(family), leaves


@pytest.mark.parametrize("model", ONE_FAST)
def test_prediction_and_gradients_are_those_of_the_equation(model: str) -> None:
    family = load(model, torch.float64)
    shifts = shifts_for(family)
    # Outputs are large where norms are stirred much.
    stir(shifts, 0.01)
    ours = prediction(family)
    theirs, leaves = plain_prediction(model, shifts.tensors)
    base = prediction(load(model, torch.float64))
    drift = (theirs - base).abs().max().item()
    assert drift > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8 * drift)
    chance = torch.Generator().manual_seed(2)
    weights = torch.randn(ours.shape, generator=chance, dtype=torch.float64)
    for arena in shifts.arenas.values():
        arena.grad.zero_()
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    grads = gradients(shifts)
    assert grads.keys() == leaves.keys()
    largest = max(leaf.grad.norm().item() for leaf in leaves.values())
    for name, leaf in leaves.items():
        torch.testing.assert_close(grads[name], leaf.grad, rtol=1e-6, atol=1e-8 * largest, msg=name)
    cut = [n for n, leaf in leaves.items() if leaf[0] == -100.0 and is_matrix(family, n)]
    assert cut and all(grads[name][0] == 0 for name in cut)


def is_matrix(family: Family, name: str) -> bool:
    return family.network.get_parameter(name).dim() > 1


def gradients(shifts: SpectralShifts) -> dict[str, Tensor]:
    """The gradient of each shift, from its arena."""
    arenas = {a.flat.untyped_storage().data_ptr(): a.grad for a in shifts.arenas.values()}
    return {
        name: arenas[t.untyped_storage().data_ptr()][t.storage_offset() :][: t.numel()]
        for name, t in shifts.tensors.items()
    }


@pytest.mark.parametrize("model", ONE_FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_new_shifts_and_shifts_that_are_off_are_the_base_bit_for_bit(
    model: str, dtype: torch.dtype
) -> None:
    family = load(model, dtype)
    before = prediction(family)
    shifts = shifts_for(family)
    assert torch.equal(prediction(family), before)
    stir(shifts)
    with shifts.base():
        assert torch.equal(prediction(family), before)
    assert not torch.equal(prediction(family), before)


def test_a_narrow_network_follows_shifts_below_the_last_digit_of_its_weights() -> None:
    layer = nn.Linear(64, 64, bias=False).requires_grad_(False)
    network = nn.Sequential(layer).bfloat16()
    shifts = SpectralShifts(network, SvdiffConfig(), device=torch.device("cpu"))
    left, _, right = decompose(layer.weight)
    (shift,) = shifts.tensors.values()
    shift.fill_(2e-4)
    change = (left * 2e-4) @ right
    formed = (layer.weight + change).bfloat16()
    assert (formed == layer.weight).double().mean() > 0.9
    inputs = torch.randn(512, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    # Without the base, in whose last digits the sum is rounded.
    layer.weight.zero_()
    expected = inputs.double() @ change.t()
    assert (network(inputs).double() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4), (2, 3, 6)),
        (nn.Conv2d(3, 5, 3, stride=2, padding=1), (2, 3, 7, 7)),
        (nn.Conv2d(5, 2, 3, padding=2, dilation=2), (2, 5, 6, 6)),
        (nn.GroupNorm(2, 6, eps=1e-3), (2, 6, 4, 4)),
        (nn.LayerNorm(6, eps=1e-3), (2, 3, 6)),
        (RMSNorm(6, eps=1e-3), (2, 3, 6)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_each_kind_of_layer_computes_as_with_its_weight_changed(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    network = nn.Sequential(copy.deepcopy(layer)).double().requires_grad_(False)
    chance = torch.Generator().manual_seed(0)
    inputs = torch.randn(shape, generator=chance, dtype=torch.float64)
    shifts = SpectralShifts(
        network, SvdiffConfig(), device=torch.device("cpu"), dtype=torch.float64
    )
    stir(shifts)
    tensors, metadata = shifts.file_tensors(torch.float64)
    merged = nn.Sequential(copy.deepcopy(layer)).double().requires_grad_(False)
    base = merged(inputs)
    merge_shifts_(merged, tensors, metadata)
    assert (merged(inputs) - base).abs().max() > 0.1
    # RMSNorm has its variance in float32.
    torch.testing.assert_close(network(inputs), merged(inputs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (6, 2, 3, 3), (2, 6, 3, 3), (1, 7)])
def test_a_weight_is_decomposed_as_by_an_svd(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, values, right = decompose(weight)
    eye = torch.eye(len(values), dtype=torch.float64)
    torch.testing.assert_close(left.t() @ left, eye)
    torch.testing.assert_close(right @ right.t(), eye)
    torch.testing.assert_close((left * values) @ right, weight.flatten(1))
    torch.testing.assert_close(values, torch.linalg.svdvals(weight.flatten(1)))


def test_directions_that_a_weight_does_not_have_never_move() -> None:
    chance = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 2, generator=chance) @ torch.randn(2, 6, generator=chance)
    left, values, right = decompose(weight)
    assert (values[2:] == 0).all() and (values[:2] > 0).all()
    torch.testing.assert_close(((left * values) @ right).float(), weight)
    layer = nn.Linear(6, 8).requires_grad_(False)
    layer.weight.copy_(weight)
    shifts = SpectralShifts(nn.Sequential(layer), SvdiffConfig(), device=weight.device)
    arena = shifts.arenas[""]
    layer(torch.randn(5, 6, generator=chance)).square().sum().backward()
    assert (arena.grad[:2] != 0).all() and (arena.grad[2:] == 0).all()


def test_targets_choose_weights_and_a_part_without_any_is_not_there() -> None:
    family = load("mini-sdxl")
    attention = shifts_for(family, SvdiffConfig(targets=["*.attn2.*"]))
    assert attention.arenas.keys() == {""}
    assert all(".attn2.to_" in name and name.endswith(".weight") for name in attention.tensors)
    norms = shifts_for(load("mini-sdxl"), SvdiffConfig(targets=["*norm*"]))
    assert norms.arenas.keys() == {"1d"}
    everything = shifts_for(load("mini-sdxl"))
    assert everything.arenas.keys() == {"", "1d"}
    weights = {name for name, _ in load("mini-sdxl").network.named_parameters()}
    assert everything.tensors.keys() == {name for name in weights if name.endswith(".weight")}


def test_a_target_that_matches_nothing_names_the_nearest() -> None:
    message = r"svdiff.targets: '\*.attn3.\*' matches no weight; the nearest are .*weight"
    with pytest.raises(UserError, match=message):
        shifts_for(load("mini-sdxl"), SvdiffConfig(targets=["*.attn3.*"]))


def test_what_nothing_reads_is_left_out() -> None:
    family = load("mini-sd3")
    names = shifts_for(family).tensors
    assert family.unread_projections
    for path in family.unread_projections:
        assert f"{path}.weight" not in names


def test_the_squared_length_of_the_shifts_is_that_of_what_they_change() -> None:
    """So an anchor on shifts is one on what the network sees."""
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    left, _, right = decompose(weight)
    shift = torch.tensor([0.1, -0.2, 0.3, 0.4, 0.0, 0.5], dtype=torch.float64)
    change = (left * shift) @ right
    torch.testing.assert_close(change.square().sum(), shift.square().sum())


@pytest.mark.parametrize("model", ONE_FAST)
def test_merged_weights_draw_the_same_and_hold_no_hooks(model: str) -> None:
    family = load(model)
    shifts = shifts_for(family)
    stir(shifts, 0.01)
    tensors, metadata = shifts.file_tensors(torch.float32)
    ours, base = prediction(family), prediction(load(model))
    merged = load(model)
    merge_shifts_(merged.network, tensors, metadata)
    drift = (ours - base).abs().max().item()
    assert drift > 0.01
    torch.testing.assert_close(prediction(merged), ours, rtol=0, atol=1e-4 * drift)
    assert not any(module._forward_hooks for module in merged.network.modules())


def test_a_network_in_another_precision_takes_the_shifts_of_the_one_that_was_trained() -> None:
    """Shifts of weights in bfloat16, merged into the float32 weights that those were made of."""
    family = load("mini-sd3", torch.bfloat16)
    shifts = shifts_for(family)
    stir(shifts, 0.05)
    tensors, metadata = shifts.file_tensors(torch.float32)
    assert metadata == {BASE_DTYPE: "bfloat16"}
    wide = load("mini-sd3")
    before = {name: p.clone() for name, p in wide.network.named_parameters()}
    merge_shifts_(wide.network, tensors, metadata)
    for name, shift in shifts.tensors.items():
        left, values, right = decompose(before[name].bfloat16())
        change = (left * torch.maximum(shift.double(), -values)) @ right
        got = wide.network.get_parameter(name).flatten(1).double() - before[name].flatten(1)
        torch.testing.assert_close(got, change, rtol=0, atol=1e-6)


def rename(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    key = next(key for key in tensors if key.endswith(SHIFT))
    tensors["no.such" + SHIFT] = tensors.pop(key)


def shorten(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    key = next(key for key in tensors if key.endswith(SHIFT))
    tensors[key] = tensors[key][:-1]


def drop_values(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    del tensors[next(key for key in tensors if key.endswith(SINGULAR_VALUES))]


def other_values(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    key = next(key for key in tensors if key.endswith(SINGULAR_VALUES))
    tensors[key] = tensors[key] * (1 + 5e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, "no.such: there is no such weight; it was trained on another model"),
        (shorten, r"has shape \(\d+,\) in the file, and the weight here takes \(\d+,\)"),
        (drop_values, "is missing; was the file written by fastppt"),
        (other_values, "has other singular values than the weight that was trained"),
        (lambda tensors, metadata: metadata.clear(), "metadata have no base_dtype"),
        (lambda _, metadata: metadata.update(base_dtype="nn"), "metadata have no base_dtype"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(change: Change, message: str) -> None:
    family = load("mini-sd3")
    tensors, metadata = shifts_for(family).file_tensors(torch.float32)
    change(tensors, metadata)
    with pytest.raises(UserError, match=message):
        merge_shifts_(load("mini-sd3").network, tensors, metadata)


def built(photos: Path, model: str = "mini-sdxl", objectives: Any = None, **settings: Any) -> Any:
    """A step of a run that trains shifts, and all that it trains."""
    kept = {"svdiff": settings.pop("svdiff", {})}
    stages = [stage(kept, **({} if objectives is None else {"objectives": objectives}))]
    config = weights_config(photos, stages, model, **settings)
    family = load_family(ModelConfig(path=model, device="cpu"))
    if config.gradient_checkpointing:
        family.checkpoint_blocks()
    return prepared_trainables(config, family)


@pytest.mark.parametrize("model", ONE_FAST)
def test_replayed_steps_equal_eager_ones(photos: Path, model: str) -> None:
    states = []
    for replayed in (False, True):
        step, trainables = built(photos, model, APT | {"anchor": {"weight": 0.1, "form": "raw"}})
        start = state_of(step)
        recorder = ReplayRecorder([step.generator])
        run_stage(GraphRunner([step], recorder) if replayed else EagerRunner([step]), [step], 3)
        states.append(state_of(step))
        assert not are_equal(start, states[-1])
        moved = [tensor.abs().max() > 0 for tensor in trainables.network.tensors.values()]
        assert all(moved)
    assert are_equal(*states)


def test_checkpointed_blocks_have_the_same_gradients(photos: Path) -> None:
    states = []
    for checkpointing in (False, True):
        step, trainables = built(photos, "mini-sd", gradient_checkpointing=checkpointing)
        stir(trainables.network, 0.01)
        run_stage(EagerRunner([step]), [step], 2)
        states.append(state_of(step))
    assert are_equal(*states)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mini-sdxl", "mini-sd3"])
def test_compiled_blocks_train_as_eager_ones(photos: Path, model: str) -> None:
    values = []
    for compiled in (False, True):
        step, trainables = built(photos, model, APT)
        if compiled:
            compile_blocks_by("aot_eager", step.family)
        run_stage(EagerRunner([step]), [step], 3)
        values.append({name: t.clone() for name, t in trainables.network.tensors.items()})
    for name, eager in values[0].items():
        torch.testing.assert_close(values[1][name], eager, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_run_equals_uninterrupted_run(photos: Path, tmp_path: Path, precision: str) -> None:
    objectives = {"denoising": {}, "anchor": {"weight": 0.1, "form": "raw"}}
    config = weights_config(
        photos,
        [stage({"svdiff": {}}, objectives, steps=4)],
        "mini-sd",
        output=str(tmp_path / "out"),
        checkpoint_every=2,
        model__precision=precision,
    )
    whole = loop.train(config, Console(quiet=True)).folder.root
    copied = resume_copy(whole, 2, tmp_path / "copy")
    assert contents(copied) == contents(whole)
