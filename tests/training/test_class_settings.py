"""Class images as a run asks for them: from a folder, or with the sampler's settings."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from rich.console import Console

from fastppt.config import ModelConfig, RunConfig
from fastppt.data.class_images import ClassImages
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.families.loading import load_family
from fastppt.trainables.trainables import Trainables
from fastppt.training import class_images
from fastppt.training.class_images import find_class_images
from fastppt.training.loop import resolve
from tests.training.class_steps import PRIOR, write_class_pictures

MakeConfig = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def painter() -> Family:
    """A model that could draw."""
    return load_family(ModelConfig(path="mini-sd3", device="cpu"))


@pytest.fixture
def own(make_config: MakeConfig, painter: Family, tmp_path: Path) -> Callable[..., ClassImages]:
    """Return a finder of the pictures of a user's folder."""
    folder = write_class_pictures(tmp_path / "own", 4)

    def find(num_images: int) -> ClassImages:
        settings = {f"{PRIOR}.folder": str(folder), f"{PRIOR}.num_images": num_images}
        config = resolve(make_config("lora", **settings), painter)
        return find_class_images(config, painter, Trainables(), "", Console(quiet=True), None)[0]

    return find


def test_a_folder_gives_its_first_pictures_by_name(own: Callable[..., ClassImages]) -> None:
    images = own(3)
    assert [picture.path.name for picture in images.pictures] == ["0.png", "1.png", "2.png"]
    assert [picture.size for picture in images.pictures] == [(72, 80)] * 3
    assert not images.is_drawn
    assert str(images).startswith("3 of the folder own; ")
    captioned = images.pictures[0].path.with_suffix(".txt")
    captioned.write_text("no {subject} here")
    assert own(3).pictures[0].caption is None


def test_a_folder_with_too_few_pictures_is_refused(own: Callable[..., ClassImages]) -> None:
    message = f"{PRIOR}.folder: .*own holds 4 pictures, and {PRIOR}.num_images is 9; set that to 4"
    with pytest.raises(UserError, match=message):
        own(9)


def test_a_file_that_is_no_picture_is_refused(
    own: Callable[..., ClassImages], tmp_path: Path
) -> None:
    (tmp_path / "own" / "0.png").write_text("no picture")
    with pytest.raises(UserError, match=f"^{PRIOR}: .*0.png cannot be read as an image"):
        own(4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 5, "cache": "c"}, "steps, cache are for drawn ones: leave one"),
        ({"sampler": "ddim"}, "taken as they are, and sampler is for drawn ones"),
    ],
)
def test_a_folder_and_settings_of_the_sampler_do_not_go_together(
    make_config: MakeConfig, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_config("lora", **{f"{PRIOR}.{k}": v for k, v in ({"folder": "f"} | settings).items()})


def test_buckets_and_class_images_do_not_go_together(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"photos\.buckets: class images are square"):
        make_config("lora", **{f"{PRIOR}.num_images": 4, "photos.buckets": True})


def test_a_sampler_that_the_model_has_not_is_refused_with_its_key(
    make_config: MakeConfig, painter: Family
) -> None:
    config = make_config("lora", **{f"{PRIOR}.steps": 1001})
    with pytest.raises(UserError, match=f"{PRIOR}.steps must be <= 1000, got 1001"):
        resolve(config, painter)
    config = make_config("lora", **{f"{PRIOR}.sampler": "ddim"})
    with pytest.raises(UserError, match=f"{PRIOR}.sampler: ddim is for models"):
        resolve(config, painter)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        ("mini-sd", ("ddim", 50, 7.5)),
        ("mini-sdxl", ("euler", 50, 5.0)),
        ("mini-sd3", ("euler", 28, 7.0)),
    ],
)
def test_unset_settings_are_those_of_the_stock_pipeline(
    make_config: MakeConfig, model: str, wanted: tuple[str, int, float]
) -> None:
    family = load_family(ModelConfig(path=model, device="cpu"))
    config = make_config("lora", **{"model.path": model, f"{PRIOR}.num_images": 4})
    prior = resolve(config, family).stage[0].objectives.prior_preservation
    assert prior is not None
    assert (prior.sampler, prior.steps, prior.guidance_scale) == wanted


def test_the_default_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Not the one that all tests have patched.
    spec = spec_from_file_location("fresh", class_images.__file__)
    assert spec is not None and spec.loader is not None
    plain = module_from_spec(spec)
    spec.loader.exec_module(plain)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert plain.default_cache() == tmp_path / "fastppt" / "class-images"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert plain.default_cache() == tmp_path / ".cache" / "fastppt" / "class-images"
