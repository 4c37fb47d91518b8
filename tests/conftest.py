"""What all tests share: one thread, no hub, the mini model, photos."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch

from fastppt.config import ModelConfig, RunConfig
from fastppt.config_io import build_config
from fastppt.families.base import Family
from fastppt.families.loading import load_family
from fastppt.mini import draw_demo_photos

# In the repository, where it alone can be brought along, or beside it.
REAL_PHOTOS = [root / "shared/data/dreambooth" for root in Path(__file__).parents[1:3]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and say so."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch sees none"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_class_images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Class images that tests draw are not kept in the user's cache."""
    folder = tmp_path_factory.mktemp("class-images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastppt.training.class_images.default_cache", lambda: folder)
        yield


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo photos. Read only: copy it to change it."""
    folder = tmp_path_factory.mktemp("photos")
    draw_demo_photos(folder)
    return folder


@pytest.fixture
def family() -> Family:
    """A fresh mini-sdxl in float32."""
    return load_family(ModelConfig(path="mini-sdxl", device="cpu"))


@pytest.fixture
def family_float64() -> Family:
    """A fresh mini-sdxl in float64, to compare two ways to compute."""
    return load_family(ModelConfig(path="mini-sdxl", device="cpu"), dtype=torch.float64)


@pytest.fixture
def make_config(photos: Path, tmp_path: Path):
    """Return a maker of small run configurations on the mini model.

    Pictures have half the side that the model is made for. A setting of None is the default.
    """

    def make(recipe: str = "ppt-lora", **settings: object) -> RunConfig:
        small: dict[str, object] = {
            "model.path": "mini-sdxl",
            "model.device": "cpu",
            "photos.folder": str(photos),
            "photos.resolution": 32,
            "prompts.class_noun": "robot",
            "output": str(tmp_path / "out"),
            "samples.enabled": False,
            "log_every": 4,
            "stage.0.steps": 6,
            "stage.0.trainables.lora.rank": 4,
            "stage.0.trainables.lora.learning_rate": 1e-3,
        }
        keys = small | {key.replace("__", "."): value for key, value in settings.items()}
        given = [(key, value) for key, value in keys.items() if value is not None]
        return build_config(recipe, settings=given)

    return make


@pytest.fixture
def real_photos():
    """Return a finder of folders of real photos; skips where there are none."""

    def find(subject: str) -> Path:
        folders = [photos / subject for photos in REAL_PHOTOS]
        found = next((folder for folder in folders if folder.is_dir()), None)
        if found is None:
            pytest.skip(f"no photos at {' or '.join(map(str, folders))}")
        return found

    return find
