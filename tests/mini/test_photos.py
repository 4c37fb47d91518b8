import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fastppt.mini.__main__ import app
from fastppt.mini.photos import PHOTO_SIZE, SCENES, draw_demo_photos, draw_robot


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return draw_demo_photos(tmp_path_factory.mktemp("photos") / "made")


def test_five_rgb_photos_of_the_stated_size(photos):
    assert [path.name for path in photos] == [f"robot-{number}.png" for number in range(1, 6)]
    for path in photos:
        with Image.open(path) as photo:
            assert photo.mode == "RGB"
            assert photo.size == (PHOTO_SIZE, PHOTO_SIZE)


def test_same_seed_writes_the_same_bytes(photos, tmp_path):
    for first, second in zip(photos, draw_demo_photos(tmp_path), strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_other_seed_changes_the_places(photos, tmp_path):
    for first, second in zip(photos, draw_demo_photos(tmp_path, seed=1), strict=True):
        assert first.read_bytes() != second.read_bytes()


def test_places_differ_from_each_other(photos):
    # The upper corners show the place only.
    corners = [np.asarray(Image.open(path))[:40, :40].reshape(-1, 3).mean(0) for path in photos]
    for index, corner in enumerate(corners):
        assert all(np.abs(corner - other).max() > 10 for other in corners[:index])


def test_robot_is_in_every_photo(photos):
    # Teal, orange, cream and the dark screen: each at least one pixel in a hundred.
    for path in photos:
        pixels = np.asarray(Image.open(path)).reshape(-1, 3).astype(int)
        for color in ((42, 157, 156), (238, 132, 52), (244, 232, 207), (38, 51, 63)):
            near = np.abs(pixels - color).max(-1) < 40
            assert near.mean() > 0.01, (path.name, color)


@pytest.mark.parametrize("pose", [pose for _, pose in SCENES])
def test_no_part_of_the_robot_is_cut_off(pose):
    alpha = np.asarray(draw_robot(pose).getchannel("A"))
    edges = (alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1])
    assert not any(edge.any() for edge in edges)


def test_command_writes_the_photos(photos, tmp_path):
    result = CliRunner().invoke(app, ["photos", str(tmp_path / "new" / "folder")])
    assert result.exit_code == 0
    assert len(result.output.splitlines()) == 1
    written = sorted((tmp_path / "new" / "folder").iterdir())
    assert [path.read_bytes() for path in written] == [path.read_bytes() for path in photos]


@pytest.mark.parametrize("name", ["file", "file/below"])
@pytest.mark.parametrize("command", ["photos", "export"])
def test_commands_refuse_a_file(tmp_path, command, name):
    (tmp_path / "file").write_text("mine")
    result = CliRunner().invoke(app, [command, str(tmp_path / name)])
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 1
    assert "file is a file" in result.output
    assert (tmp_path / "file").read_text() == "mine"
