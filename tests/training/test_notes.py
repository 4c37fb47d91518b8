"""What a step notes of layers and bins: the parts of its terms, and the indicator after it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from rich.console import Console

from fastppt.config import RunConfig
from fastppt.training.loop import train
from fastppt.training.metric_names import LAYER_TERMS
from fastppt.training.step import run_step
from tests.training.objective_steps import APT, OBJECTIVES, load, metrics_of, prepared, stir

MakeConfig = Callable[..., RunConfig]


def parts(row: dict[str, float], term: str) -> dict[str, float]:
    """The layers' parts of a term, by layer."""
    start = f"{term}/"
    return {key.removeprefix(start): row[key] for key in row if key.startswith(start)}


@pytest.mark.parametrize("model", ["mini-sd", "mini-sdxl", "mini-sd3"])
def test_layers_are_the_parts_of_their_terms(make_config: MakeConfig, model: str) -> None:
    settings = APT | {"model.path": model, "stage.0.gradient_accumulation": 2}
    step, adapters = prepared(make_config("lora", **settings), load(model, torch.float64))
    stir(adapters)
    for _ in range(2):
        run_step(step)
    for row in metrics_of(step, 2):
        for term in LAYER_TERMS:
            values = parts(row, term).values()
            assert len(set(values)) == len(values) > 1
            assert sum(values) == pytest.approx(row[term], rel=1e-6)


def test_each_layer_has_its_own_name(make_config: MakeConfig) -> None:
    """A run that holds this layer alone finds the same."""

    def first_row(**settings: object) -> dict[str, float]:
        step, adapters = prepared(make_config("lora", **APT, **settings), load("mini-sdxl"))
        stir(adapters)
        run_step(step)
        return metrics_of(step, 1)[0]

    row = first_row()
    feature = "up_blocks.2.attentions.0"
    attention = "up_blocks.1.attentions.1.transformer_blocks.1.attn2"
    layers = {"feature_alignment": feature, "attention_alignment": attention}
    alone = first_row(**{f"{OBJECTIVES}.{name}.layers": [layers[name]] for name in layers})
    for term in ("feature_mean", "feature_std"):
        assert list(parts(alone, term)) == [feature]
        assert row[f"{term}/{feature}"] == alone[term] == alone[f"{term}/{feature}"]
    assert row[f"attention_alignment/{attention}"] == alone["attention_alignment"]


def test_bins_are_gamma_after_the_step(make_config: MakeConfig) -> None:
    step, adapters = prepared(make_config("lora", **APT), load("mini-sdxl", torch.float64))
    stir(adapters)
    # One that overfits, one that does not; the others are not seen.
    step.indicator.base_ema[:2] = torch.tensor([0.5002, 0.5])
    step.indicator.tuned_ema[:2] = torch.tensor([0.5, 0.6])
    for number in range(4):
        run_step(step)
        row = metrics_of(step, number + 1)[-1]
        emas = zip(step.indicator.base_ema.tolist(), step.indicator.tuned_ema.tolist(), strict=True)
        for found, (base, tuned) in zip(parts(row, "gamma").values(), emas, strict=True):
            if math.isnan(base):
                assert math.isnan(found)
                continue
            wanted = min(max(1 - math.exp(-1000 * (base - tuned)), 0.0), 1.0)
            assert found == pytest.approx(wanted, rel=1e-5, abs=1e-7)


def test_a_step_that_does_not_ask_the_base_has_the_bins_alone(make_config: MakeConfig) -> None:
    config = make_config("lora", **APT, **{"stage.0.base_every": 2})
    step, adapters = prepared(config, load("mini-sdxl"))
    stir(adapters)
    for number in range(2):
        run_step(step, number)
    asked, not_asked = metrics_of(step, 2)
    for term in LAYER_TERMS:
        assert all(math.isfinite(value) for value in parts(asked, term).values())
        assert all(math.isnan(value) for value in parts(not_asked, term).values())
    assert asked["prediction_difference"] > 0 and math.isnan(not_asked["prediction_difference"])
    seen = {name for name, value in asked.items() if name.startswith("gamma/") and value == value}
    assert seen and all(not_asked[name] == asked[name] for name in seen)


def test_stages_note_what_they_have(make_config: MakeConfig) -> None:
    apt = make_config("lora", **APT, **{"stage.0.steps": 3}).stage[0]
    plain = make_config("lora", **{"stage.0.steps": 2})
    batches = apt.model_copy(update={"batch_size": 2})
    config = plain.model_copy(update={"stage": [plain.stage[0], batches], "log_every": 3})
    result = train(config, Console(quiet=True))
    rows = [json.loads(line) for line in result.folder.metrics.read_text().splitlines()]
    assert [row["stage"] for row in rows] == [0, 0, 1, 1, 1]
    for row in rows:
        assert row["skipped"] == 0 and row["loss"] > 0
        if row["stage"] == 0:
            assert row["prediction_difference"] is None and "layers" not in row
            assert "gamma_bins" not in row
        else:
            assert row["prediction_difference"] >= 0 and len(row["gamma_bins"]) == 10
            assert row["layers"].keys() == set(LAYER_TERMS)
