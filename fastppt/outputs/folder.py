"""The folder of a run: what is in it, and who may write there."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from fastppt.config import RunConfig
from fastppt.config_io import build_config, render_toml
from fastppt.errors import UserError
from fastppt.outputs.files import write_file
from fastppt.outputs.lora_files import DIFFUSERS_FILE, run_name

# Bytes, on every file system that is in use.
LONGEST_NAME = 255


@dataclass(frozen=True)
class RunFolder:
    """Paths inside an output folder."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration, and the sign that the folder holds a run."""
        return self.root / "config.toml"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.root / "metrics.jsonl"

    @property
    def card(self) -> Path:
        """The model card."""
        return self.root / "README.md"

    @property
    def samples(self) -> Path:
        """Grids of pictures."""
        return self.root / "samples"

    @property
    def checkpoints(self) -> Path:
        """Adapters of earlier steps."""
        return self.root / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.root / "tensorboard"

    def grid(self, step: int) -> Path:
        """The grid drawn after a step."""
        return self.samples / f"step-{step:06d}.png"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint after a step."""
        return self.checkpoints / f"step-{step:06d}"

    def written_by(self, config: RunConfig) -> list[Path]:
        """Everything that a run of the configuration writes into the folder."""
        return [
            self.config,
            self.metrics,
            self.card,
            self.samples,
            self.checkpoints,
            self.tensorboard,
            self.root / DIFFUSERS_FILE,
            self.root / f"{run_name(config)}.safetensors",
        ]


def check_output(config: RunConfig, overwrite: bool) -> RunFolder:
    """Refuse an output folder that a run must not write into. Writes nothing.

    Raises:
        UserError: the path is or lies under a file, it holds another run and ``overwrite`` is not
            given, or it holds something else of the name of a file of the run.
    """
    assert config.output is not None
    folder = RunFolder(config.output)
    if f"{run_name(config)}.safetensors" == DIFFUSERS_FILE:
        raise UserError(
            f"name {run_name(config)}: is that of the LoRA file in diffusers' form; "
            "pass another --name"
        )
    if len(f".{run_name(config)}.safetensors.{os.getpid()}.tmp".encode()) > LONGEST_NAME:
        raise UserError(
            f"name {run_name(config)}: is too long for a file's name; pass a shorter --name"
        )
    for place in (config.output, *config.output.absolute().parents):
        if place.exists() and not place.is_dir():
            raise UserError(f"output {config.output}: {place} is a file; choose another folder")
    if folder.config.exists():
        if not overwrite:
            raise UserError(
                f"output {config.output}: holds another run; choose another folder, "
                "or pass --overwrite to delete that run"
            )
        _read_old_config(folder)
        return folder
    for path in folder.written_by(config):
        if path.exists():
            raise UserError(
                f"output {config.output}: holds {path.name}, which is of no run and would be "
                "replaced; choose an empty folder"
            )
    return folder


def open_folder(folder: RunFolder, config: RunConfig) -> None:
    """Delete the run that is there, if any, and write the new run's configuration.

    Raises:
        UserError: the folder cannot be made or written.
    """
    if folder.config.exists():
        _delete_run(folder)
    write_file(folder.config, render_toml(config))


def _delete_run(folder: RunFolder) -> None:
    # The configuration goes last: a deletion that is cut short still leaves a run to overwrite.
    paths = folder.written_by(_read_old_config(folder))
    for path in (*(path for path in paths if path != folder.config), folder.config):
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{path}: cannot be deleted ({error.strerror or error})") from None


def _read_old_config(folder: RunFolder) -> RunConfig:
    """Return the configuration of the run that is to be deleted.

    Raises:
        UserError: the file is none that a run of fastppt wrote.
    """
    config = build_config(file=folder.config)
    if config.output is None:
        raise UserError(f"{folder.config}: was not written by a run; choose another folder")
    return config
