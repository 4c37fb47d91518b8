"""Where captions of photos are looked for, and which are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from fastppt.cli import app
from fastppt.config_io import build_config
from fastppt.data.photos import find_photos
from fastppt.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two photos, each with a caption of its own beside it."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.jpg", "b.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "a.txt").write_text("{subject} beside")
    (folder / "captions.toml").write_text('"b.png" = "{subject} beside too"')
    return folder


def captions_of(folder: Path, place: Path | None = None) -> list[tuple[str | None, Path | None]]:
    return [(photo.caption, photo.caption_file) for photo in find_photos(folder, place)]


def test_a_file_of_captions_wins_over_all_that_lies_beside_the_photos(
    folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "of the dog.toml"
    file.write_text('"b.png" = " {subject} elsewhere "')
    assert captions_of(folder, file) == [(None, None), ("{subject} elsewhere", file)]
    beside = [
        ("{subject} beside", folder / "a.txt"),
        ("{subject} beside too", folder / "captions.toml"),
    ]
    assert captions_of(folder) == beside
    # The photos' own folder may be named as well.
    assert captions_of(folder, folder) == beside


def test_a_folder_of_captions_holds_what_a_folder_of_photos_may(
    folder: Path, tmp_path: Path
) -> None:
    place = tmp_path / "captions"
    place.mkdir()
    (place / "b.txt").write_text("{subject} in a file\n")
    (place / "captions.toml").write_text('"a.jpg" = "{subject} in a table"')
    (place / "read me.md").write_text("left alone")
    assert captions_of(folder, place) == [
        ("{subject} in a table", place / "captions.toml"),
        ("{subject} in a file", place / "b.txt"),
    ]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no caption"),
        (
            {"c.txt": "x"},
            r"c\.txt is not named like a photo in .*photos, such as a\.txt for a\.jpg",
        ),
        ({"captions.toml": '"c.png" = "x"'}, "'c.png', which is not a photo in .*photos"),
        ({"captions.toml": '"a.jpg" = "x"', "a.txt": "x"}, "keep one"),
        ({"a.txt": " "}, r"caption of a\.jpg is empty in .*a\.txt"),
    ],
)
def test_what_stands_in_a_place_for_captions_belongs_to_a_photo(
    folder: Path, tmp_path: Path, files: dict[str, str], message: str
) -> None:
    place = tmp_path / "captions"
    place.mkdir()
    for name, text in files.items():
        (place / name).write_text(text)
    with pytest.raises(UserError, match=message):
        find_photos(folder, place)


def test_an_empty_file_and_a_place_that_is_not_there_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty.toml"
    empty.write_text("# nothing yet")
    with pytest.raises(UserError, match=r'holds no caption; write one as "a\.jpg" ='):
        find_photos(folder, empty)
    with pytest.raises(UserError, match="neither a TOML file nor a folder"):
        find_photos(folder, tmp_path / "nowhere.toml")


def test_a_run_keeps_the_path_of_its_captions_and_names_what_is_wrong(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.toml"
    file.write_text('"a.jpg" = "{subject} in the snow"')
    command = ["train", "--recipe", "lora", "--model", "mini-sd", "--device", "cpu"]
    command += ["--photos", str(folder), "--class-noun", "robot", "--steps", "1", "--rank", "1"]
    command += ["--no-samples", "--captions", "mine.toml", "--output", "out"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    config = build_config(file=tmp_path / "out" / "config.toml")
    assert config.photos.captions == file
    file.write_text('"c.jpg" = "{subject} in the snow"')
    result = CliRunner().invoke(app, [*command, "--overwrite"])
    assert result.exit_code == 2
    assert "has a caption for 'c.jpg', which is not a photo" in " ".join(result.output.split())
