"""The mini models on disk: as diffusers folders and as single files."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file

from fastppt.config import ModelConfig
from fastppt.errors import UserError
from fastppt.families.loading import load_family
from fastppt.families.names import MINI_MODELS
from fastppt.mini import build_mini
from fastppt.mini.single_file import original_state


class Export:
    """A mini model on disk.

    Attributes:
        pipeline: What was saved.
        folder: Its diffusers folder.
        file: Its single-file checkpoint, in the original layout.
    """

    def __init__(self, family: str, root: Path) -> None:
        (name,) = (mini for mini, its_family in MINI_MODELS.items() if its_family == family)
        self.pipeline = build_mini(name)
        self.folder = root / "folder"
        self.pipeline.save_pretrained(self.folder)
        self.file = root / "model.safetensors"
        save_file(original_state(self.pipeline), self.file)


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Export]:
    """Return a maker of exports, one a family. Read only: copy the folder to change it."""
    made: dict[str, Export] = {}

    def export(family: str) -> Export:
        if family not in made:
            made[family] = Export(family, tmp_path_factory.mktemp(family))
        return made[family]

    return export


@pytest.fixture
def copied(exports: Callable[[str], Export], tmp_path: Path) -> Path:
    """A copy of the SDXL folder, to be damaged."""
    return shutil.copytree(exports("sdxl").folder, tmp_path / "model")


@pytest.fixture
def diffusers_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What diffusers logs; its logger hands nothing on to the root, where caplog listens."""
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        yield caplog
    finally:
        logger.removeHandler(caplog.handler)


@pytest.fixture
def refusal() -> Callable[..., str]:
    """Return a loader of models that must be refused; it gives the message."""

    def refused(path: Path | str, **keys: object) -> str:
        with pytest.raises(UserError) as error:
            load_family(ModelConfig(path=str(path), device="cpu", **keys))
        return str(error.value)

    return refused
