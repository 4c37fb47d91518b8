"""What people use of a run: the files of all that it has trained, whatever that is."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from fastppt.config import RunConfig
from fastppt.errors import UserError
from fastppt.families.base import Family
from fastppt.outputs.lora_files import lora_files_of_run, write_diffusers_files, write_lora_files
from fastppt.outputs.network_files import network_files, write_network, write_small_network
from fastppt.trainables.trainables import Trainables
from fastppt.trainables_config import AdapterConfig


def write_results(
    folder: Path,
    config: RunConfig,
    family: Family,
    trainables: Trainables,
    photo_counts: Mapping[tuple[int, int], int],
) -> list[Path]:
    """Write what a finished run leaves, `files_of_run`.

    Args:
        folder: Where to.
        config: The run's, resolved.
        family: Whose model was trained.
        trainables: What was trained.
        photo_counts: Number of photos that were trained at each (height, width), pixels.

    Returns:
        The paths of files and folders, the network's first.

    Raises:
        UserError: one cannot be written.
    """
    return [
        *write_network(folder, config, family, trainables),
        *write_lora_files(folder, config, family, trainables, photo_counts),
    ]


def check_libraries(config: RunConfig) -> None:
    """Refuse a run whose results could not be written when all is trained.

    Raises:
        UserError: says what to install.
    """
    _, table = config.trainables.get(config.network or "", (0, None))
    if isinstance(table, AdapterConfig) and find_spec("peft") is None:
        raise UserError(
            f"stage.0.trainables.{config.network}: its files are made by the library peft, which "
            "is not installed: pip install peft"
        )


def write_checkpoint_files(
    folder: Path, config: RunConfig, family: Family, trainables: Trainables
) -> list[Path]:
    """Write what of a checkpoint can be used as a finished run's files, where that is small.

    A network that was trained whole is not among them: the checkpoint's state holds it.

    Args:
        folder: The checkpoint's.
        config: The run's, resolved.
        family: Whose model is trained.
        trainables: What is trained.

    Returns:
        The files' paths; there may be none.

    Raises:
        UserError: one cannot be written.
    """
    return [
        *write_small_network(folder, config, family, trainables),
        *write_diffusers_files(folder, config, family, trainables),
    ]


def files_of_run(config: RunConfig) -> list[str]:
    """Return the names of the files and folders that `write_results` leaves."""
    return [*network_files(config), *lora_files_of_run(config)]
