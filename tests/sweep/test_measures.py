"""What is measured of a run whatever its model is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastppt.config import RunConfig
from fastppt.config_io import build_config
from fastppt.sweep.measures import (
    Predictions,
    noise_differences,
    parameter_drift,
    predict_both,
    subject_loss,
)
from fastppt.training.loop import train

MakeConfig = Callable[..., RunConfig]


def test_the_subject_loss_is_that_of_the_last_quarter() -> None:
    rows = [{"denoising": value} for value in (9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 2.0, 4.0)]
    assert subject_loss(rows) == pytest.approx(3.0)
    assert subject_loss([*rows[:-1], {"denoising": None}]) == pytest.approx(2.0)
    assert subject_loss([{"denoising": None}]) is None
    assert subject_loss([{"denoising": 5.0}]) == 5.0


def test_the_parameter_drift_is_the_root_of_the_penalty_over_the_weight() -> None:
    rows = [{"anchor": 7.0}, {"anchor": 0.36}]
    assert parameter_drift(rows, 0.04) == pytest.approx(3.0)
    assert parameter_drift([{"anchor": 0.0}], 0.0) is None
    assert parameter_drift([{"anchor": None}], 0.1) is None


def test_noise_differences_are_means_of_squares() -> None:
    base = Predictions(torch.zeros(4, 1, 2, 2), torch.ones(4, 1, 2, 2))
    tuned = Predictions(torch.full((4, 1, 2, 2), 2.0), torch.full((4, 1, 2, 2), 0.5))
    found = noise_differences(base, tuned)
    assert found == {"class_noise": pytest.approx(4.0), "no_prompt_noise": pytest.approx(0.25)}
    assert set(noise_differences(base, base).values()) == {0.0}


def trained(config: RunConfig) -> tuple[RunConfig, Path]:
    assert config.output is not None
    train(config, Console(quiet=True))
    return config, config.output


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mini-sd", "mini-sdxl", "mini-sd3"])
def test_a_run_that_went_nowhere_predicts_what_the_base_does(
    make_config: MakeConfig, model: str
) -> None:
    still = {"stage__0__trainables__lora__learning_rate": 0.0, "stage__0__steps": 2}
    config, folder = trained(make_config("ppt-lora", model__path=model, **still))
    base, tuned = predict_both(config, folder, None)
    # An adapter of zero is another way to compute: its products are rounded.
    assert max(noise_differences(base, tuned).values()) < 1e-10
    assert base.class_prompt.shape == base.no_prompt.shape
    assert len(base.class_prompt) == 10 * 5
    # The two prompts are not one.
    assert not torch.equal(base.class_prompt, base.no_prompt)


@pytest.mark.slow
def test_what_a_whole_network_has_learned_is_seen(photos: Path, tmp_path: Path) -> None:
    settings = {
        "model.path": "mini-sd",
        "model.device": "cpu",
        "photos.folder": str(photos),
        "prompts.class_noun": "robot",
        "output": str(tmp_path / "full"),
        "samples.enabled": False,
        "stage.0.steps": 2,
        "stage.0.trainables.full.learning_rate": 1e-4,
    }
    config, folder = trained(build_config("ppt-dreambooth", settings=list(settings.items())))
    base, tuned = predict_both(config, folder, None)
    assert min(noise_differences(base, tuned).values()) > 1e-8
    # The base is not asked again where it was.
    again, same = predict_both(config, folder, base)
    assert again is base and torch.equal(same.class_prompt, tuned.class_prompt)
