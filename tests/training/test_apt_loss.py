"""The whole loss of Adaptive Personalized Training, and every gradient, from the equations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastppt.config import RunConfig
from fastppt.families.names import MINI_MODELS
from fastppt.trainables.arena import ParameterArena
from fastppt.trainables.trainables import Trainables
from fastppt.training.batch import draw
from fastppt.training.metric_names import loss_names
from fastppt.training.step import accumulate_gradients
from tests.training.objective_steps import OBJECTIVES, load, prepared_trainables
from tests.training.plain_step import TEMPERATURES, PlainNetwork, plain_terms
from tests.training.plain_text import PlainText

MakeConfig = Callable[..., RunConfig]

TEMPLATE, CAPTION = "a photo of {subject}", "in the snow a red {subject} at night"
NOUN = "toy robot"
# Fewer vectors than the noun has tokens, as many, and more.
VECTORS = {"mini-sd": 1, "mini-sdxl": 2, "mini-sd3": 3}
TRAINABLES = "stage.0.trainables"
LORA_SCALE, TEXT_SCALE = 0.5, 2.0
SETTINGS: dict[str, object] = {
    "prompts.class_noun": NOUN,
    "photos.views": 3,
    "stage.0.batch_size": 3,
    "stage.0.gradient_accumulation": 2,
    f"{TRAINABLES}.lora.rank": 4,
    f"{TRAINABLES}.lora.alpha": 4 * LORA_SCALE,
    f"{TRAINABLES}.text_encoder_lora.rank": 3,
    f"{TRAINABLES}.text_encoder_lora.alpha": 3 * TEXT_SCALE,
    f"{OBJECTIVES}.denoising.weight": 1.7,
    f"{OBJECTIVES}.feature_alignment.weight": 0.3,
    f"{OBJECTIVES}.attention_alignment.weight": 0.02,
}


@pytest.fixture
def captioned(photos: Path, tmp_path: Path) -> Path:
    """Three of the demo photos; the second has a caption of its own."""
    folder = tmp_path / "captioned"
    folder.mkdir()
    paths = sorted(photos.glob("*"))[:3]
    for path in paths:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / paths[1].name).with_suffix(".txt").write_text(CAPTION)
    return folder


@pytest.mark.parametrize("model", MINI_MODELS)
def test_loss_and_every_gradient_of_apt_follow_the_equations(
    make_config: MakeConfig, captioned: Path, model: str
) -> None:
    settings = SETTINGS | {
        "model.path": model,
        "photos.folder": str(captioned),
        # At 32 the middle of mini-sd is a single pixel, whose attention is no choice.
        "photos.resolution": 64,
        f"{TRAINABLES}.tokens.vectors": VECTORS[model],
        # The recipe has another one for mini-sdxl; the others take their family's.
        f"{OBJECTIVES}.denoising.temperature": TEMPERATURES[model]
        if model == "mini-sdxl"
        else None,
    }
    step, trainables = prepared_trainables(
        make_config("apt", **settings), load(model, torch.float64)
    )
    stir(trainables)
    # Some bins lean one way, some the other, some are not seen yet.
    base = [0.5, 0.5003, torch.nan, 1.1, 0.9, 1.0, 1.0, 1.004, 1.0, 1.0]
    tuned = [0.5, 0.5, torch.nan, 1.1, 0.9, 1.002, 0.999, 1.0, 1.0, 0.99]
    for ema, values in ((step.indicator.base_ema, base), (step.indicator.tuned_ema, tuned)):
        ema.copy_(torch.tensor(values))
    emas = [step.indicator.base_ema.tolist(), step.indicator.tuned_ema.tolist()]

    network = PlainNetwork(load(model, torch.float64), model)
    words = ["<v>", "<v>_1", "<v>_2"][: VECTORS[model]]
    text = PlainText(model, [TEMPLATE, CAPTION, TEMPLATE], words, NOUN)
    leaves = {pair.name: (leaf(pair.down), leaf(pair.up)) for pair in trainables.lora.pairs}
    text.rows = {name: leaf(rows) for name, rows in trainables.tokens.rows.items()}
    for pair in trainables.text_encoder_lora.pairs:
        component, _, path = pair.name.partition(".text_model.")
        of_component = text.pairs.setdefault(component, {})
        of_component[path] = leaf(pair.down), leaf(pair.up), TEXT_SCALE
    state = step.generator.get_state()
    expected: list[dict[str, Tensor]] = []
    for _ in range(2):
        terms = plain_terms(step, network, draw(step), emas, leaves, scale=LORA_SCALE, prompts=text)
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
    of_network = [tensor for pair in leaves.values() for tensor in pair]
    for (name, ours), theirs in zip(lora_gradients(trainables, "lora"), of_network, strict=True):
        assert_equal(name, ours, theirs)
    of_text = [
        tensor for pairs in text.pairs.values() for pair in pairs.values() for tensor in pair[:2]
    ]
    for (name, ours), theirs in zip(
        lora_gradients(trainables, "text_encoder_lora"), of_text, strict=True
    ):
        assert_equal(name, ours, theirs)
    tokens = trainables.tokens
    assert tokens.rows.keys() == text.rows.keys()
    for name, rows in tokens.rows.items():
        assert rows.shape[0] == VECTORS[model]
        assert_equal(name, cut(tokens.arena, rows), text.rows[name])


def stir(trainables: Trainables) -> None:
    """Give all up-projections values, and move the learned rows from where they start."""
    chance = torch.Generator().manual_seed(3)
    for adapters in (trainables.lora, trainables.text_encoder_lora):
        for pair in adapters.pairs:
            pair.up.copy_(0.1 * torch.randn(pair.up.shape, generator=chance, dtype=pair.up.dtype))
        adapters.refresh()
    for rows in trainables.tokens.rows.values():
        rows.add_(0.1 * torch.randn(rows.shape, generator=chance, dtype=rows.dtype))
    trainables.tokens.arena.refresh()


def leaf(values: Tensor) -> Tensor:
    return values.detach().clone().requires_grad_()


def lora_gradients(trainables: Trainables, name: str) -> Iterator[tuple[str, Tensor]]:
    """The gradients of each pair, cut out of the flat one where the pair's values lie."""
    adapters = getattr(trainables, name)
    for pair in adapters.pairs:
        for values in (pair.down, pair.up):
            yield pair.name, cut(adapters.arena, values)


def cut(arena: ParameterArena, values: Tensor) -> Tensor:
    offset = values.storage_offset() - arena.flat.detach().storage_offset()
    return arena.grad[offset : offset + values.numel()].view(values.shape)


def assert_equal(name: str, ours: Tensor, theirs: Tensor) -> None:
    assert theirs.grad is not None, name
    size = theirs.grad.abs().max()
    assert size > 0, name
    assert (ours - theirs.grad).abs().max() <= 1e-9 * size, name
