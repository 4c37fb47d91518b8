"""From a grid of anchor weights to runs, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastppt.config_io import build_config, stage_tables
from fastppt.errors import UserError
from fastppt.sweep.grid import Point, make_grid, parse_weights, run_folder, shared_settings


def grid(
    recipe: str | None, weights: list[float], *settings: tuple[str, Any], file: Path | None = None
) -> list[Point]:
    stages = stage_tables(recipe, file, settings)
    return make_grid(recipe, file, settings, stages, weights, Path("out"))


def test_weights_are_read_as_they_stand() -> None:
    assert parse_weights("0, 1e-3,0.01") == [0.0, 0.001, 0.01]
    assert str(parse_weights("-0,1")[0]) == "0.0"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1e-2,1e-3", "must increase, and 0.001 comes after 0.01"),
        ("1e-3,1e-3", "must increase"),
        ("0.1", "give two weights or more"),
        ("", "'nothing' is no weight"),
        ("1e-3,,1e-2", "'nothing' is no weight"),
        ("1e-3,ten", "'ten' is no weight; give numbers from 0 on"),
        ("-1,1", "'-1' is no weight"),
        ("1,inf", "'inf' is no weight"),
        ("nan,1", "'nan' is no weight"),
    ],
)
def test_a_grid_that_is_none_is_refused_with_what_to_give(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_weights(text)


def test_each_weight_has_a_folder_and_nothing_else_of_its_own() -> None:
    points = grid("ppt-lora", [0.0, 1e-3, 2.5], ("seed", 7))
    assert [point.config.output for point in points] == [
        Path(f"out/weight-{name}") for name in ("0", "0.001", "2.5")
    ]
    held = [point.config.stage[0].objectives.anchor for point in points]
    assert [anchor.weight for anchor in held if anchor is not None] == [0.0, 1e-3, 2.5]
    assert {point.config.seed for point in points} == {7}
    first, *others = (shared_settings(point.config) for point in points)
    assert all(other == first for other in others)
    assert first != shared_settings(build_config("ppt-lora"))


def test_weights_that_nearly_agree_have_folders_of_their_own() -> None:
    near = (0.12345671, 0.12345672, 1234567.0, 1234568.0)
    assert len({run_folder(Path("out"), weight) for weight in near}) == 4
    names = {0.0: "0", 1e-5: "1e-05", 1e-3: "0.001", 100.0: "100", 1e16: "1e+16"}
    for weight, name in names.items():
        assert run_folder(Path("out"), weight) == Path(f"out/weight-{name}")


def test_every_stage_with_an_anchor_takes_the_weight(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    stage = "[[stage]]\nsteps = 2\n[stage.trainables.lora]\n[stage.objectives.denoising]\n"
    anchor = "[stage.objectives.anchor]\nweight = 5.0\n"
    file.write_text(stage + anchor + stage + stage + anchor)
    for point in grid(None, [0.1, 0.2], file=file):
        held = [each.objectives.anchor for each in point.config.stage]
        assert [None if one is None else one.weight for one in held] == [
            point.weight,
            None,
            point.weight,
        ]


def test_a_recipe_without_an_anchor_is_refused_and_those_with_one_are_named() -> None:
    said = "lora: has no anchor .* recipe that has one .ppt-lora, ppt-dreambooth, ppt-custom"
    with pytest.raises(UserError, match=said):
        grid("lora", [0.1, 0.2])
    added = grid("lora", [0.1, 0.2], ("stage.0.objectives.anchor.form", "effective"))
    assert len(added) == 2


def test_a_weight_that_one_run_cannot_have_is_refused_before_any_is_trained() -> None:
    settings = ("stage.0.objectives.anchor.form", "decoupled")
    with pytest.raises(UserError, match=r"a decoupled anchor pulls .* 0.0001 \* 20000 is past it"):
        grid("ppt-lora", [1.0, 20000.0], settings)


def test_a_setting_that_is_wrong_is_refused_as_of_a_run() -> None:
    with pytest.raises(UserError, match="seed"):
        grid("ppt-lora", [0.1, 0.2], ("seed", -1))
