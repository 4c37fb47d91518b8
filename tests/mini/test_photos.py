from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from fastppt.mini.__main__ import app
from fastppt.mini.photos import (
    DEMO_NOUN,
    DEMO_SEED,
    PHOTO_SIZE,
    draw_demo_photos,
    draw_subject_photos,
)
from fastppt.mini.pretrain.scenes import FIRST_SUBJECT
from fastppt.mini.world import NOUNS, PLACES, random_subject


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return draw_demo_photos(tmp_path_factory.mktemp("photos") / "made")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["photos", *map(str, arguments)])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_five_rgb_photos_of_the_stated_size(made: list[Path]) -> None:
    assert [path.name for path in made] == [f"robot-{number}.png" for number in range(1, 6)]
    for path in made:
        with Image.open(path) as photo:
            assert photo.mode == "RGB"
            assert photo.size == (PHOTO_SIZE, PHOTO_SIZE)


def test_same_seed_writes_the_same_bytes(made: list[Path], tmp_path: Path) -> None:
    draw_demo_photos(tmp_path)
    assert contents(tmp_path) == contents(made[0].parent)


def test_other_seed_changes_every_photo(made: list[Path], tmp_path: Path) -> None:
    for first, second in zip(made, draw_demo_photos(tmp_path, seed=1), strict=True):
        assert first.read_bytes() != second.read_bytes()


def test_demo_subject_is_in_every_photo(made: list[Path]) -> None:
    look = random_subject(DEMO_SEED, DEMO_NOUN).look
    for path in made:
        pixels = np.asarray(Image.open(path)).reshape(-1, 3) / 255
        for color in (look.body, look.pattern_color, look.trim, look.accessory_color):
            # Light and texture change a colour a little.
            near = np.abs(pixels - color).max(-1) < 0.15
            assert near.mean() > 0.005, (path.name, color)


def test_no_two_photos_are_in_the_same_place_until_all_were_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []

    def note(scene, size):
        shown.append(scene)
        return np.zeros((size, size, 3), dtype=np.uint8)

    monkeypatch.setattr("fastppt.mini.photos.render", note)
    subject = random_subject(7, "cat")
    draw_subject_photos(tmp_path, subject, count=len(PLACES) + 2)
    places = [scene.context for scene in shown]
    assert set(places[: len(PLACES)]) == set(PLACES)
    assert places[len(PLACES) :] == places[:2]
    assert {(scene.noun, scene.look, scene.style) for scene in shown} == {
        ("cat", subject.look, "photo")
    }
    assert len({scene.pose for scene in shown}) == len({scene.seed for scene in shown}) == 12


def test_more_photos_begin_with_those_of_a_lower_count(tmp_path: Path) -> None:
    subject = random_subject(2, "lamp")
    draw_subject_photos(tmp_path / "one", subject, count=1, seed=3)
    draw_subject_photos(tmp_path / "two", subject, count=2, seed=3)
    assert set(contents(tmp_path / "two")) == {"lamp-1.png", "lamp-2.png"}
    assert contents(tmp_path / "one").items() < contents(tmp_path / "two").items()


@pytest.mark.parametrize("count", [0, -1])
def test_no_photos_are_refused(tmp_path: Path, count: int) -> None:
    with pytest.raises(ValueError, match=f"count must be at least 1, got {count}"):
        draw_subject_photos(tmp_path, random_subject(0), count=count)


def test_command_writes_the_demo_photos(made: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    result = run(folder)
    assert result.exit_code == 0
    assert result.output == f"photos: wrote 5 images to {folder} (robot-1.png ...)\n"
    assert contents(folder) == contents(made[0].parent)


def test_command_draws_any_subject(tmp_path: Path) -> None:
    draw_subject_photos(tmp_path / "wanted", random_subject(4, "chair"), count=1, seed=6)
    result = run(tmp_path / "cli", "--noun", "chair", "--subject", 4, "--count", 1, "--seed", 6)
    assert result.output == f"photos: wrote 1 image to {tmp_path / 'cli'} (chair-1.png ...)\n"
    assert contents(tmp_path / "cli") == contents(tmp_path / "wanted")


def test_command_refuses_a_noun_that_the_world_does_not_have(tmp_path: Path) -> None:
    result = run(tmp_path / "new", "--noun", "dragon")
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 1
    assert result.output.startswith("photos: --noun: no noun 'dragon' in the mini world: there are")
    assert all(noun in result.output for noun in NOUNS)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("option", ["--count", "--subject", "--seed"])
def test_command_refuses_a_negative_number(tmp_path: Path, option: str) -> None:
    result = run(tmp_path / "new", option, -1)
    assert result.exit_code == 2
    assert option in result.output
    assert not (tmp_path / "new").exists()


def test_command_refuses_a_subject_that_the_judge_has_learned(tmp_path: Path) -> None:
    result = run(tmp_path / "new", "--subject", FIRST_SUBJECT)
    assert result.exit_code == 2
    assert "--subject" in result.output
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["file", "file/below"])
@pytest.mark.parametrize("command", ["photos", "export"])
def test_commands_refuse_a_file(tmp_path: Path, command: str, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    result = CliRunner().invoke(app, [command, str(tmp_path / name)])
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 1
    assert "file is a file" in result.output
    assert (tmp_path / "file").read_text() == "mine"
