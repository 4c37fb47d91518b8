"""The folder of a run: what is in it, and who may write there."""

from __future__ import annotations

import glob
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from fastppt.config import RunConfig
from fastppt.config_io import build_config, render_toml
from fastppt.errors import UserError
from fastppt.outputs.files import ERROR_LOG, STATE_FILE, write_file
from fastppt.outputs.lock import check_place
from fastppt.outputs.lora_metadata import learned_word
from fastppt.outputs.results import files_of_run

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

    @property
    def plots(self) -> Path:
        """Pictures of the metrics."""
        return self.root / "plots"

    @property
    def evaluation(self) -> Path:
        """What the run's model and its base were measured at."""
        return self.root / "evaluation.json"

    @property
    def evaluation_grid(self) -> Path:
        """Pictures of both, side by side."""
        return self.root / "evaluation.png"

    def grid(self, step: int) -> Path:
        """The grid drawn after a step."""
        return self.samples / f"step-{step:06d}.png"

    def grids(self) -> dict[int, Path]:
        """The grids that are there, by their step."""
        steps = {path: path.stem.removeprefix("step-") for path in self.samples.glob("step-*.png")}
        return {int(step): path for path, step in steps.items() if step.isdecimal()}

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
            self.plots,
            self.evaluation,
            self.evaluation_grid,
            *(self.root / name for name in files_of_run(config)),
        ]


def check_output(config: RunConfig, overwrite: bool) -> RunFolder:
    """Refuse an output folder that a run must not write into. Writes nothing.

    Raises:
        UserError: the path is or lies under a file, it holds another run and ``overwrite`` is not
            given, or it holds something else of the name of a file of the run.
    """
    assert config.output is not None
    folder = RunFolder(config.output)
    check_names(config)
    check_place(config.output)
    own: list[Path] = []
    if folder.config.exists():
        if not overwrite:
            raise UserError(
                f"output {config.output}: holds another run; go on with that run with --resume "
                f"{config.output}, pass --overwrite to delete it, or choose another folder"
            )
        own = folder.written_by(_read_old_config(folder))
    for path in folder.written_by(config):
        if path.exists() and path not in own:
            raise UserError(
                f"output {config.output}: holds {path.name}, which is of no run and would be "
                "replaced; choose an empty folder"
            )
    return folder


def check_names(config: RunConfig) -> None:
    """Refuse names of the run's files that are the same, or too long.

    Args:
        config: The run's, which may name its files and a learned word.
    """
    names = files_of_run(config)
    for index, name in enumerate(names):
        # The word's file is the last; it lies in checkpoints, too.
        is_word = learned_word(config) is not None and index == len(names) - 1
        key, stem = "token" if is_word else "name", Path(name).stem
        if name in (*names[:index], *([STATE_FILE] if is_word else [])):
            raise UserError(
                f"{key} {stem}: gives {name}, the name of another file of the run; "
                f"pass another --{key}"
            )
        if len(f".{name}.{os.getpid()}.tmp".encode()) > LONGEST_NAME:
            raise UserError(f"{key} {stem}: is too long for a file's name; pass a shorter --{key}")


def delete_leftovers(folder: RunFolder, config: RunConfig) -> None:
    """Delete what a run that was killed left of files and checkpoints it was writing, and its log.

    Args:
        folder: The run's.
        config: Likewise.
    """
    names = [path.name for path in folder.written_by(config)]
    for path in [
        *(path for name in names for path in folder.root.glob(f".{glob.escape(name)}.*.tmp")),
        folder.root / ERROR_LOG,
        *folder.samples.glob(".step-*.tmp"),
        *folder.checkpoints.glob(".step-*.tmp"),
        *folder.plots.glob(".*.tmp"),
    ]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def open_folder(folder: RunFolder, config: RunConfig) -> None:
    """Delete the run that is there, if any, and write the new run's configuration.

    What is left of one that was killed before it had written that is deleted, too.

    Raises:
        UserError: the folder cannot be made or written.
    """
    if folder.config.exists():
        _delete_run(folder)
    delete_leftovers(folder, config)
    write_file(folder.config, render_toml(config))


def _delete_run(folder: RunFolder) -> None:
    # The configuration goes last: a deletion that is cut short still leaves a run to overwrite.
    old = _read_old_config(folder)
    delete_leftovers(folder, old)
    paths = folder.written_by(old)
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
